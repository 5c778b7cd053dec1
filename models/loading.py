"""Stock checkpoints: from a folder, a hub id or the package's own assets to a model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from prunetune.assets import shipped
from prunetune.models.errors import CheckpointError as CheckpointError
from prunetune.models.quantization import check_quantization, quantization_config
from prunetune.pruning.quiet import no_progress_bar
from prunetune.reading import one_line

# A hub repository may hold the weights a second time, as pickles; those are left there. Its card says the licence.
CARRIED = "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"


def checkpoint_folder(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading a hub id if it is not cached.

    Raises:
        CheckpointError: if it is neither a folder nor reachable.
    """
    path = shipped(path)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(CARRIED)))
    # Anything from a wrong id to a broken cache or network; the user's way out is the same.
    except Exception as error:
        raise CheckpointError(
            f"model {path!r} is neither a folder nor a checkpoint that could be fetched: {one_line(error)}"
        ) from error


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    quantization: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a stock model in eval mode and its processor.

    Args:
        path: folder or hub id.
        revision: hub revision.
        dtype: name of a torch dtype.
        attention: attention implementation of the LLM.
        quantization: "4bit" or "8bit" for the LLM's weights; None loads them in ``dtype``.
        device: where quantised weights are put, since they can't be moved there later; others are on the CPU.

    Raises:
        CheckpointError: if the model can't be loaded, or not quantised here.
    """
    _check_attention(attention, dtype)
    check_quantization(quantization)
    folder = checkpoint_folder(path, revision)
    quantised: dict[str, Any] = {}
    try:
        if quantization is not None:
            config = quantization_config(folder, quantization, dtype)
            quantised = {"quantization_config": config, "device_map": {"": torch.device(device)}}
        with no_progress_bar():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                output_loading_info=True,
                **quantised,
            )
    except torch.OutOfMemoryError:  # nothing is wrong with the checkpoint
        raise
    except ImportError as error:
        asked = f"model.attention {attention}" if quantization is None else f"model.quantization {quantization}"
        raise CheckpointError(f"{path!r} can't be loaded with {asked}: {_line(error)}") from error
    # Anything: transformers passes on what its parts say of broken files, KeyError and RuntimeError among it.
    except Exception as error:
        raise CheckpointError(
            f"{path!r} is no vision-language checkpoint that transformers can load: {_line(error)}"
        ) from error
    model, info = loaded
    # transformers fills what is missing with random numbers, and says so in a log alone.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{path!r} lacks {len(missing)} of its weights, such as {missing[0]}; fetch it again")
    return model.eval(), _processor(path, folder)


def _check_attention(attention: str, dtype: str) -> None:
    """Check what can be told of an attention kernel before anything is loaded."""
    if attention != "flash_attention_2":
        return
    if not torch.cuda.is_available():
        raise CheckpointError("model.attention flash_attention_2 needs a GPU, and there is none; set it to sdpa")
    if dtype == "float32":
        raise CheckpointError(
            "model.attention flash_attention_2 computes in half precision alone, got model.dtype float32; "
            "set model.dtype to bfloat16, or model.attention to sdpa"
        )


def load_processor(path: str, revision: str | None = None) -> ProcessorMixin:
    """Return a checkpoint's processor alone; raises CheckpointError if there is none."""
    return _processor(path, checkpoint_folder(path, revision))


def _processor(path: str, folder: Path) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # processors of models that see videos, also where only images are used
        needed = "torchvision; pip install 'prunetune[video]'" if "orchvision" in str(error) else _line(error)
        raise CheckpointError(f"the processor of {path!r} needs {needed}") from error
    # Anything: the tokenizers' Rust side has errors without a kind of their own.
    except Exception as error:
        raise CheckpointError(f"{path!r} holds no processor: {_line(error)}") from error
    # Of a folder without a processor's own files transformers returns what there is.
    if not isinstance(processor, ProcessorMixin):
        raise CheckpointError(f"{path!r} holds no processor, only a {type(processor).__name__}")
    return processor


def _line(error: Exception) -> str:
    """Return a library's message in one line, with its kind where the message alone says little (``'model_type'``)."""
    line = one_line(error)
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
