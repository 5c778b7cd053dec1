"""The anchor: how far the projector has moved from the original one."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from prunetune.configs import ConfigError
from prunetune.models.adapter import projector_state
from prunetune.train.objectives import terms


class Anchor:
    """Measures the distance of what trains to the original projector; made before PEFT has the model.

    Args:
        model: with the original projector, of which a copy is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.originals = {name: tensor.detach().clone() for name, tensor in projector_state(model).items()}
        self.weights: Mapping[str, Tensor] = {}

    def hold(self, model: nn.Module) -> None:
        """Say what trains: the projector under PEFT.

        Raises:
            ConfigError: if what trains are not the projector's own weights.
        """
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Under PEFT `base_model.model.` stands before, and `modules_to_save.default.` within.
                own = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
                found[own] = parameter
        strange = sorted(set(found) - set(self.originals))
        if strange or not found:
            raise ConfigError(
                f"objective.terms anchor measures the projector's own weights, and {strange[:1]} trains; set "
                "train.variant to full, or leave the anchor out"
            )
        self.weights = found

    def __call__(self) -> Float[Tensor, ""]:
        """Return |w - w0|^2 / |w0|^2, with a graph."""
        device = next(iter(self.weights.values())).device
        self.originals = {name: tensor.to(device) for name, tensor in self.originals.items()}
        return terms.anchor(self.weights, self.originals)
