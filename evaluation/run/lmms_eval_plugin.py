"""The plugin that lets lmms-eval run any of its tasks on a pruned, tuned model: the entry point ``prunetune``.

    python -m lmms_eval --model prunetune --model_args config=configs/evaluate/FILE.yaml --tasks gqa --batch_size 1

The configuration is that of ``prunetune evaluate``; its tasks, limit and output belong to lmms-eval here. Prompts and
scores are lmms-eval's, so call the protocol that when you report numbers.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from prunetune.configs import EvaluateConfig, load_config
from prunetune.data_recipes import Sample, Turn
from prunetune.evaluation.errors import TaskError
from prunetune.models import Arm

_ONE = "the prunetune plugin takes one picture per question"


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest("prunetune", simple_class_path="prunetune.evaluation.run.lmms_eval_plugin.PrunetuneModel")


class PrunetuneModel(lmms):
    """A pruned model behind lmms-eval's interface; answers are generated greedily, as ``prunetune evaluate`` does.

    Args:
        config: YAML of ``prunetune evaluate``: model, pruning and, for a tuned arm, the adapter.
        batch_size: images per step.
        device: "cuda", "cpu" or another torch device; None is the GPU if there is one.
        others: what lmms-eval passes to every model and this one does not need.
    """

    is_simple = True

    def __init__(self, config: str, batch_size: int | str = 1, device: str | None = None, **others: Any) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise TaskError("the prunetune plugin runs in one process; split the tasks, or use prunetune evaluate")
        self.config = load_config(EvaluateConfig, config)
        self.arm = Arm.load(self.config.model, self.config.pruning, self.config.adapter, device)
        self.images = _Images()
        self.formatter = self.arm.formatter(self.images)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answers to lmms-eval's requests, in their order.

        Raises:
            TaskError: for a request with several images, a video, or sampling.
        """
        answers: list[str] = []
        for index in tqdm(range(0, len(requests), self.batch_size), desc="prunetune", unit="batch"):
            answers += self._answer([request.args for request in requests[index : index + self.batch_size]])
        return answers

    def _answer(self, batch: list[tuple]) -> list[str]:
        self.images.clear()  # of the batch before: a benchmark's images do not fit into memory together
        samples = []
        limits = []
        for context, options, doc_to_visual, doc_id, task, split in batch:
            # Sampled answers differ between runs, and a difference between arms could be chance.
            if options.get("temperature", 0) or options.get("num_beams", 1) != 1:
                raise TaskError(f"{task} asks for sampling or beams; the prunetune plugin decodes greedily")
            name = f"{task}/{split}/{doc_id}"
            image = self.images.add(name, doc_to_visual(self.task_dict[task][split][doc_id]) or [])
            # Our template puts the image's placeholder; a second one in the text would ask for a second image.
            question = context.replace("<image>", "").strip()
            samples.append(Sample(name, task, image, (Turn(question, None),)))
            limits.append(int(options.get("max_new_tokens", self.config.max_new_tokens)))
        with torch.inference_mode():
            inputs = self.arm.place(self.formatter.prompt_batch(samples))
            tokens = self.arm.pruned.generate(**inputs, max_new_tokens=max(limits), do_sample=False).tokens
        # Requests of one batch may have limits of their own; a greedy answer's beginning does not depend on its limit.
        rows = [row[:limit] for row, limit in zip(tokens, limits, strict=True)]
        texts = self.formatter.processor.batch_decode(rows, skip_special_tokens=True)
        return [_until(text, options).strip() for text, (_, options, *_) in zip(texts, batch, strict=True)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered: pruned arms are compared by what they say."""
        raise NotImplementedError("the prunetune plugin answers generate_until tasks; this task asks for likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered: a second round would meet the pruned cache of the first."""
        raise NotImplementedError("the prunetune plugin answers single-round tasks")


class _Images:
    """Images in memory, by the name of their question."""

    def __init__(self) -> None:
        self._images: dict[str, Image.Image] = {}

    def clear(self) -> None:
        self._images.clear()

    def add(self, name: str, visuals: list[Any]) -> str | None:
        """Keep the only image of a question and return its reference; None without one."""
        if not visuals:
            return None
        # Dropping the others would answer another question than the one that is scored.
        if len(visuals) > 1:
            raise TaskError(f"{name} comes with {len(visuals)} pictures; {_ONE}")
        if not isinstance(visuals[0], Image.Image):
            raise TaskError(f"{name} comes with {type(visuals[0]).__name__}; {_ONE}")
        self._images[name] = visuals[0].convert("RGB")
        return name

    def exists(self, reference: str) -> bool:
        return reference in self._images

    def open(self, reference: str, sample_id: str) -> Image.Image:
        return self._images[reference]


def _until(text: str, options: dict[str, Any]) -> str:
    """Return the text before the first of the request's stop strings."""
    stops = options.get("until") or []
    if isinstance(stops, str):
        stops = [stops]
    for stop in stops:
        if stop:  # nothing can be split at an empty one
            text = text.split(stop)[0]
    return text
