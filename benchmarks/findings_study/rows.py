"""Eight questions about one picture in one row: every question sees the picture and itself, not its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunetune.tiny_world.training.batches import IGNORE, QuestionBatch

NOWHERE = -1


@dataclass(frozen=True)
class Texts:
    """The questions of S scenes, those of a scene one behind another without padding between them.

    Attributes:
        ids: (S, T) tokens.
        question: (S, T) the question that each belongs to, ``NOWHERE`` for padding at the end.
        offset: (S, T) its place in the question.
        targets: (S, T) the token that is predicted from it, ``IGNORE`` where that is no part of an answer.
    """

    ids: Tensor
    question: Tensor
    offset: Tensor
    targets: Tensor

    def at(self, index: Tensor, trim: bool = True) -> Texts:
        """Return the texts of some scenes, as long as the longest of them."""
        question = self.question[index]
        length = int((question != NOWHERE).sum(1).max()) if trim else question.shape[1]
        return Texts(
            self.ids[index, :length], question[:, :length], self.offset[index, :length], self.targets[index, :length]
        )

    @property
    def is_text(self) -> Tensor:
        """(S, T), what is no padding."""
        return self.question != NOWHERE

    @property
    def is_asked(self) -> Tensor:
        """(S, T), from which a part of an answer is predicted."""
        return self.targets != IGNORE


def pack(asked: QuestionBatch, ends: bool) -> Texts:
    """Return questions (S, Q, T) side by side.

    Args:
        asked: the questions, padded each.
        ends: whether the last token of an answer, which predicts nothing, is there: its state may be compared.
    """
    length = (asked.ids != 0).sum(-1)  # (S, Q), id 0 is padding
    places = torch.arange(asked.ids.shape[2])
    there = places < (length - int(not ends))[..., None]  # (S, Q, T)
    following = torch.full_like(asked.labels, IGNORE)
    following[:, :, :-1] = asked.labels[:, :, 1:]
    number = torch.arange(asked.ids.shape[1])[None, :, None].expand_as(asked.ids)
    place = places.expand_as(asked.ids)
    longest = int(there.sum((1, 2)).max())
    texts = []
    for values, padding in ((asked.ids, 0), (number, NOWHERE), (place, 0), (following, IGNORE)):
        packed = torch.full((len(asked.ids), longest), padding)
        for scene, (own, mask) in enumerate(zip(values, there, strict=True)):
            kept = own[mask]
            packed[scene, : len(kept)] = kept
        texts.append(packed)
    return Texts(*texts)


@dataclass(frozen=True)
class Rows:
    """What the LLM reads.

    Attributes:
        embeds: (B, L, D) prefix, visual tokens and texts.
        mask: (B, 1, L, L) added to the scores: 0 for what a position sees.
        positions: (B, L), every question goes on where the picture ends.
        start: where the texts begin.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    start: int


def lay_out(embed: nn.Module, prefix: Tensor, visual: Tensor, texts: Texts) -> Rows:
    """Return rows of B pictures.

    Args:
        embed: the LLM's embedding.
        prefix: (P,) tokens before the picture.
        visual: (B, K, D) visual tokens.
        texts: (B, T).
    """
    batch, length = texts.ids.shape
    before = embed(prefix).expand(batch, -1, -1)
    embeds = torch.cat([before, visual, embed(texts.ids)], dim=1)
    start = before.shape[1] + visual.shape[1]
    sees = torch.ones(start + length, start + length, dtype=torch.bool).tril().repeat(batch, 1, 1)
    sees[:, start:, start:] &= texts.question[:, :, None] == texts.question[:, None, :]
    mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(start).expand(batch, -1), start + texts.offset], dim=1)
    return Rows(embeds, mask[:, None], positions, start)
