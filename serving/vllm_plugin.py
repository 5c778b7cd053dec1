"""Pruning inside vLLM: `vllm.general_plugins` registers LLaVA with a pruner between projector and LLM.

For methods that keep a known number of tokens, read the features alone and do not merge (``prunetune list pruners``:
plugin). The server is given pixels, as any client sends them, and what the configuration says:

    python -m vllm.entrypoints.openai.api_server --model DIR --hf-overrides '{"architectures":
        ["PrunedLlavaForConditionalGeneration"], "prunetune": {"pruner": "divprune", "keep": 16}}'

vLLM calls :func:`register` in each of its processes, so that it imports nothing; the class is named by its module.
Nothing here or behind it needs more of prunetune than ``pruning``.
"""

from __future__ import annotations

ARCHITECTURE = "PrunedLlavaForConditionalGeneration"
MODEL = f"prunetune.serving.vllm_model:{ARCHITECTURE}"


def register() -> None:
    """Tell vLLM where the class is; may be called again."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
