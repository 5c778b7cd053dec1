"""The plugin that lets lmms-eval run any of its tasks on a pruned, tuned model: the entry point ``prunetune``.

    python -m lmms_eval --model prunetune --model_args config=configs/evaluate/FILE.yaml --tasks gqa --batch_size 1

The configuration is that of ``prunetune evaluate``; its tasks, limit and output belong to lmms-eval here. Prompts and
scores are lmms-eval's, so call the protocol that when you report numbers. ``torchrun`` and ``accelerate launch`` start
several processes: lmms-eval deals the questions to them and gathers the scores.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from prunetune.configs import EvaluateConfig, load_config
from prunetune.data_recipes.images import HERE
from prunetune.errors import PrunetuneError
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.run.bridge import Batches, Bridge, Question
from prunetune.models.ranks import launched_ranks, leave_at_exit
from prunetune.reading import one_line

Method = TypeVar("Method", bound=Callable[..., Any])


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest("prunetune", simple_class_path="prunetune.evaluation.run.lmms_eval_plugin.PrunetuneModel")


def ends_the_run(method: Method) -> Method:
    """Make a method's errors end the process where lmms-eval's command line would swallow them."""

    @wraps(method)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except Exception as error:
            if not _below_command_line():
                raise
            # It prints any Exception and then exits with 0: a job that failed would count as done.
            if not isinstance(error, PrunetuneError):
                traceback.print_exc()
            raise SystemExit(f"prunetune: {one_line(error)}") from error

    return cast(Method, run)


def _below_command_line() -> bool:
    """Return whether lmms-eval's command line called us, and not somebody's own Python."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "cli_evaluate":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Likelihood(tuple, GenerationResult):
    """A sum of log-probabilities, and whether all its tokens are the likeliest: a pair, as lmms-eval documents it.

    Its evaluator (0.7.3) makes a text of every pair that is no ``GenerationResult``, so this is one as well.
    """

    token_counts = None

    def __new__(cls, total: float, greedy: bool) -> Likelihood:
        """Return the pair."""
        return super().__new__(cls, (total, greedy))

    def __init__(self, total: float, greedy: bool) -> None:
        """Leave out the fields of a generated text: the pair is all there is."""

    @property
    def text(self) -> tuple[float, bool]:  # type: ignore[override]
        """The pair, which the evaluator hands on in place of a text."""
        return self[0], self[1]


class PrunetuneModel(lmms):
    """A pruned model behind lmms-eval's interface; answers are generated greedily, as ``prunetune evaluate`` does.

    Args:
        config: YAML of ``prunetune evaluate``: model, pruning and, for a tuned arm, the adapter.
        batch_size: questions per step, or "auto", see :class:`Batches`.
        device: "cuda", "cpu" or another torch device; None is the GPU if there is one. Each of several processes takes
            its own.
        max_batch_size: what "auto" begins with.
        others: what lmms-eval passes to every model and this one does not need.
    """

    is_simple = True

    @ends_the_run
    def __init__(
        self,
        config: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        leave_at_exit()  # lmms-eval begins a group for several processes, and does not leave it
        ranks = launched_ranks()
        self._rank, self._world_size = ranks.rank, ranks.world
        self.config = load_config(EvaluateConfig, config)
        self.bridge = Bridge(self.config, device)
        largest = None if max_batch_size is None else int(max_batch_size)
        self.batches = Batches(batch_size, self.device, largest)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where lmms-eval puts what it gathers."""
        return self.bridge.arm.device

    @ends_the_run
    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answers to lmms-eval's requests, in their order.

        Raises:
            TaskError: for a request with a video, or with sampling.
        """
        with self._bar(len(requests)) as bar:

            def answer(part: Sequence[Any]) -> list[str]:
                texts = self._answer([request.args for request in part])
                bar.update(len(part))
                return texts

            return self.batches.run(requests, answer)

    def _answer(self, batch: Sequence[tuple]) -> list[str]:
        questions = []
        limits = []
        for context, options, doc_to_visual, doc_id, task, split in batch:
            # Sampled answers differ between runs, and a difference between arms could be chance.
            if options.get("temperature", 0) or options.get("do_sample") or (options.get("num_beams") or 1) != 1:
                raise TaskError(f"{task} asks for sampling or beams; the prunetune plugin decodes greedily")
            questions.append(self._question(context, doc_to_visual, doc_id, task, split))
            limits.append(int(options.get("max_new_tokens", self.config.max_new_tokens)))
        texts = self.bridge.answers(questions, limits)
        return [_until(text, options).strip() for text, (_, options, *_) in zip(texts, batch, strict=True)]

    @ends_the_run
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return for each continuation the sum of its log-probabilities, and whether it is the greedy answer.

        Where a document comes with several continuations, the sums are **negated**: lmms-eval chooses the one with the
        least number there, since its own models return losses.

        Raises:
            TaskError: for a request without a document, which only mutual information asks for, or with a video.
        """
        choices: dict[tuple, set[str]] = defaultdict(set)
        asked = []
        for request in requests:
            if len(request.args) != 6:
                raise TaskError("acc_mutual_info asks for likelihoods without an image; the prunetune plugin has none")
            context, target, doc_to_visual, doc_id, task, split = request.args
            continuation = target if isinstance(target, str) else str(target(self.task_dict[task][split][doc_id]))
            choices[task, split, doc_id].add(continuation)
            asked.append((context, continuation, doc_to_visual, doc_id, task, split))
        with self._bar(len(requests)) as bar:

            def likelihood(part: Sequence[tuple]) -> list[tuple[float, bool]]:
                questions = [self._question(context, *document) for context, _, *document in part]
                found = self.bridge.likelihoods(questions, [continuation for _, continuation, *_ in part])
                bar.update(len(part))
                return found

            found = self.batches.run(asked, likelihood)
        signed: list[tuple[float, bool]] = []
        for (total, greedy), (*_, doc_id, task, split) in zip(found, asked, strict=True):
            several = len(choices[task, split, doc_id]) > 1
            signed.append(Likelihood(-total if several else total, greedy))
        return signed

    @ends_the_run
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered: a second round would meet the pruned cache of the first."""
        raise NotImplementedError("the prunetune plugin answers single-round tasks")

    def _question(self, context: str, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> Question:
        name = f"{task}/{split}/{doc_id}"
        images = tuple(_flat(doc_to_visual(self.task_dict[task][split][doc_id])))
        for image in images:
            if not isinstance(image, Image.Image):
                raise TaskError(f"{name} comes with {type(image).__name__}; the prunetune plugin takes images")
        # Our template writes the placeholders: one that the task wrote says where its image stands.
        return Question(name, task, re.sub(r"\n*<image>\n*", HERE if images else "", context).strip(), images)

    def _bar(self, number: int) -> tqdm:
        return tqdm(total=number, desc="prunetune", unit="question", disable=self.rank != 0)


def _flat(visuals: Any) -> list[Any]:
    """Return the visuals of a document, which some tasks put in lists within lists."""
    if not isinstance(visuals, (list, tuple)):
        return [] if visuals is None else [visuals]
    found = []
    for visual in visuals:
        found += _flat(visual)
    return found


def _until(text: str, options: dict[str, Any]) -> str:
    """Return the text before the first of the request's stop strings."""
    stops = options.get("until") or []
    if isinstance(stops, str):
        stops = [stops]
    for stop in stops:
        if stop:  # nothing can be split at an empty one
            text = text.split(stop)[0]
    return text
