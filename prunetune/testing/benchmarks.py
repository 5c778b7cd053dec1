"""What the rest of the library takes for granted of a benchmark."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import pytest

from prunetune.evaluation.sources import open_images, read_items
from prunetune.evaluation.tasks import Item
from prunetune.evaluation.tasks.base import items_hash


class BenchmarkContract:
    """A benchmark on a few items in its published format."""

    @abstractmethod
    def make_task(self) -> Any:
        """Return what ``register_task`` returned."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Write a few items as they are published, images included."""

    @abstractmethod
    def right_answer(self, item: Item) -> str:
        """Return an answer that is fully right."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        """A folder with the files."""
        self.write_files(tmp_path)
        return tmp_path

    def test_items_are_read_in_one_order_with_ids_of_their_own(self, data: Path) -> None:
        items = read_items(self.make_task(), data)
        assert items and len({item.id for item in items}) == len(items)
        assert items_hash(read_items(self.make_task(), data)) == items_hash(items)

    def test_every_image_opens(self, data: Path) -> None:
        items = read_items(self.make_task(), data)
        images = open_images(self.make_task(), data, items)
        for item in items:
            if item.image is not None:
                assert images.exists(item.image), item
                assert images.open(item.image, item.id).mode == "RGB"

    def test_right_answers_score_one_and_nonsense_does_not(self, data: Path) -> None:
        task = self.make_task()
        items = read_items(task, data)
        if task.score is None:
            pytest.skip("this benchmark has no score of a single item")
        for item in items:
            assert task.score(self.right_answer(item), item) == 1.0, item
        nonsense = [task.score("qwertz uiop", item) for item in items]
        assert all(0.0 <= score <= 1.0 for score in nonsense) and sum(nonsense) < len(items)

    def test_metrics_of_right_answers_are_numbers(self, data: Path) -> None:
        task = self.make_task()
        items = read_items(task, data)
        measured = task.measure([(self.right_answer(item), item) for item in items])
        assert measured or task.hidden
