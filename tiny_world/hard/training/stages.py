"""The training stages of the hard VLM, in order; each says what trains, for how long, and on which loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from prunetune.tiny_world.hard.questions import ask_hard, drill_hard
from prunetune.tiny_world.hard.scene import PATCHES
from prunetune.tiny_world.hard.training.batches import (
    IGNORE,
    HardBatch,
    HardWords,
    hard_batch,
    hard_captions,
    question_tensors,
)
from prunetune.tiny_world.hard.training.losses import (
    EMPTY_LENGTH,
    PatchHeads,
    alignment_loss,
    answer_loss,
    tower_features,
    word_sums,
)
from prunetune.tiny_world.hard.training.model import WIDTH, hard_clip, hard_llava, hard_tokenizer
from prunetune.tiny_world.training.losses import contrastive_loss

WITHOUT_PICTURES = ("words", "places")
"""Stages of the LLM alone, on ideal visual tokens."""

# Weights of what is learned last, against 1 for all others of the 19 kinds: more than half of the questions are still
# from the full mix, for a mix without the easy kinds forgets them.
HARD_KINDS = {"rel": 3.0, "next": 3.0, "count_color": 2.5, "count_shape": 2.5, "count_all": 2.5}
PLACE_KINDS = {"where1": 2.0, "where2": 3.0, "where3": 4.0, "describe": 3.0, "rel": 3.0, "next": 3.0}
JOINED_KINDS = {
    "rel": 3.0,
    "next": 3.0,
    "describe": 5.0,
    "where2": 2.0,
    "where3": 2.0,
    "count_color": 2.0,
    "count_shape": 2.0,
    "count_all": 2.0,
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: which one.
        steps: how many batches.
        horizon: the step that the schedules of rates and weights end at, if the stage stops before it; 0 is its end.
        muon: peak rate of Muon, which moves the matrices.
        adam: peak rate of AdamW, which moves the rest.
        tower: factor on both rates for the vision tower; 0 leaves it alone.
        batch: scenes per step.
        questions: per scene.
        align: weight of the alignment, at the start and at the end.
        reading: weight of supervised reading at the start; it falls to 0 by ``reading_until``, a share of the stage.
        keep_low: below 1, tokens are dropped at random: each step keeps a share U(low, 1).
        weights: of kinds of questions, from ``weights_from``, a share of the stage, on; 1 for all others.
        gate: what has to be reached on the validation scenes before the next stage starts, by name.
        seeds_from: the first scene of the pretrain range.
        apart: visual tokens tell a word from its like (``word_sums``), and the embeddings of words stay as they are.
    """

    name: str
    steps: int
    horizon: int = 0
    muon: float = 0.0
    adam: float = 1e-3
    tower: float = 0.0
    batch: int = 16
    questions: int = 12
    warmup: int = 40
    align: tuple[float, float] = (0.0, 0.0)
    reading: float = 0.0
    reading_until: float = 1.0
    keep_low: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)
    weights_from: float = 0.0
    gate: dict[str, float] = field(default_factory=dict)
    seeds_from: int = 0
    apart: bool = True

    def progress(self, step: int) -> float:
        """Return where in its schedules the stage is, from 0 to 1."""
        return step / (self.horizon or self.steps)

    def scaled(self, scale: float) -> Stage:
        """Return the stage with a share of its steps, for a quick trial."""
        return replace(self, steps=max(2, round(self.steps * scale)), horizon=round(self.horizon * scale))


STAGES = (
    Stage(
        "tower", 600, horizon=800, muon=5e-3, adam=2e-3, tower=1.0, batch=24, seeds_from=0,
        gate={"form": 95, "color": 99, "digit": 90, "row": 95, "column": 95, "middle": 90},
    ),
    Stage(
        "words", 1500, horizon=2500, muon=6e-3, adam=2e-3, seeds_from=1_000_000, reading=0.4, reading_until=0.6,
        weights=HARD_KINDS, weights_from=0.25, apart=False,
    ),
    Stage(
        "places", 350, muon=4e-3, adam=1e-3, seeds_from=1_500_000, reading=0.4, reading_until=0.7,
        weights=PLACE_KINDS, gate={"lookups": 80},
    ),
    Stage("align", 200, muon=5e-3, adam=2e-3, seeds_from=2_000_000, gate={"cosine": 85}),
    Stage(
        "connect", 500, muon=3e-3, adam=5e-4, batch=12, questions=20, seeds_from=3_000_000, align=(0.3, 0.0),
        reading=0.3, reading_until=0.7, weights=JOINED_KINDS,
    ),
    Stage(
        "keep_rate", 500, muon=2e-3, adam=5e-4, tower=0.2, batch=12, questions=20, seeds_from=4_000_000,
        keep_low=0.35, weights=JOINED_KINDS,
    ),
    Stage("ground", 100, muon=3e-3, adam=1e-3, batch=32, seeds_from=6_000_000),
)  # fmt: skip


