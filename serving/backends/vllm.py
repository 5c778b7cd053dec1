"""A stock vLLM server as the LLM: tower, pruner and projector run here, kept features go there over HTTP."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunetune.configs.serving import EngineClientConfig, LimitsConfig
from prunetune.data_recipes.formatting import PLACE, conversation
from prunetune.data_recipes.images import Dialogue
from prunetune.data_recipes.segments import MODELS_TOKENS
from prunetune.models.arm import Arm
from prunetune.pruning.rewrite import Pruned
from prunetune.reading import shown
from prunetune.serving.backends.base import PromptRow, Prompts, RowsRefused
from prunetune.serving.backends.engine import EngineClient
from prunetune.serving.errors import Refused, ServingError
from prunetune.serving.job import Delta, Failed, Finished, Job, Usage
from prunetune.serving.servable import why_not_embeds


class VllmEmbeds:
    """Answers batches with a vLLM server that was started with ``--enable-mm-embeds``.

    The engine counts placeholders by the features that it is given and believes whatever they hold, so that all is
    checked here: finite numbers, at least one token an image, the width of the LLM, the length of prompt and answer,
    and afterwards that the engine read as many tokens as were meant.

    Args:
        arm: what is served; its LLM does not run.
        limits: the longest answer of requests that name none.
        options: where the engine is.

    Raises:
        ServingError: if the arm can't be served like this, or the engine is not there.
    """

    def __init__(self, arm: Arm, limits: LimitsConfig, options: EngineClientConfig) -> None:
        why = why_not_embeds(arm.pruned)
        if why is not None:
            raise ServingError(why)
        if arm.base.config.tokens != MODELS_TOKENS:
            raise ServingError(
                f"model.tokens {arm.base.config.tokens} gives prompts that no engine's chat template does; set it to "
                f"{MODELS_TOKENS}, or use --engine embedded"
            )
        self.arm = arm
        self.prompts = Prompts(arm, limits)
        self.client = EngineClient(options.url, limits.answer_seconds)
        self.name, context = self.client.model(options.model)
        self.prompts.context = min(self.prompts.context, context or self.prompts.context)
        self._room = threading.Semaphore(options.in_flight)
        self._pool = ThreadPoolExecutor(options.in_flight, thread_name_prefix="engine")

    def run(self, jobs: Sequence[Job]) -> None:
        """Encode and prune a batch, and hand it to the engine; it is waited for only while the engine is full."""
        rows = self.prompt_rows(jobs)
        for job, row in zip(jobs, rows, strict=True):
            body = self.body(job, row)
            self._room.acquire()
            self._pool.submit(self._ask, job, row, body)

    def prompt_rows(self, jobs: Sequence[Job]) -> list[PromptRow]:
        """Return what the engine is given of each job.

        Raises:
            RowsRefused: for jobs that an engine must not be given.
        """
        with torch.inference_mode():
            pruned: Pruned = self.arm.pruned.prepare(self.prompts.batch(jobs), padding_side="left")
            rows = self.prompts.rows(pruned, jobs)
        refused = {}
        for number, (job, row) in enumerate(zip(jobs, rows, strict=True)):
            why = self._why_not(job, row)
            if why is not None:
                refused[number] = why
        if refused:
            raise RowsRefused(refused)
        return rows

    def _why_not(self, job: Job, row: PromptRow) -> Refused | None:
        images = 0 if job.opened is None else len(job.opened.images) if isinstance(job.opened, Dialogue) else 1
        if len(row.features) != images:
            said = f"the request has {images} images, and features of {len(row.features)}; only whole images are served"
            return Refused(422, "images_differ", said, "messages")
        for features in row.features:
            if len(features) == 0:
                said = "the pruner keeps no token of an image, and an engine needs one at least; raise pruning.keep"
                return Refused(422, "no_visual_tokens", said, "messages")
            if features.ndim != 2 or features.shape[1] != self.prompts.width:
                said = f"features are (K, {self.prompts.width}), got {tuple(features.shape)}"
                return Refused(500, "wrong_features", said)
        return None

    def body(self, job: Job, row: PromptRow) -> dict[str, Any]:
        """Return the engine's request: messages with features in the places of images, and nothing of the client's."""
        messages = job.opened.messages if isinstance(job.opened, Dialogue) else None
        if messages is None:
            messages = tuple(conversation(job.sample, None if job.opened is None else PLACE))
        features = iter(row.features)
        told = []
        for message in messages:
            parts = []
            for part in message["content"]:
                parts.append(embeds_part(next(features)) if part["type"] == "image" else part)
            told.append({"role": message["role"], "content": parts})
        wanted = job.wanted
        body = {
            "model": self.name,
            "messages": told,
            "max_tokens": row.longest,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if wanted.seed is not None:
            body["seed"] = wanted.seed
        if wanted.stops:
            body["stop"] = list(wanted.stops)
        return body

    def _ask(self, job: Job, row: PromptRow, body: dict[str, Any]) -> None:
        """Ask the engine and tell the job what it says; runs on a thread of its own."""
        try:
            if not job.cancelled.is_set():
                _Telling(job, row.usage).follow(self.client, body)
        except Refused as why:
            job.tell(Failed(why))
        except Exception as error:  # of the wire; whatever it is, the request ends
            said = "nobody waits for this answer" if job.cancelled.is_set() else f"the engine failed: {shown(error)}"
            job.tell(Failed(Refused(502, "engine_failed", said)))
        finally:
            self._room.release()

    def close(self) -> None:
        """Wait for what the engine still answers."""
        self._pool.shutdown()


class _Telling:
    """Tells a job what comes from the engine."""

    def __init__(self, job: Job, usage: Usage) -> None:
        self.job = job
        self.usage = usage
        self.text = self.told = ""
        self.reason: str | None = None
        self.completion = 0

    def follow(self, client: EngineClient, body: dict[str, Any]) -> None:
        """Read the engine's stream to its end."""
        with client.stream(body) as (events, stop):
            self.job.stop = stop
            for piece in events:
                if self.job.cancelled.is_set():
                    return
                self._take(piece)
        if self.reason is None:
            raise Refused(502, "engine_failed", "the engine's stream ended without an end")
        text = self.text.strip()
        self._tell(text)
        cost = Usage(self.usage.prompt, self.completion, self.usage.visual, self.usage.kept)
        self.job.tell(Finished(text, self.reason, cost))

    def _take(self, piece: dict[str, Any]) -> None:
        if "error" in piece:
            raise Refused(502, "engine_failed", f"the engine says {shown(piece['error'])}")
        usage = piece.get("usage")
        if usage is not None:
            self._check_length(usage["prompt_tokens"])
            self.completion = usage.get("completion_tokens") or self.completion
        for choice in piece.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.reason = choice.get("finish_reason") or self.reason
        self._tell(self.text.strip())

    def _check_length(self, prompt: int) -> None:
        # A template of its own, or a placeholder that counts otherwise: it would answer another question.
        if prompt != self.usage.prompt:
            raise Refused(
                502,
                "engine_prompt_differs",
                f"the engine read {prompt} tokens, and the prompt has {self.usage.prompt}; serve the checkpoint that "
                "`prunetune export --for vllm` wrote, with its chat template",
            )

    def _tell(self, text: str) -> None:
        if self.job.wanted.stream and len(text) > len(self.told) and text.startswith(self.told):
            self.job.tell(Delta(text[len(self.told) :]))
            self.told = text


def embeds_part(features: Tensor) -> dict[str, str]:
    """Return the part of a message that holds an image's features (K, D): base64 of a ``.npy`` file."""
    numbers = features.detach().cpu()
    if numbers.dtype == torch.bfloat16:  # which .npy has not; float32 holds it exactly
        numbers = numbers.float()
    file = io.BytesIO()
    np.save(file, numbers.numpy(), allow_pickle=False)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode()}
