"""Teach the tiny VLM clips: its tower stays as it is, projector and LLM learn on features that are computed once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaNextVideoForConditionalGeneration, PreTrainedTokenizerFast

from prunetune.tiny_world.moving.clip import FRAMES, render_clip, sample_clip
from prunetune.tiny_world.moving.model import build_video_model, build_video_tokenizer
from prunetune.tiny_world.moving.questions import ask_clip
from prunetune.tiny_world.questions import Question
from prunetune.tiny_world.training.batches import IGNORE, question_batch
from prunetune.tiny_world.training.losses import answer_logits, tower_features

BATCH = 32
RATE = 1e-3
WHOLE = 0.4
"""Share of the steps that see whole clips; then each clip keeps a random share of 0.5 to 1 of its tokens."""
TRAINING, VALIDATION, TEST = 0, 10_000_000, 30_000_000
"""First clip of each split; what is trained on ends long before the next."""


def train_video_vlm(
    base: Path, output: Path, clips: int = 4000, steps: int = 900, validation: int = 200, seed: int = 0
) -> None:
    """Train the video model from the tiny VLM in ``base`` and write model, tokenizer and log to ``output``.

    Args:
        base: folder of the tiny VLM.
        output: made if there is none.
        clips: how many are drawn, of the training split.
        steps: of 32 clips with their six questions.
        validation: how many clips it is tried on at the end.
        seed: of new words' weights, of the order of clips and of which tokens are dropped.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = build_video_tokenizer()
    model = build_video_model(base, tokenizer)
    began = time.monotonic()
    seeds = range(TRAINING, TRAINING + clips)
    features = clip_features(model, seeds)
    questions = [ask_clip(sample_clip(number)) for number in seeds]
    _log(output, {"features of clips": clips, "minutes": round((time.monotonic() - began) / 60, 1)})
    model.requires_grad_(False)
    trained = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * _schedule(step, steps)
        chosen = torch.randint(0, clips, (BATCH,), generator=generator)
        asked = [questions[number] for number in chosen.tolist()]
        shares = torch.ones(BATCH, 1)
        if step >= WHOLE * steps:  # so that it has seen clips with gaps before any pruner
            shares = 0.5 + 0.5 * torch.rand(BATCH, 1, generator=generator)
        kept = _random_kept(shares, features.shape[1], generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            visual = model.model.multi_modal_projector(features[chosen].float())
            logits, targets = answer_logits(model, visual, kept, question_batch(asked, tokenizer))
            loss = nn.functional.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            _log(output, {"step": step + 1, "of": steps, "loss": round(loss.item(), 4),
                          "minutes": round((time.monotonic() - began) / 60, 1)})  # fmt: skip
    held_out = range(VALIDATION, VALIDATION + validation)
    bank = clip_features(model, held_out)
    for share in (1.0, 0.5, 0.25):
        right = accuracy(model, tokenizer, held_out, bank, share)
        _log(output, {"validation_keep": share, **right})
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.no_grad()
def clip_features(model: LlavaNextVideoForConditionalGeneration, seeds: Sequence[int]) -> Tensor:
    """Return what enters the projector, (clips, 4 * 36, C) float16: the tower's patches, pooled two by two."""
    bank = []
    for start in range(0, len(seeds), 16):
        frames = np.concatenate([render_clip(sample_clip(seed)) for seed in seeds[start : start + 16]])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            patches = tower_features(model.model.vision_tower, pixels)
        pooled = model.model.vision_resampler(patches.float())  # (clips * 4, 36, C)
        bank.append(pooled.unflatten(0, (-1, FRAMES)).flatten(1, 2).half())
    return torch.cat(bank)


@torch.no_grad()
def accuracy(
    model: LlavaNextVideoForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    seeds: Sequence[int],
    features: Tensor,
    share: float,
) -> dict[str, float]:
    """Return exact-match accuracy in percent per kind of question, and of all; a random share of tokens is kept."""
    right: dict[str, list[bool]] = {}
    generator = torch.Generator().manual_seed(4)
    for start in range(0, len(seeds), 50):
        own = seeds[start : start + 50]
        asked = [ask_clip(sample_clip(seed)) for seed in own]
        visual = model.model.multi_modal_projector(features[start : start + 50].float())
        kept = _random_kept(torch.full((len(own), 1), share), visual.shape[1], generator)
        batch = question_batch(asked, tokenizer)
        logits, targets = answer_logits(model, visual, kept, batch)
        misses = torch.zeros(batch.labels.shape[:2], dtype=torch.long)  # (clips, questions)
        clip_of, question_of, _ = (batch.labels[:, :, 1:] != IGNORE).nonzero().unbind(dim=1)
        misses.index_put_((clip_of, question_of), (logits.argmax(-1) != targets).long(), accumulate=True)
        _count(right, asked, misses)
    found = {kind: round(100 * float(np.mean(hits)), 1) for kind, hits in right.items()}
    return {"all": round(float(np.mean(list(found.values()))), 1), **found}


def _count(right: dict[str, list[bool]], asked: list[list[Question]], misses: Tensor) -> None:
    for questions, row in zip(asked, misses.tolist(), strict=True):
        for question, missed in zip(questions, row, strict=True):
            right.setdefault(question.kind, []).append(missed == 0)


def _random_kept(shares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return which of ``count`` tokens each clip keeps at random, (B, count) boolean, for shares (B, 1)."""
    chance = torch.rand(len(shares), count, generator=generator)
    return chance.argsort(dim=1).argsort(dim=1) < (shares * count).round()


def _schedule(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / 80) * (0.03 + 0.97 * cosine)


def _log(folder: Path, row: dict) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    with (folder / "log.jsonl").open("a") as log:
        log.write(line + "\n")
