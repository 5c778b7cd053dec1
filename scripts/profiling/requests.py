"""What arms are asked while they are measured: a benchmark's questions, or made-up ones where there is no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, cast

import torch

from prunetune.configs import ConfigError, TableConfig
from prunetune.data_recipes.images import limited
from prunetune.data_recipes.videos import sampled
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import Questions, task_folder
from prunetune.models import Arm
from prunetune.pruning import PrunedModel
from prunetune.pruning.families.anyres import crops_of


class Requests(Protocol):
    """Makes batches for one arm."""

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the requests of these numbers as one batch on the model's device; numbers begin anew at the end."""
        ...


class Asked:
    """The first questions of a benchmark."""

    def __init__(self, arm: Arm, questions: Questions, config: TableConfig) -> None:
        opened = sampled(limited(questions.open_images(), config.max_pixels), config.video)
        self.arm = arm
        self.formatter = arm.formatter(opened)
        self.samples = [sample_of(item) for item in questions.items[: config.limit]]

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return the requests of these numbers."""
        own = [self.samples[number % len(self.samples)] for number in numbers]
        return self.arm.place(self.formatter.prompt_batch(own))


def first_questions(config: TableConfig) -> tuple[str, Questions]:
    """Return the table's first benchmark with its questions.

    Raises:
        TaskError: if its files can't be read.
        ConfigError: if it has none.
    """
    name = config.tasks[0]
    questions = get_task(name).open(task_folder(config.data, name))
    if not questions.items:
        raise ConfigError(f"{name} has no questions, so nothing can be measured; name another benchmark first")
    return name, questions


class MadeUp:
    """Noise for images, and random tokens for text: for models of a shape alone, which have neither data nor words.

    Args:
        pruned: the model.
        text: tokens of each prompt beside the image's.
        side: height and width of the images, where the model takes any.
    """

    def __init__(self, pruned: PrunedModel, text: int, side: int) -> None:
        self.pruned = pruned
        self.text = text
        self.side = side

    @cached_property
    def _image(self) -> dict[str, torch.Tensor]:
        return image_of(self.pruned, self.side)

    @cached_property
    def _length(self) -> int:
        """How many placeholders an image has."""
        with torch.no_grad():
            return self.pruned.encode(self._image, frozenset())["image"].lengths[0]

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return as many requests."""
        model = self.pruned.model
        generator = torch.Generator().manual_seed(int(numbers[0]))
        family, config = self.pruned.family, cast(Any, model.config)
        token = family.token_id(model, "image")
        # Words lie in the middle of a vocabulary: what is special stands at its ends.
        vocabulary = config.get_text_config().vocab_size
        words = torch.randint(vocabulary // 4, vocabulary // 2, (len(numbers), self.text), generator=generator)
        ids = torch.cat([words[:, :1], torch.full((len(numbers), self._length), token), words[:, 1:]], dim=1)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        # As a processor says where the image is.
        for name in {*family.aligned, *({"mm_token_type_ids"} & set(family.replaced))}:
            batch[name] = (ids == token).int()
        for name, value in self._image.items():
            many = torch.cat([value] * len(numbers))
            if value.is_floating_point():
                many = torch.randn(many.shape, generator=generator)
            batch[name] = many
        dtype = next(model.parameters()).dtype
        placed = {name: value.to(model.device) for name, value in batch.items()}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in placed.items()}


def image_of(pruned: PrunedModel, side: int) -> dict[str, torch.Tensor]:
    """Return the inputs of one blank image; of models that cut images into crops, those of a square one."""
    model: Any = pruned.model
    blank = pruned.family.blank(model)
    if not getattr(model.config, "image_grid_pinpoints", None) or blank["pixel_values"].ndim != 5:
        return blank
    sizes = torch.tensor([[side, side]], device=model.device)
    shape = list(blank["pixel_values"].shape)
    shape[1] = crops_of(model, sizes)[0]
    return {**blank, "pixel_values": blank["pixel_values"].new_zeros(shape), "image_sizes": sizes}
