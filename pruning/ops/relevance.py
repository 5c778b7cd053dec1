"""How relevant visual tokens are to the instruction."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.ops.statistics import masked_mean, text_mask
from prunetune.pruning.types import VisualTokens


def instruction_relevance(tokens: VisualTokens, text: str = "clip") -> Float[Tensor, "B N"]:
    """Return the cosine (B, N) of every visual token with the instruction, float32.

    Args:
        tokens: ``image_embeds`` and ``text_embeds`` for "clip" (mean over the instruction's pieces); ``projected``
            and ``text_token_embeds`` for "llm" (with the mean token embedding).
        text: "clip" or "llm".
    """
    if text == "clip":
        pieces = tokens.finite("text_embeds")  # (B, M, E)
        similarity = cosine_similarity(tokens.finite("image_embeds"), pieces)  # (B, N, M)
        return masked_mean(similarity, text_mask(pieces))
    words = tokens.finite("text_token_embeds")  # (B, M, D)
    mean = masked_mean(words.transpose(1, 2), text_mask(words))[:, None]  # (B, 1, D)
    return cosine_similarity(tokens.finite("projected"), mean)[..., 0]
