"""The explicit freeze step: say what trains, and stop unless it is exactly the projector."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn

from prunetune.models.loading import CheckpointError
from prunetune.pruning.families import family_of


@dataclass(frozen=True)
class FrozenReport:
    """Parameter counts per module below the model, and which of them train."""

    modules: dict[str, int]
    trainable: dict[str, int]

    def lines(self) -> list[str]:
        """Return one line per module, as printed before training."""
        frozen = [f"[FROZEN]    {name:<28} {count:>15,}" for name, count in self.modules.items()]
        trains = [f"[TRAINABLE] {name:<28} {count:>15,}" for name, count in self.trainable.items()]
        return [*frozen, *trains]


def parameter_count(parameter: Tensor) -> int:
    """Return a parameter's size, also when DeepSpeed ZeRO-3 holds it in pieces."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def freeze_all_but_projector(peft_model: PeftModel) -> FrozenReport:
    """Check that the projector, the whole projector and nothing else trains.

    Raises:
        CheckpointError: if the trainable set is empty or differs from the projector, naming the difference.
    """
    model: nn.Module = peft_model.get_base_model()
    projectors = family_of(model).projectors
    expected, actual = set(), set()
    modules: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        place = name.removeprefix("model.")
        in_copy = ".modules_to_save.default." in name
        if in_copy and place.startswith(tuple(f"{p}." for p in projectors)):
            expected.add(name)
        if parameter.requires_grad:
            actual.add(name)
        module = next((p for p in projectors if place.startswith(f"{p}.")), place.split(".")[0])
        if not in_copy or parameter.requires_grad:
            group = trainable if parameter.requires_grad else modules
            if ".original_module." not in name:  # PEFT's untouched copy of what trains is not a part of the model
                group[module] = group.get(module, 0) + parameter_count(parameter)
    if not actual:
        raise CheckpointError(
            "nothing would train: the trainable set is empty; leave train.trainable unset to train the "
            f"projector ({', '.join(projectors)})"
        )
    if actual != expected or not expected:
        extra, lacking = sorted(actual - expected), sorted(expected - actual)
        raise CheckpointError(
            f"the trainable set must be exactly the projector ({', '.join(projectors)}); "
            f"{f'also training {extra[:3]}' if extra else ''}{' and ' if extra and lacking else ''}"
            f"{f'not training {lacking[:3]}' if lacking else ''}"
        )
    return FrozenReport(modules, trainable)
