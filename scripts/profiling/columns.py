"""What of a profile stands in a table, beside the scores of the arms that it is about."""

from __future__ import annotations

from prunetune.configs import ModelConfig
from prunetune.evaluation.report.tables.table import Value
from prunetune.pruning.spec import PruningSpec
from prunetune.scripts.profiling.record import ArmCost, Costs, Number

MIB = 2**20


def measured_columns(
    costs: Costs, model: ModelConfig, frozen_hash: str, pruning: PruningSpec
) -> dict[str, Value] | None:
    """Return the costs of an arm by their column's name, at the first batch size; None where it was not measured.

    Args:
        costs: the profile.
        model: of the arm, which must have been loaded the same way.
        frozen_hash: of its weights, which must be those that were measured.
        pruning: of the arm; the projector may be any.
    """
    for measured in costs.models:
        if measured.random_weights or measured.config != model or measured.frozen_hash != frozen_hash:
            continue
        for arm in measured.arms:
            if arm.pruning == pruning and arm.batches:
                return _columns(arm)
    return None


def _columns(arm: ArmCost) -> dict[str, Value]:
    batch = arm.batches[0]
    found = {
        "prefill ms": _value(batch.prefill),
        "first token ms": _value(batch.first_token),
        "end to end ms": _value(batch.end_to_end),
        "KV MiB": Value(value=batch.cache / MIB),
    }
    if batch.decode is not None:
        found["decode tokens/s"] = _value(batch.decode)
    if arm.load is not None:
        found["requests/s under load"] = _value(arm.load.rate)
    return found


def _value(number: Number) -> Value:
    return Value(value=number.median, interval=(number.low, number.high) if number.whole else None)


def footnote(costs: Costs) -> str:
    """Return what a reader of these columns must know."""
    sizes = [batch.size for model in costs.models for arm in model.arms for batch in arm.batches]
    return (
        f"Milliseconds, tokens/s and KV MiB: measured by prunetune profile on {costs.device}, batches of {sizes[0]}, "
        f"answers of {costs.new_tokens} tokens, medians of {costs.repeats} rounds with their 95 % intervals, every "
        "round with each arm once; arms that differ in their projector alone compute the same and share a measurement."
    )
