"""The explicit freeze step: what trains by the configuration, said, and stopped unless it is exactly the projector."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn

from prunetune.configs import ConfigError, TrainConfig
from prunetune.models.loading import CheckpointError
from prunetune.models.peft_adapter import wrap_low_rank, wrap_projector
from prunetune.pruning.families import family_of


@dataclass(frozen=True)
class FrozenReport:
    """Parameter counts per module below the model, and which of them train."""

    modules: dict[str, int]
    trainable: dict[str, int]

    def lines(self) -> list[str]:
        """Return one line per module, as printed before training."""
        lines = []
        for name, count in self.modules.items():
            lines.append(f"[FROZEN]    {name:<28} {count:>15,}")
        for name, count in self.trainable.items():
            lines.append(f"[TRAINABLE] {name:<28} {count:>15,}")
        return lines


def wrapped(model: nn.Module, config: TrainConfig) -> PeftModel:
    """Return the model under PEFT with what ``train.variant`` says to train.

    Raises:
        ConfigError, CheckpointError: if the projector has none of it.
    """
    if config.variant == "full":
        return wrap_projector(model, config.trainable)
    if config.trainable is not None:
        raise ConfigError(
            f"train.variant {config.variant} changes the projector's linear layers, and train.trainable names modules; "
            "leave one of the two out"
        )
    return wrap_low_rank(model, config.lora_rank)


def parameter_count(parameter: Tensor) -> int:
    """Return a parameter's size, also when DeepSpeed ZeRO-3 holds it in pieces."""
    # There the parameter itself has no elements; DeepSpeed notes how many it would have.
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def freeze_all_but_projector(peft_model: PeftModel) -> FrozenReport:
    """Check that the projector, the whole projector and nothing else trains, or low-rank changes of it alone.

    Raises:
        CheckpointError: if the trainable set is empty or differs from the projector, naming the difference.
    """
    model: nn.Module = peft_model.get_base_model()
    projectors = family_of(model).projectors
    expected, actual = set(), set()
    modules: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module, is_projector = _module_of(name, projectors)
        in_copy = ".modules_to_save.default." in name  # PEFT trains a copy and leaves the original beside it
        low_rank = ".lora_" in name
        if (in_copy or low_rank) and is_projector:
            expected.add(name)
        if parameter.requires_grad:
            actual.add(name)
        if ".original_module." in name or (in_copy and not parameter.requires_grad):
            continue  # neither is a part of the model that runs
        group = trainable if parameter.requires_grad else modules
        module += " (low-rank)" if low_rank else ""
        group[module] = group.get(module, 0) + parameter_count(parameter)
    if not actual:
        raise CheckpointError(
            "nothing would train: the trainable set is empty; leave train.trainable unset to train the "
            f"projector ({', '.join(projectors)})"
        )
    # Compared by name, in both directions: a second trained module is as wrong as half a projector.
    if actual != expected or not expected:
        differs = []
        extra, lacking = sorted(actual - expected), sorted(expected - actual)
        if extra:
            differs.append(f"also training {extra[:3]}")
        if lacking:
            differs.append(f"not training {lacking[:3]}")
        raise CheckpointError(
            f"the trainable set must be exactly the projector ({', '.join(projectors)}); {' and '.join(differs)}"
        )
    return FrozenReport(modules, trainable)


def _module_of(parameter: str, projectors: tuple[str, ...]) -> tuple[str, bool]:
    """Return the module that a parameter is reported under, and whether that is a projector.

    ``model.visual.merger.mlp.0.weight`` is of ``visual.merger``, a projector; ``model.visual.blocks.0.weight`` of
    ``visual``.
    """
    path = parameter.removeprefix("model.")
    for projector in projectors:
        if path.startswith(f"{projector}."):
            return projector, True
    return path.split(".")[0], False