class HardModels(nn.Module):
    """Everything that trains. CLIP owns the vision tower; Llava's is the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = hard_tokenizer()
        self.words = HardWords(self.tokenizer.get_vocab())
        self.clip: CLIPModel = hard_clip(len(self.tokenizer))
        self.llava: LlavaForConditionalGeneration = hard_llava(len(self.tokenizer))
        self.heads = PatchHeads(WIDTH)
        self.llava.model.vision_tower = self.clip.vision_model  # one tower, two readers

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenize captions for CLIP, ``<s> words </s>``, padded."""
        marked = [f"<s> {text} </s>" for text in texts]
        return dict(self.tokenizer(marked, padding=True, return_tensors="pt", return_token_type_ids=False))


def trained(models: HardModels, stage: Stage) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return what the stage trains, named, in the groups ``tower`` and ``rest``."""
    named = dict(models.named_parameters())  # the shared tower once, under the name it has in clip
    tower, last, text, heads, projector, language = [], [], [], [], [], []
    for name, parameter in named.items():
        entry = (name, parameter)
        if name.startswith("heads."):
            heads.append(entry)
        elif name.startswith("llava.model.multi_modal_projector"):
            projector.append(entry)
        elif "embed_tokens" in name and stage.apart:
            continue
        elif name.startswith("llava."):
            language.append(entry)
        elif "vision_model.encoder.layers.4." in name or "post_layernorm" in name:
            last.append(entry)  # CLIP's alone, for Llava reads the layer before it
        elif name.startswith("clip.vision_model."):
            tower.append(entry)
        else:
            text.append(entry)
    groups = {
        "tower": {"tower": tower + last, "rest": text + heads},
        "words": {"tower": [], "rest": language},
        "places": {"tower": [], "rest": language},
        "align": {"tower": [], "rest": projector},
        "ground": {"tower": [], "rest": text + last},
    }
    joined = {"tower": tower if stage.tower else [], "rest": projector + language}
    return groups.get(stage.name, joined)


def stage_loss(models: HardModels, stage: Stage, seeds: range, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Return the stage's loss on scenes ``seeds`` and the numbers worth printing; ``progress`` runs from 0 to 1."""
    # Chance follows from the scenes, so that a resumed run draws what it would have drawn.
    rng = np.random.default_rng([seeds.start, 3])
    batch = hard_batch(seeds, models.words, pixels=stage.name not in WITHOUT_PICTURES)
    if stage.name in ("tower", "ground"):
        return _seeing_loss(models, stage, batch, rng)
    ideal = word_sums(models.llava, batch.words, models.words.apart() if stage.apart else None)
    if stage.name in WITHOUT_PICTURES:
        visual, kept = _word_tokens(ideal, rng)
    else:
        visual, kept = _projected(models, batch, stage.tower > 0), None
    if stage.name == "align":
        loss, cosine = alignment_loss(visual, ideal)
        return loss, {"align": loss.item(), "cosine": 100 * cosine.item()}
    if stage.keep_low < 1:  # so that the VLM has seen images with gaps before any pruner
        kept = _random_kept(rng, len(seeds), round(PATCHES * rng.uniform(stage.keep_low, 1)))
    weights = stage.weights if progress >= stage.weights_from else {}
    posed = [drill_hard(scene, stage.questions, weights, rng) for scene in batch.scenes]
    asked = question_tensors(batch, posed, models.words)
    logits, targets, reading, mass = answer_loss(models.llava, visual, kept, models.words.prefix, asked)
    loss = F.cross_entropy(logits, targets)
    right = (logits.argmax(-1) == targets).float().mean()
    seen = {"answer": loss.item(), "right": 100 * right.item(), "mass": mass.item()}
    to_read = stage.reading * max(0.0, 1 - progress / stage.reading_until)
    if to_read > 0:
        loss = loss + to_read * reading
        seen["reading"] = reading.item()
    first, last = stage.align
    to_align = first + (last - first) * progress
    if to_align > 0:
        align, cosine = alignment_loss(visual, ideal)
        loss = loss + to_align * align
        seen["cosine"] = 100 * cosine.item()
    return loss, seen


