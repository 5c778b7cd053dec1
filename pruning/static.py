"""Generation into a cache of one size, so that the steps behind the prompts can be compiled."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig, PreTrainedModel

from prunetune.pruning.errors import PruningError, not_in
from prunetune.pruning.families.base import Family

_ROUND = 128
"""Tokens that the cache's length is rounded up to: each length is compiled for itself."""

_COMPILED = ("_compiled_call", "_last_compile_config")
"""Where a stock model keeps what it compiled."""


def check_static(model: PreTrainedModel, family: Family, has_stages: bool) -> None:
    """Check that a model generates the same into a cache of one size.

    Args:
        model: the stock model.
        family: its family.
        has_stages: whether it prunes inside the LLM.

    Raises:
        PruningError: in one line, with what stands in the way.
    """
    if has_stages:
        raise not_in("static", "can't run pruning.stages: its cache's layers have one length")
    if family.unproven:
        raise PruningError(
            f"model_type {model.config.model_type!r} has no family of its own, and nobody has looked whether it "
            "answers the same from a static cache; set backend: plain"
        )
    options: Any = model.generation_config
    if getattr(options, "use_cache", True) is False:
        raise not_in("static", "needs a cache, and the model's generation has use_cache: False")
    kind = getattr(options, "cache_implementation", None)
    if kind not in (None, "dynamic", "hybrid", "static"):
        raise PruningError(f"backend: static, and the model's generation asks for a {kind!r} cache; set backend: plain")
    if getattr(options, "prompt_lookup_num_tokens", None) is not None:
        raise not_in("static", "can't look answers up in prompts (prompt_lookup_num_tokens)")


def static_options(model: PreTrainedModel, length: int, compiled: bool) -> dict[str, Any]:
    """Return the options of stock generation.

    Args:
        model: the stock model.
        length: of prompts and answers, in tokens.
        compiled: whether steps are compiled.
    """
    # Stock generation makes every cache as long as the longest before it: a run that goes on, or an arm behind others,
    # would round otherwise than one alone.
    vars(model).pop("_previous_max_cache_length", None)
    options: dict[str, Any] = {"cache_implementation": "static", "max_cache_len": -(-length // _ROUND) * _ROUND}
    if not compiled:
        return {**options, "disable_compile": True}
    if model.device.type == "cpu":
        config = CompileConfig(mode="default")
        config._compile_all_devices = True  # type: ignore[assignment] # stock generation compiles on GPUs alone
        options["compile_config"] = config
    return options


def forget_compiled(model: PreTrainedModel) -> None:
    """Let go of what stock generation compiled: a copy of the model would go on calling the original's."""
    for name in (*_COMPILED, "_previous_max_cache_length"):
        vars(model).pop(name, None)
