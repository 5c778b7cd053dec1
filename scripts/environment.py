"""What ``prunetune env`` prints: everything that a bug report needs, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

from prunetune.errors import PrunetuneError
from prunetune.extras import absent

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "wandb",
    "pydantic",
    "numpy",
    "triton",
)

EXTRAS = ("data", "train", "eval", "plots")
"""What the README's commands use; all other extras are asked for by one thing each."""


def environment() -> str:
    """Return versions, devices, plug-ins and missing parts, a line each."""
    lines = [
        f"prunetune     {_version('prunetune')}",
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    lines += [f"{name:<13} {_version(name)}" for name in LIBRARIES]
    lines += _devices()
    lines += _plugins()
    lines += [f"missing       {what}" for what in _missing()]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    lines = [f"cpu           {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"gpu {index}         {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append(f"gpu           none (torch {torch.__version__}, built for CUDA {torch.version.cuda or 'no'})")
    return lines


def _plugins() -> list[str]:
    from prunetune.plugins import load_installed, loaded_plugins

    try:
        load_installed()
    except PrunetuneError as error:
        return [f"plug-in       {error}"]
    return [f"plug-in       {plugin.name} {plugin.version or ''} {plugin.sha256[:12]}" for plugin in loaded_plugins()]


def _missing() -> list[str]:
    """Return what is not there, and what for."""
    import torch

    found = [f"{', '.join(names)}: pip install 'prunetune[{extra}]'" for extra in EXTRAS if (names := absent(extra))]
    if shutil.which("ninja") is None:
        found.append("ninja: DeepSpeed compiles its CPU optimizer with it")
    if shutil.which("java") is None:
        found.append("java: CIDEr and BLEU of captions are tokenized with it")
    if _version("pycocoevalcap") == "not installed":
        found.append("pycocoevalcap: captions; pip install 'prunetune[captions]'")
    if torch.cuda.is_available() and _version("flash-attn") == "not installed":
        found.append("flash-attn: attention: flash_attention_2; pip install 'prunetune[speed]'")
    if torch.cuda.is_available() and _version("triton") == "not installed":
        found.append("triton: the greedy loops of diverse methods run step by step without it")
    return found
