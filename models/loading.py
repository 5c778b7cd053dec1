"""Stock checkpoints: from a folder, a hub id or the package's own assets to a model and its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from prunetune.assets import shipped
from prunetune.models.errors import CheckpointError as CheckpointError
from prunetune.pruning.quiet import no_progress_bar

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
            f"model {path!r} is neither a folder nor a checkpoint that could be fetched: {error}"
        ) from error


def load_model(
    path: str, revision: str | None = None, dtype: str = "float32", attention: str = "sdpa"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a stock model in eval mode and its processor.

    Args:
        path: folder or hub id.
        revision: hub revision.
        dtype: name of a torch dtype.
        attention: attention implementation of the LLM.

    Raises:
        CheckpointError: if the model can't be loaded.
    """
    folder = checkpoint_folder(path, revision)
    try:
        with no_progress_bar():
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation=attention
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path!r} is no vision-language checkpoint that transformers can load: {_line(error)}"
        ) from error
    return model.eval(), _processor(path, folder)


def load_processor(path: str, revision: str | None = None) -> ProcessorMixin:
    """Return a checkpoint's processor alone; raises CheckpointError if there is none."""
    return _processor(path, checkpoint_folder(path, revision))


def _processor(path: str, folder: Path) -> ProcessorMixin:
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # processors of models that see videos, also where only images are used
        needed = "torchvision; pip install 'prunetune[video]'" if "orchvision" in str(error) else _line(error)
        raise CheckpointError(f"the processor of {path!r} needs {needed}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path!r} holds no processor: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Return a library's message in one line."""
    return " ".join(str(error).split())
