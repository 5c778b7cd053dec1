"""A recalibration that writes, for every sample it meets, hashes of its features and of what each method keeps of it.

Called in ranks with the arguments of a recalibration, the folder that each rank writes a file to, and the text tower.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from prunetune.pruning import PrunedModel, PruningSpec, registered_methods
from prunetune.train import recalibrate

OPTIONS = {"hiprune": {"object_layer": 2, "alpha": 0.5}, "prumerge": {"neighbours": 8}, "vscan": {"shallow_layer": 2}}
NAMES = [name for name, method in registered_methods().items() if name != "identity" and not method.video]


def digest(tensor: torch.Tensor) -> str:
    """Hash the bits of a tensor."""
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def describe(plugs: dict[str, PrunedModel], inputs: dict) -> dict[str, dict[str, str]]:
    """Return hashes by sample: of features, projected features, attention, and of the kept tokens of every method."""
    found: dict[str, dict[str, str]] = {name: {} for name in inputs["sample_ids"]}
    for name, plug in plugs.items():
        chosen = plug.prepare(inputs).chosen["image"]
        (tokens,) = chosen.vision.groups
        kept = chosen.kept_tokens().view(len(tokens.features), -1)
        for row, sample in enumerate(inputs["sample_ids"]):
            found[sample][name] = digest(kept[row])
            found[sample]["features"] = digest(tokens.features[row])
            found[sample]["projected"] = digest(tokens.projected[row])
            if "cls_attention" in tokens.signals:
                found[sample]["attention"] = digest(tokens.signals["cls_attention"][row])
    return found


def all_plugs(model, tokenizer, clip: str) -> dict[str, PrunedModel]:
    """Every method at 16 tokens."""
    specs = {name: PruningSpec(name, 16, OPTIONS.get(name, {}), text_tower=clip) for name in NAMES}
    return {name: PrunedModel(model, spec, tokenizer) for name, spec in specs.items()}


def main(arguments: list[str], folder: Path, clip: str) -> None:
    """Recalibrate, listening to what goes into the model."""
    output = folder / f"rank{os.environ['RANK']}.json"
    seen: dict[str, dict[str, str]] = {}
    load, prepare = recalibrate.Arm.load, PrunedModel.prepare
    plugs: dict[str, PrunedModel] = {}

    def loading(*arguments, **options):
        arm = load(*arguments, **options)
        plugs.update(all_plugs(arm.model, arm.processor.tokenizer, clip))
        return arm

    def preparing(self, inputs, *arguments, **options):
        if self not in plugs.values():
            seen.update(describe(plugs, inputs))
            output.write_text(json.dumps(seen))
        return prepare(self, inputs, *arguments, **options)

    recalibrate.Arm.load = loading
    PrunedModel.prepare = preparing
    recalibrate.main(arguments)
