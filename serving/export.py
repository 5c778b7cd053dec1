"""`prunetune export --for ENGINE`: a merged checkpoint as an engine wants it, and what tells if it answers alike."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from prunetune.configs.serving import LimitsConfig
from prunetune.data_recipes.chat_templates import MODELS_OWN, template_text
from prunetune.models.arm import Arm
from prunetune.models.errors import CheckpointError
from prunetune.models.record import required
from prunetune.pruning import PruningSpec
from prunetune.pruning.budget import resolve_budget
from prunetune.reading import one_line
from prunetune.serving.backends.embedded import Embedded
from prunetune.serving.errors import ServingError
from prunetune.serving.references import answers, drawn, write_references
from prunetune.serving.servable import OPENVINO, why_not_embeds

QUESTIONS = 8
SCRIPT, CONFIG, RATIO = "serve.sh", "serve.yaml", "openvino.json"
_TOWER, _NAMED = "vision_tower.", "vision_tower.vision_model."
_WRAPPED = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights vLLM 0.32 looks for under ``vision_model``; transformers 5.23 writes new ones without it."""


class EngineExport(ABC):
    """What an engine's export has beside the merged checkpoint.

    Args:
        record: of the adapter.
        adapter: its folder, for messages.

    Raises:
        ServingError: if the engine can't serve what the projector was tuned for.
    """

    def __init__(self, record: Mapping[str, Any], adapter: str) -> None:
        self.record = record
        self.adapter = adapter
        try:
            self.spec = PruningSpec.model_validate(required(dict(record), "pruning", adapter))
        except ValidationError as error:
            raise CheckpointError(f"{adapter}: its pruning is of another version: {one_line(error)}") from None
        self.model: dict[str, Any] = record.get("model") or {}

    @abstractmethod
    def prepare(self, arm: Arm) -> None:
        """Compute what needs the loaded model, with the projector that is exported."""

    @abstractmethod
    def finish(self, folder: Path) -> None:
        """Add to the merged checkpoint in a folder."""

    @abstractmethod
    def words(self, output: Path) -> str:
        """Return what to do next."""


class VllmExport(EngineExport):
    """For a stock vLLM that is given features: template, tower names, a script, reference questions with answers."""

    def prepare(self, arm: Arm) -> None:
        """Answer the reference questions here, as the engine will have to."""
        tuned = arm.with_pruning(self.spec)
        why = why_not_embeds(tuned.pruned)
        if why is not None:
            raise ServingError(why)
        if self.model.get("tokens", "model") != "model":
            raise ServingError(
                f"{self.adapter} was tuned with model.tokens {self.model['tokens']}, whose prompts no engine's chat "
                "template gives; use `prunetune serve` with its own engine"
            )
        self.dtype = arm.base.config.dtype
        self.template = template_text(arm.processor, self.model.get("template", MODELS_OWN))
        self.references = drawn(QUESTIONS)
        own: Any = arm.processor
        before, own.chat_template = own.chat_template, self.template
        try:
            self.answers = [found.text for found in answers(Embedded(tuned, LimitsConfig()), self.references)]
        finally:
            own.chat_template = before

    def finish(self, folder: Path) -> None:
        """Rename the tower's weights, and write template, script, configuration and questions."""
        name_tower_as_engine_does(folder)
        (folder / "chat_template.jinja").write_text(self.template)
        written = write_references(folder, self.references, self.answers, self.spec.model_dump())
        (folder / SCRIPT).write_text(_script(self.dtype))
        (folder / SCRIPT).chmod(0o755)
        model = {"path": ".", "dtype": self.dtype}
        if self.model.get("square", "processor") != "processor":
            model["square"] = self.model["square"]
        config = {
            "model": model,
            "pruning": self.spec.model_dump(exclude_defaults=True),
            "engine": "vllm",
            "name": "model",
            "vllm": {"url": "http://127.0.0.1:8001", "questions": QUESTIONS, "references": written.name},
        }
        about = "# prunetune serve --config serve.yaml, in this folder, while serve.sh runs\n"
        (folder / CONFIG).write_text(about + yaml.safe_dump(config, sort_keys=False))

    def words(self, output: Path) -> str:
        """Return the two lines that start engine and front."""
        return (
            f"engine, in an environment that has vLLM: {output / SCRIPT}\n"
            f"front, beside it: cd {output} && prunetune serve --config {CONFIG}"
        )


