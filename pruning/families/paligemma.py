"""PaliGemma: one token per patch, a prefix that sees itself both ways, and positions that begin at 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.llava import Llava


class PaliGemma(Llava):
    """Images as Llava has them.

    ``token_type_ids`` are 0 in the prefix (images and prompt), whose tokens see each other both ways, and 1 in the
    suffix; they are cut with the sequence.
    """

    name = "paligemma"
    model_types = ("paligemma",)
    projects_tokens = False
    aligned: ClassVar[Mapping[str, int]] = {"token_type_ids": 0}
    unread = ("mm_token_type_ids",)
    one_tensor = ("image",)
    first_position = 1
    causal = False
    sees_both_ways = True


register_family(PaliGemma())
