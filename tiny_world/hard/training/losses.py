"""Losses of the hard VLM's training: patch labels, alignment, answers, and where answers are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from prunetune.tiny_world.hard.training.batches import IGNORE, PATCH_LABELS, HardBatch, HardQuestions
from prunetune.tiny_world.hard.training.llama import read_questions

READING_LAYERS = (2, 3)
"""The layers, from 0, of which heads 0 and 1 are told where to look."""
TOKEN_SCALE = 0.5
"""A visual token is this times the sum of the directions of its words: about as long as a word's embedding."""
EMPTY_LENGTH = 0.3


class PatchHeads(nn.Module):
    """Linear read-outs of what each patch shows; used in training only and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name, classes in PATCH_LABELS.items():
            self.heads[name] = nn.Linear(width, classes)

    def loss(self, features: Tensor, batch: HardBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted cross-entropy (background counts 0.3) and the accuracy on what is shown, in percent."""
        shown = batch.labels["form"] > 0
        # Most patches are background, which should not decide what the heads learn.
        weight = torch.where(shown, 1.0, 0.3)
        total, accuracy = features.new_zeros(()), {}
        for name, head in self.heads.items():
            target = batch.labels[name]
            logits = head(features).float()  # (B, 144, classes)
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            total = total + (each * weight.flatten()).sum() / weight.sum()
            right = (logits.argmax(-1) == target)[target > 0]
            accuracy[name] = 100 * right.float().mean().item()
        return total, accuracy


def tower_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Return the patch features that enter the projector, (B, 144, C): the second-last layer's, without [CLS].

    The last layer is CLIP's alone and is not computed.
    """
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


def word_sums(llava: LlavaForConditionalGeneration, words: Tensor, apart: Tensor | None = None) -> Tensor:
    """Return the ideal visual tokens (B, N, D) of patches that show ``words`` (B, N, V); empty patches are 0.

    Words of one class grow alike, as a language model has them follow the same words. With ``apart`` (V, V), of
    :meth:`HardWords.apart`, what a class shares is taken out first, and a token tells its words from their like.
    """
    embedding = llava.lm_head.weight.detach().float()  # the words' own, for they are tied
    if apart is not None:
        embedding = apart @ embedding
    return TOKEN_SCALE * (words @ F.normalize(embedding, dim=-1))


def alignment_loss(projected: Tensor, ideal: Tensor) -> tuple[Tensor, Tensor]:
    """Compare visual tokens with their ideals (B, N, D), length and all.

    Returns:
        The squared distance over the squared length of the ideal, on shown patches, plus a tenth of the squared length
        of empty ones; and the mean cosine on shown patches.
    """
    shown = ideal.norm(dim=-1) > 0  # (B, N)
    tokens, wanted = projected[shown].float(), ideal[shown]
    distance = (tokens - wanted).square().sum(-1) / wanted.square().sum(-1)
    empty = projected[~shown].float().square().sum(-1).mean()
    return distance.mean() + 0.1 * empty, F.cosine_similarity(tokens, wanted, dim=-1).mean()


def answer_loss(
    llava: LlavaForConditionalGeneration, visual: Tensor, kept: Tensor | None, prefix: Tensor, asked: HardQuestions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Answer all questions about visual tokens (B, N, D) of which ``kept`` (B, K), indices in order, remain.

    Returns:
        Logits (M, V) and targets (M,) of all answer tokens, the loss of reading, and the mean attention on the right
        places.
    """
    embed = llava.get_input_embeddings()
    if kept is not None:
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
    user = embed(prefix).expand(len(visual), -1, -1)  # `<s>` USER :
    hidden, weights = read_questions(
        llava.model.language_model,
        torch.cat([user, visual.to(user.dtype)], dim=1),
        embed(asked.ids[..., :-1]),
        READING_LAYERS,
    )
    targets = asked.labels[..., 1:]
    scored = targets != IGNORE
    logits = llava.lm_head(hidden[scored]).float()
    reading, mass = reading_loss(weights, kept, len(prefix), asked)
    return logits, targets[scored], reading, mass


def reading_loss(
    weights: dict[int, Tensor], kept: Tensor | None, skipped: int, asked: HardQuestions
) -> tuple[Tensor, Tensor]:
    """Return -log of the attention on the right places, and that attention's mean where a look-up is supervised.

    Args:
        weights: attention (B, H, Q, T, P) by layer.
        kept: indices (B, K) of the patches that are left, or None for all.
        skipped: tokens before the visual ones, `<s>` the first.
        asked: the questions with what to look at.
    """
    scene, question, position = asked.places.unbind(1)
    readers = [(READING_LAYERS[0], 0), (READING_LAYERS[0], 1), (READING_LAYERS[1], 0), (READING_LAYERS[1], 1)]
    total, terms = asked.sets.new_zeros(()), 0
    masses = []
    for layer, head in readers:
        wanted = asked.sets[head if layer == READING_LAYERS[0] else 2]  # (M, 145)
        sink, patches = wanted[:, :1], wanted[:, 1:]
        if kept is not None:
            patches = patches.gather(1, kept[scene])
        wanted = torch.cat([sink, patches], dim=1)
        there = wanted.sum(1) > 0  # what was dropped cannot be looked at
        seen = weights[layer][scene, head, question, position]  # (M, P)
        seen = torch.cat([seen[:, :1], seen[:, skipped:]], dim=1)[there]
        wanted, even = wanted[there], asked.even[there]
        mass = (seen * wanted).sum(1)
        each = -(seen + 1e-6).log() * wanted / wanted.sum(1, keepdim=True)
        # Equal shares: cross-entropy, less what it is at its best, so that many objects do not weigh more.
        shares = each.sum(1) - wanted.sum(1).log()
        total = total + torch.where(even, shares, -(mass + 1e-6).log()).sum()
        terms += len(mass)
        masses.append(mass[~even].detach())
    return total / max(terms, 1), torch.cat(masses).mean()