class OpenVinoExport(EngineExport):
    """For OpenVINO GenAI, which has a relative of CDPruner: the merged checkpoint, and how much its pruner removes."""

    def __init__(self, record: Mapping[str, Any], adapter: str) -> None:
        super().__init__(record, adapter)
        name = self.spec.pruner
        if name not in OPENVINO:
            raise ServingError(
                f"OpenVINO GenAI prunes by a relative of {', '.join(OPENVINO)} alone and takes no features, and "
                f"{adapter} was tuned for {name}: its answers would be another method's; use --for vllm"
            )
        if self.spec.stages:
            raise ServingError("OpenVINO GenAI has no pruning.stages; use `prunetune serve`")

    def prepare(self, arm: Arm) -> None:
        """Find what share of the tokens is removed."""
        keep = self.spec.keep
        if isinstance(keep, int):
            family = arm.pruned.family
            if family.counts_rows_and_columns or family.item != "image":
                raise ServingError(
                    f"OpenVINO GenAI takes a percentage alone, and {self.adapter} was tuned for {keep} tokens of "
                    'images that have different numbers of them; tune with a share, such as pruning.keep: "11%"'
                )
            vision = arm.pruned.encode(family.blank(arm.model))
            kept = keep / vision["image"].groups[0].count
        else:
            kept = resolve_budget(keep, 1_000_000) / 1_000_000
        self.removed = round(100 * (1 - kept))

    def finish(self, folder: Path) -> None:
        """Write the percentage, and that answers are others."""
        said = {
            "servable": "approximate",
            "pruning_ratio": self.removed,
            "unit": "percent of the visual tokens that are removed",
            "tuned_for": self.spec.model_dump(exclude_defaults=True),
            "about": "OpenVINO's method is a relative of cdpruner and not the same: measure it before it is used",
        }
        (folder / RATIO).write_text(json.dumps(said, indent=1) + "\n")

    def words(self, output: Path) -> str:
        """Return how to convert it, and what to set."""
        return (
            f"approximate: OpenVINO's pruner is a relative of {self.spec.pruner}, and gives other answers\n"
            f"convert: optimum-cli export openvino -m {output} --task image-text-to-text --weight-format fp32 OUT\n"
            f"generate with: config.pruning_ratio = {self.removed}  (percent removed)"
        )


ENGINES: dict[str, type[EngineExport]] = {"openvino": OpenVinoExport, "vllm": VllmExport}


def name_tower_as_engine_does(folder: Path) -> int:
    """Rename a tower's weights in a checkpoint's files where vLLM looks for other names; transformers reads both.

    Returns:
        How many were renamed.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (config.get("vision_config") or {}).get("model_type") not in _WRAPPED:
        return 0
    renamed = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        named = {_named(name): tensor for name, tensor in tensors.items()}
        if named.keys() != tensors.keys():
            renamed += len(named.keys() - tensors.keys())
            save_file(named, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if renamed and index.is_file():
        held = json.loads(index.read_text(encoding="utf-8"))
        held["weight_map"] = {_named(name): file for name, file in held["weight_map"].items()}
        index.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    return renamed


def _named(name: str) -> str:
    if _NAMED in name:
        return name
    return name.replace(_TOWER, _NAMED)


def _script(dtype: str) -> str:
    """Return the line that starts the engine: features alone, neither pixels nor a tower."""
    return f"""#!/bin/sh
# A stock vLLM server for `prunetune serve --config {CONFIG}`; further arguments are handed on.
# It takes features and no pixels (limit 0: no tower is loaded, no image URL is fetched). Keep it on this host: it does
# not ask who sends them, and features are large.
cd "$(dirname "$0")" || exit 1
exec python -m vllm.entrypoints.openai.api_server --model . --served-model-name model \\
    --dtype {dtype} --host 127.0.0.1 --port 8001 \\
    --enable-mm-embeds --limit-mm-per-prompt '{{"image": 0}}' "$@"
"""
