"""What the bridges to other evaluation packages share: questions about images in memory, asked of one arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image

from prunetune.configs import EvaluateConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.formatting import IGNORE_INDEX
from prunetune.data_recipes.images import HERE, Album
from prunetune.evaluation.errors import TaskError
from prunetune.models import Arm
from prunetune.models.ranks import launched_ranks

One = TypeVar("One")
Made = TypeVar("Made")
LARGEST = 64
"""Questions per step that "auto" begins with on a GPU."""
ON_A_CPU = 8
"""Questions per step of "auto" on a CPU, whose memory runs out without an error."""


@dataclass(frozen=True)
class Question:
    """A question about images.

    Attributes:
        id: for messages.
        source: the benchmark it is of.
        text: what is asked; with as many ``HERE`` as images, they stand there, and otherwise before it.
        images: in their order, none for text alone.
    """

    id: str
    source: str
    text: str
    images: tuple[Image.Image, ...] = ()


class Bridge:
    """An arm that answers questions about images in memory.

    Args:
        config: of ``prunetune evaluate``: model, pruning and adapter count, tasks and output do not.
        device: "cuda", "cpu" or another torch device; None, or "cuda" on one of several ranks, is the rank's own GPU,
            or the CPU where there is none.
    """

    def __init__(self, config: EvaluateConfig, device: str | None = None) -> None:
        self.config = config
        self.arm = Arm.load(config.model, config.pruning, config.adapter, _own_device(device))
        self._images = _Images()
        self._formatter = self.arm.formatter(self._images)

    def answers(self, questions: Sequence[Question], limits: Sequence[int]) -> list[str]:
        """Return the greedy answers to one batch of questions.

        Args:
            questions: of one batch.
            limits: for each how many new tokens its answer may have.
        """
        samples = [self._sample(question, None) for question in questions]
        with torch.inference_mode():
            inputs = self.arm.place(self._formatter.prompt_batch(samples))
            tokens = self.arm.pruned.generate(**inputs, max_new_tokens=max(limits), do_sample=False).tokens
        # A greedy answer's beginning does not depend on its limit.
        rows = [row[:limit] for row, limit in zip(tokens, limits, strict=True)]
        self._images.clear()
        return [text.strip() for text in self.arm.processor.batch_decode(rows, skip_special_tokens=True)]

    def likelihoods(self, questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Return for each answer the sum of its tokens' log-probabilities, and whether each is the likeliest.

        The row is the one of training, with the answer where the template has it; its end token does not count.

        Raises:
            TaskError: for an empty answer.
            DataError: if the template does not mark what the assistant says.
        """
        samples = []
        for question, answer in zip(questions, answers, strict=True):
            if not answer.strip():
                raise TaskError(f"{question.id}: the likelihood of an empty answer was asked for")
            samples.append(self._sample(question, answer.strip()))
        with torch.inference_mode():
            pruned = self.arm.pruned.prepare(self.arm.place(self._formatter.training_batch(samples)))
            inputs = dict(pruned.inputs)
            targets = inputs.pop("labels")[:, 1:]  # (B, L - 1), each predicted one place before
            # The batch with its labels beside: stages inside the LLM ask the last token before the answer.
            logits = self.arm.pruned.run(pruned, inputs).logits[:, :-1]
            found = []
            for row, own in enumerate(targets):
                places = (own != IGNORE_INDEX).nonzero()[:-1, 0]  # the last is the end token
                chosen = own[places]
                logs = logits[row, places].float().log_softmax(dim=-1)  # (A, V)
                total = logs.gather(1, chosen[:, None]).sum()
                found.append((float(total), bool((logs.argmax(dim=-1) == chosen).all())))
        self._images.clear()
        return found

    def _sample(self, question: Question, answer: str | None) -> Sample:
        reference = None
        text = question.text
        if len(question.images) == 1:
            # One image has its place in the template: before the question, as the model was trained.
            text = text.replace(HERE, "").strip()
        if question.images:
            reference = self._images.add(question.images)
        return Sample(question.id, question.source, reference, (Turn(text, answer),))


def _own_device(device: str | None) -> str | None:
    """Return the device of this process: of several on a machine each has its own GPU."""
    ranks = launched_ranks()
    there = torch.cuda.device_count()
    if there == 0 or not (device is None or device.startswith("cuda")):
        return device
    if ranks.world == 1 and device not in (None, "cuda"):
        return device
    # VLMEvalKit shows each process one GPU alone, which is number 0 there, and hides that there are others.
    return f"cuda:{ranks.local % there}"


class Batches:
    """Cuts work into batches, of a fixed size or of what fits into memory.

    Args:
        size: questions per step, or "auto" (or lmms-eval's "auto:N"): halved as often as memory runs out on a GPU.
        device: where the work is done.
        largest: what "auto" begins with; None is 64, and 8 on a CPU.

    Raises:
        TaskError: for another word, or a number below 1.
    """

    def __init__(self, size: int | str, device: torch.device, largest: int | None = None) -> None:
        self.auto = str(size).startswith("auto")
        if self.auto:
            self.size = largest or (ON_A_CPU if device.type == "cpu" else LARGEST)
        elif str(size).isdigit() and int(size) > 0:
            self.size = int(size)
        else:
            raise TaskError(f"batch_size must be a positive number or auto, got {size!r}")

    def run(self, work: Sequence[One], do: Callable[[Sequence[One]], list[Made]]) -> list[Made]:
        """Return what ``do`` makes of the work, batch by batch and in order.

        Raises:
            TaskError: if a batch does not fit into memory, one question alone with "auto".
        """
        made: list[Made] = []
        while len(made) < len(work):
            part = work[len(made) : len(made) + self.size]
            try:
                made += do(part)
            except torch.OutOfMemoryError as error:
                if not self.auto or len(part) == 1:
                    advice = "use fewer visual tokens or another dtype" if len(part) == 1 else "lower it, or set auto"
                    raise TaskError(f"batch_size {len(part)} does not fit into memory; {advice}") from error
                self.size = len(part) // 2
                torch.cuda.empty_cache()
        return made


class _Images:
    """Images in memory, by the number of their question."""

    def __init__(self) -> None:
        self._images: dict[str, Image.Image | Album] = {}

    def clear(self) -> None:
        self._images.clear()  # a benchmark's images do not fit into memory together

    def add(self, images: Sequence[Image.Image]) -> str:
        name = str(len(self._images))
        own = tuple(image.convert("RGB") for image in images)
        self._images[name] = own[0] if len(own) == 1 else Album(own)
        return name

    def exists(self, reference: str) -> bool:
        return reference in self._images

    def open(self, reference: str, sample_id: str) -> Image.Image | Album:
        return self._images[reference]
