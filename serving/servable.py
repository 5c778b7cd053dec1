"""Which methods and families an engine can serve, and how: computed from what they say of themselves.

* ``embeds``: the front prunes, and a stock engine is given the kept, projected features. Any method, for its engine's
  placeholders are as many as the features are; families whose placeholders are numbered 0..n and seen causally, and
  that the engine takes features of.
* ``plugin``: the method runs inside the engine (:mod:`prunetune.serving.vllm_plugin`). How many tokens are kept is
  known before an image is seen, and nothing but the features is read.
* ``approximate``: the engine has a relative of the method, and gives other answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunetune.pruning.families.base import Family
    from prunetune.pruning.plug import PrunedModel
    from prunetune.pruning.registry import Method

TAKES_FEATURES = ("llava", "llava_next", "llava_onevision", "internvl")
"""Families of which vLLM 0.32 takes features of any number; llava was run, of the others its code was read."""
OPENVINO = ("cdpruner",)
"""Methods of which OpenVINO GenAI has a relative."""


def embeds_servable(family: type[Family] | Family) -> bool:
    """Return whether a stock engine can be given the kept features of a family's images."""
    plain = "compact" in family.position_policies and not family.counts_rows_and_columns
    return plain and not family.aligned and family.causal and family.name in TAKES_FEATURES


def method_servable(method: Method) -> list[str]:
    """Return how a method can be served with default options, of images; nothing for one of videos."""
    if method.video:
        return []
    ways = ["embeds"]
    if plugin_servable(method):
        ways.append("plugin")
    if method.name in OPENVINO:
        ways.append("approximate")
    return ways


def plugin_servable(method: Method) -> bool:
    """Return whether a method can run inside an engine with default options."""
    return method.servable and not method.merges and not method.needs and not method.video


def why_not_embeds(pruned: PrunedModel) -> str | None:
    """Return in one line why an engine can't be given an arm's features; None if it can."""
    family = pruned.family
    if not embeds_servable(family):
        return (
            f"model family {family.name!r} is not servable through features: its positions or attention follow more "
            f"than the number of tokens, or the engine takes none of it; families are {', '.join(TAKES_FEATURES)}. "
            "Use --engine embedded"
        )
    if pruned.position_policy != "compact":
        return (
            "engines number positions 0..n, and pruning.position_policy: original keeps those of the full sequence: "
            "answers would differ. Tune and serve with pruning.position_policy: compact, or use --engine embedded"
        )
    if pruned.stages is not None:
        return "pruning.stages run between the layers of the LLM, which an engine has for itself; use --engine embedded"
    return None
