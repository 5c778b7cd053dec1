"""What the rest of the library takes for granted of a benchmark."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import pytest

from prunetune.evaluation.tasks.base import Benchmark, Item, items_hash


class BenchmarkContract:
    """A benchmark on a few items in its published format."""

    @abstractmethod
    def make_task(self) -> Benchmark:
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
        items = self.make_task().read(data)
        assert items and len({item.id for item in items}) == len(items)
        assert items_hash(self.make_task().read(data)) == items_hash(items)

    def test_every_image_opens(self, data: Path) -> None:
        questions = self.make_task().open(data)
        images = questions.open_images()
        for item in questions.items:
            if item.image is not None:
                assert images.exists(item.image), item
                assert images.open(item.image, item.id).mode == "RGB"

    def test_right_answers_score_one_and_nonsense_does_not(self, data: Path) -> None:
        task = self.make_task()
        right = [task.score(self.right_answer(item), item).score for item in task.read(data)]
        nonsense = [task.score("qwertz uiop", item).score for item in task.read(data)]
        if None in right:
            pytest.skip("this benchmark has no score of a single item")
        assert all(score == 1.0 for score in right), right
        assert all(0.0 <= (score or 0.0) <= 1.0 for score in nonsense) and nonsense != right

    def test_right_answers_have_metrics(self, data: Path) -> None:
        task = self.make_task()
        scored = [task.score(self.right_answer(item), item) for item in task.read(data)]
        assert task.summarise(scored).metrics or task.hidden
