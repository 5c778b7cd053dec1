"""Idefics3: tiles of an image, 169 tokens each, behind a SigLIP-like tower."""

from __future__ import annotations

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.idefics import Idefics


class Idefics3(Idefics):
    """The tiles of an image end with its global view."""

    name = "idefics3"
    model_types = ("idefics3",)


register_family(Idefics3())
