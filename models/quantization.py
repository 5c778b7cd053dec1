"""Bases in 4 or 8 bits through bitsandbytes: the LLM alone, so that what is chosen and what is tuned stay as stored."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunetune.models.errors import CheckpointError
from prunetune.pruning.families import family_of


def check_quantization(quantization: str | None) -> None:
    """Check that weights can be quantised here, before anything is loaded.

    Raises:
        CheckpointError: without a GPU, or without bitsandbytes.
    """
    if quantization is None:
        return
    if not torch.cuda.is_available():
        raise CheckpointError(
            f"model.quantization {quantization} needs an NVIDIA GPU, and there is none; leave it out, which loads the "
            "weights in model.dtype"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(
            f"model.quantization {quantization} needs bitsandbytes; pip install 'prunetune[quant]', or leave it out"
        )


def quantization_config(folder: Path, quantization: str, dtype: str) -> QuantizationConfigMixin:
    """Return what makes transformers quantise the linear layers of the LLM while it loads a checkpoint.

    The projector stays as it is stored, for it is trained and exchanged. So does the vision tower: pruners read its
    attention from the weights themselves, and other weights would choose other tokens. The output layer stays because
    its rounding is what answers are read from.

    Args:
        folder: of the checkpoint; its configuration alone is read.
        quantization: "4bit" (NF4, with quantised constants) or "8bit" (LLM.int8).
        dtype: of the products.

    Raises:
        PruningError: if no family covers the model.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    family = family_of(model)
    whole = [*family.frozen_parts(model), *(model.base_model.get_submodule(name) for name in family.projectors)]
    output = model.get_output_embeddings()
    if output is not None:
        whole.append(output)
    kept = {id(module) for module in whole}
    skipped = [name for name, module in model.named_modules() if id(module) in kept]
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=skipped,
    )
