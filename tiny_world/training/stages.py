"""The five training stages of the tiny VLM, in order; each says what trains, for how long, and on which loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from prunetune.tiny_world import ask, drill
from prunetune.tiny_world.training.batches import IGNORE, SceneBatch, captions, question_batch, scene_batch
from prunetune.tiny_world.training.losses import (
    PatchHeads,
    alignment_loss,
    answer_logits,
    contrastive_loss,
    tower_features,
)
from prunetune.tiny_world.training.model import build_clip, build_llava, build_tokenizer


@dataclass(frozen=True)
class Stage:
    """One stage: ``tower_lr`` and ``lr`` are peak rates; below 1, ``keep_low`` drops tokens, keep share U(low, 1)."""

    name: str
    steps: int
    lr: float
    tower_lr: float = 0.0
    batch: int = 32
    align: tuple[float, float] = (0.0, 0.0)
    keep_low: float = 1.0
    warmup: int = 80


STAGES = (
    Stage("tower", 1000, lr=1.5e-3, tower_lr=1.5e-3),
    Stage("connect", 1300, lr=1.5e-3, align=(0.5, 0.1)),
    Stage("unfreeze", 500, lr=1.0e-3, tower_lr=4e-4, align=(0.1, 0.0)),
    Stage("keep_rate", 850, lr=1.0e-3, tower_lr=3e-4, keep_low=0.5),
    Stage("ground", 200, lr=1.0e-3),
)


class TinyModels(nn.Module):
    """Everything that trains. CLIP owns the vision tower; Llava's copy is filled from it when weights are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.clip: CLIPModel = build_clip(len(self.tokenizer))
        self.llava: LlavaForConditionalGeneration = build_llava(len(self.tokenizer))
        self.heads = PatchHeads(self.clip.vision_embed_dim)
        self.llava.model.vision_tower = self.clip.vision_model  # one tower, two readers

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenize captions for CLIP, ``<s> words </s>``, padded."""
        marked = [f"<s> {text} </s>" for text in texts]
        return dict(self.tokenizer(marked, padding=True, return_tensors="pt", return_token_type_ids=False))


def trained_parameters(models: TinyModels, stage: Stage) -> list[dict]:
    """Return optimizer groups ``tower`` and ``rest`` with exactly what the stage trains."""
    tower, clip, llava = models.clip.vision_model, models.clip, models.llava
    language = [*llava.model.multi_modal_projector.parameters(), *llava.model.language_model.parameters()]
    text = [
        *clip.text_model.parameters(),
        *clip.text_projection.parameters(),
        *clip.visual_projection.parameters(),
        clip.logit_scale,
    ]
    # The last layer is CLIP's alone, for Llava reads the layer before it: "ground" can train it and change no answer.
    last = [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]
    of_last = {id(parameter) for parameter in last}
    seeing: list[nn.Parameter] = []
    if stage.name == "tower":
        seeing = list(tower.parameters())
        rest = [*text, *models.heads.parameters()]
    elif stage.name == "ground":
        rest = [*text, *last]
    else:
        seeing = [parameter for parameter in tower.parameters() if id(parameter) not in of_last]
        rest = language
    groups = [{"params": rest, "lr": stage.lr}]
    if seeing and stage.tower_lr:
        groups.insert(0, {"params": seeing, "lr": stage.tower_lr})
    return groups


def stage_loss(models: TinyModels, stage: Stage, seeds: range, progress: float) -> tuple[Tensor, dict[str, float]]:
    """Return the stage's loss on the scenes ``seeds`` and the numbers worth printing; ``progress`` runs from 0 to 1."""
    batch = scene_batch(seeds, models.tokenizer)
    # Chance follows from the scenes, so that a resumed run draws what it would have drawn.
    rng = np.random.default_rng([seeds.start, 3])
    if stage.name in ("tower", "ground"):
        return _seeing_loss(models, stage, batch, rng)
    train_tower = stage.tower_lr > 0  # without it no graph of the tower is kept
    with torch.set_grad_enabled(train_tower):
        features = tower_features(models.clip.vision_model, batch.pixels)
    visual = models.llava.model.multi_modal_projector(features)
    kept = None
    if stage.keep_low < 1:  # tokens are dropped at random, so that the VLM has seen images with gaps before any pruner
        rates = rng.uniform(stage.keep_low, 1, (len(batch.scenes), 1))
        kept = torch.from_numpy(_random_ranks(rng, visual) < rates * visual.shape[1])
    questions = question_batch([drill(scene) for scene in batch.scenes], models.tokenizer)
    logits, targets = answer_logits(models.llava, visual, kept, questions)
    loss = nn.functional.cross_entropy(logits, targets)
    right = (logits.argmax(-1) == targets).float().mean()
    seen = {"answer": loss.item(), "right": right.item()}
    first, last = stage.align
    weight = first + (last - first) * progress
    if weight > 0:
        align = alignment_loss(visual, models.llava.lm_head.weight, batch)
        loss, seen["align"] = loss + weight * align, align.item()
    return loss, seen


def _random_ranks(rng: np.random.Generator, visual: Tensor) -> np.ndarray:
    """Return for each token (B, N) its rank in a random order."""
    chance = rng.random(visual.shape[:2])
    return chance.argsort(1).argsort(1)


def _seeing_loss(
    models: TinyModels, stage: Stage, batch: SceneBatch, rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    out = models.clip.vision_model(pixel_values=batch.pixels, output_hidden_states=True)
    full, phrases, true = captions(batch.scenes, rng)
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
    features = out.hidden_states[-2][:, 1:]
    patches, accuracy = models.heads.loss(features, batch)
    return patches + 0.3 * contrast, {"contrast": contrast.item(), **accuracy}


@torch.no_grad()
def dense_accuracy(models: TinyModels, batches: Iterator[range], kept_share: float = 1.0) -> dict[str, float]:
    """Return exact-match accuracy per question kind, in percent; a random share of tokens is kept.

    An answer counts when every one of its tokens is the most likely one, which is what greedy decoding gives.
    """
    right: dict[str, list[bool]] = {}
    for seeds in batches:
        batch = scene_batch(seeds, models.tokenizer)
        features = tower_features(models.clip.vision_model, batch.pixels)
        visual = models.llava.model.multi_modal_projector(features)
        questions = question_batch([ask(scene) for scene in batch.scenes], models.tokenizer)
        ranks = _random_ranks(np.random.default_rng([seeds.start, 4]), visual)  # (B, N)
        kept = torch.from_numpy(ranks < round(kept_share * visual.shape[1]))
        logits, targets = answer_logits(models.llava, visual, kept, questions)
        misses_of = torch.zeros(questions.labels.shape[:2], dtype=torch.long)  # (B, Q)
        asked = questions.labels[:, :, 1:] != IGNORE  # (B, Q, T - 1)
        scene_of, question_of, _ = asked.nonzero().unbind(dim=1)
        missed = logits.argmax(-1) != targets
        misses_of.index_put_((scene_of, question_of), missed.long(), accumulate=True)
        for scene, row in zip(batch.scenes, misses_of.tolist(), strict=True):
            for question, misses in zip(ask(scene), row, strict=True):
                right.setdefault(question.kind, []).append(misses == 0)
    every: list[bool] = []
    for hits in right.values():
        every += hits
    accuracy = {"all": 100 * float(np.mean(every))}
    for kind, hits in sorted(right.items()):
        accuracy[kind] = 100 * float(np.mean(hits))
    return accuracy