def _projected(models: HardModels, batch: HardBatch, train_tower: bool) -> Tensor:
    """Return the visual tokens (B, 144, D) of the batch's pictures."""
    assert batch.pixels is not None
    with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):  # else no graph of the tower is kept
        features = tower_features(models.clip.vision_model, batch.pixels)
    return models.llava.model.multi_modal_projector(features)


def _random_kept(rng: np.random.Generator, count: int, kept: int) -> Tensor:
    """Return for each of ``count`` scenes random patches in order, (count, kept)."""
    order = rng.random((count, PATCHES)).argsort(1)[:, :kept]
    return torch.from_numpy(np.sort(order, axis=1))


def _word_tokens(ideal: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy ideal tokens (B, 144, D), and which patches remain: shown ones before empty ones.

    Most empty patches are left out, for they cost time and teach nothing; how many are left differs from step to step,
    so that no position means the end of the picture.
    """
    count, _, width = ideal.shape
    noise = torch.from_numpy(rng.standard_normal(ideal.shape, dtype=np.float32))
    strength = torch.from_numpy(rng.uniform(0, 0.06, (count, 1, 1)).astype(np.float32))
    shown = ideal.norm(dim=-1, keepdim=True) > 0
    tokens = ideal + noise * torch.where(shown, strength, EMPTY_LENGTH * width**-0.5)
    chance = rng.random((count, PATCHES)) + 1.0 * ~shown[..., 0].numpy()
    kept = chance.argsort(1)[:, : int(rng.choice([56, 64, 80, 112]))]
    return tokens, torch.from_numpy(np.sort(kept, axis=1))


def _seeing_loss(
    models: HardModels, stage: Stage, batch: HardBatch, rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    out = models.clip.vision_model(pixel_values=batch.pixels, output_hidden_states=True)
    full, phrases, true = hard_captions(batch.scenes, rng)
    contrast = contrastive_loss(
        models.clip,
        (out.pooler_output, out.hidden_states[-1][:, 1:]),
        models.tokens(full),
        models.tokens(phrases),
        true,
    )
    if stage.name == "ground":
        return contrast, {"contrast": contrast.item()}
    # The layer that enters the projector, without [CLS].
    patches, accuracy = models.heads.loss(out.hidden_states[-2][:, 1:], batch)
    return patches + 0.3 * contrast, {"contrast": contrast.item(), **accuracy}


@torch.no_grad()
def stage_accuracy(models: HardModels, stage: Stage, seeds: range, kept_share: float = 1.0) -> dict[str, float]:
    """Return what the stage is judged by on scenes ``seeds``, in percent: patch labels, a cosine, or answers.

    An answer counts when every one of its tokens is the most likely one, which is what greedy decoding gives. A random
    share of the tokens is kept. ``lookups`` leaves the kinds out that are learned last.
    """
    batch = hard_batch(seeds, models.words, pixels=stage.name not in WITHOUT_PICTURES)
    rng = np.random.default_rng([seeds.start, 4])
    if stage.name in ("tower", "ground"):
        _, seen = _seeing_loss(models, stage, batch, rng)
        return seen
    ideal = word_sums(models.llava, batch.words, models.words.apart() if stage.apart else None)
    kept = _random_kept(rng, len(seeds), round(PATCHES * kept_share)) if kept_share < 1 else None
    if stage.name in WITHOUT_PICTURES:
        visual, kept = _word_tokens(ideal, rng)
    else:
        visual = _projected(models, batch, train_tower=False)
    if stage.name == "align":
        return {"cosine": 100 * alignment_loss(visual, ideal)[1].item()}
    posed = [ask_hard(scene) for scene in batch.scenes]
    asked = question_tensors(batch, posed, models.words)
    logits, targets, _, _ = answer_loss(models.llava, visual, kept, models.words.prefix, asked)
    misses = torch.zeros(asked.labels.shape[:2], dtype=torch.long)  # (B, Q)
    scene_of, question_of, _ = (asked.labels[..., 1:] != IGNORE).nonzero().unbind(dim=1)
    misses.index_put_((scene_of, question_of), (logits.argmax(-1) != targets).long(), accumulate=True)
    right: dict[str, list[bool]] = {"all": [], "lookups": []}
    for questions, row in zip(posed, misses.tolist(), strict=True):
        for question, missed in zip(questions, row, strict=True):
            right["all"].append(missed == 0)
            if question.kind not in HARD_KINDS:
                right["lookups"].append(missed == 0)
            right.setdefault(question.kind, []).append(missed == 0)
    return {kind: 100 * float(np.mean(hits)) for kind, hits in right.items()}
