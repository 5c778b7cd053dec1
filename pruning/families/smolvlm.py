"""SmolVLM: as Idefics3; the frames of a video are images."""

from __future__ import annotations

from prunetune.pruning.families.base import register_family
from prunetune.pruning.families.idefics import Idefics


class SmolVLM(Idefics):
    """A video's frames are ``pixel_values`` of their sample, in the order of the prompt; so each is an item."""

    name = "smolvlm"
    model_types = ("smolvlm",)
    frames_are_images = True


register_family(SmolVLM())
