"""What an elastic run trains for: its settings, each a pruner with a budget, and how they are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunetune.configs import ConfigError
from prunetune.configs.schema import ElasticConfig
from prunetune.models.profile import resolved
from prunetune.pruning import PruningSpec
from prunetune.pruning.budget import Budget, check_budget, share_of
from prunetune.pruning.spec import StageSpec

QUARTER = 4
"""With ``sandwich`` one in so many samples of an update keeps everything, and one in so many the least."""


@dataclass(frozen=True)
class Setting:
    """A pruner with its budget.

    Attributes:
        spec: how it prunes.
        share: how much of all samples it gets, from 0 to 1; all settings' add up to 1.
    """

    spec: PruningSpec
    share: float

    @property
    def dense(self) -> bool:
        """Whether nothing is dropped."""
        return self.spec.dense


def settings_of(pruning: PruningSpec, elastic: ElasticConfig) -> list[Setting]:
    """Return what is drawn from: every pruner at every budget, and first of all no pruning, where that has a share.

    Args:
        pruning: says all but pruner and budget.
        elastic: says those; nothing is returned if it is off.

    Raises:
        ConfigError: for a pruner or a budget that is named twice, or a sandwich of unlike budgets.
        PruningError: for an unknown pruner, option or budget.
    """
    if not elastic.on:
        return []
    own = resolved(pruning).model_copy(update={"profile": None})
    methods = [(own.pruner, own.options, 1.0)]
    if elastic.pruners:
        methods = [(mixed.pruner, mixed.options, mixed.weight) for mixed in elastic.pruners]
    if elastic.budgets and any(name == "identity" for name, _, _ in methods):
        raise ConfigError(
            "identity keeps all tokens at any budget, and elastic.dense is the share of the samples that do; name "
            "methods in elastic.pruners that prune"
        )
    _check_once("elastic.pruners", [(name, options) for name, options, _ in methods])
    _check_once("elastic.budgets", elastic.budgets)
    _check_once("elastic.averages", elastic.averages)
    inside = _with_averages(own.stages, elastic.averages)
    budgets = elastic.budgets or [own.keep]
    total = sum(weight for _, _, weight in methods) * len(budgets) * len(inside)
    settings = []
    if elastic.dense:
        dense = own.model_copy(update={"pruner": "identity", "options": {}, "keep": "100%", "stages": []})
        settings.append(Setting(dense, elastic.dense))
    for name, options, weight in methods:
        for keep in budgets:
            for stages in inside:
                update = {"pruner": name, "options": dict(options), "keep": keep, "stages": stages}
                spec = own.model_copy(update=update)
                spec.build()
                settings.append(Setting(spec, (1 - elastic.dense) * weight / total))
    if elastic.sandwich:
        _is_smallest(elastic)
        if not elastic.dense:
            raise ConfigError("elastic.sandwich trains on all visual tokens too, and elastic.dense is 0; raise it")
    return settings


def _with_averages(stages: Sequence[StageSpec], averages: Sequence[float]) -> list[list[StageSpec]]:
    """Return the stages at each of some averages, or as they are if there are none.

    Raises:
        ConfigError: if it does not say whose averages these are.
    """
    if not averages:
        return [list(stages)]
    # Of several the one that says so, or the only one whose budgets are open.
    solved = [stage for stage in stages if stage.average is not None]
    solved = solved or [stage for stage in stages if stage.keep is None]
    if len(solved) != 1:
        raise ConfigError(
            f"elastic.averages are of one stage, whose keep is open, and pruning.stages has {len(solved)} such; give "
            "it an average, and all others keep"
        )
    found = []
    for average in averages:
        at = {"average": average}
        found.append([stage.model_copy(update=at) if stage is solved[0] else stage for stage in stages])
    return found


def hardest_of_each(settings: Sequence[Setting]) -> list[PruningSpec]:
    """Return for each method the setting that asks for most tokens, which an image may not have."""
    found: dict[str, PruningSpec] = {}
    for setting in settings:
        spec = setting.spec
        key = spec.model_dump_json(exclude={"keep"})
        if key not in found or _tokens(spec.keep) > _tokens(found[key].keep):
            found[key] = spec
    return list(found.values())


def _tokens(budget: Budget) -> int:
    """Return a number of tokens, and 0 for a share, which every image has."""
    return budget if isinstance(budget, int) else 0


class Draws:
    """Says which setting each sample of an update has: a function of seed, epoch and update alone.

    Args:
        settings: of :func:`settings_of`.
        elastic: how they are drawn.
        seed: of the draws.
    """

    def __init__(self, settings: Sequence[Setting], elastic: ElasticConfig, seed: int) -> None:
        self.settings, self.elastic, self.seed = list(settings), elastic, seed

    def of(self, epoch: int, update: int, samples: int) -> list[int]:
        """Return the number of each sample's setting."""
        chance = random.Random(f"{self.seed} {epoch} {update} settings")
        if self.elastic.draw == "update":
            return self._drawn(chance, 1) * samples
        if not self.elastic.sandwich:
            return self._drawn(chance, samples)
        is_smallest = _is_smallest(self.elastic)
        smallest = [number for number, own in enumerate(self.settings) if not own.dense and is_smallest(own.spec)]
        shares = [self.settings[number].share for number in smallest]
        quarter = max(1, samples // QUARTER)
        drawn = [0] * quarter + chance.choices(smallest, shares, k=quarter)
        drawn += self._drawn(chance, max(0, samples - len(drawn)))
        chance.shuffle(drawn)
        return drawn[:samples]  # an update may be smaller than two

    def _drawn(self, chance: random.Random, number: int) -> list[int]:
        return chance.choices(range(len(self.settings)), [setting.share for setting in self.settings], k=number)


def told(settings: Sequence[Setting]) -> str:
    """Return the settings for people: ``dense 25%, divprune at 8, 16 50%, vispruner at 8, 16 25%``."""
    budgets: dict[str, list[str]] = {}
    shares: dict[str, float] = {}
    for setting in settings:
        name = setting.spec.method
        budgets.setdefault(name, []).append(setting.spec.budget)
        shares[name] = shares.get(name, 0.0) + setting.share
    parts = []
    for name, share in shares.items():
        at = "" if name == "dense" else f" at {', '.join(dict.fromkeys(budgets[name]))}"
        parts.append(f"{name}{at} {share:.0%}")
    return ", ".join(parts)


def _check_once(where: str, values: Sequence[object]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ConfigError(f"{where} names {value!r} twice; name it once, and give a pruner a weight instead")


def _is_smallest(elastic: ElasticConfig) -> Callable[[PruningSpec], bool]:
    """Return what tells whether a setting has the smallest budget, before the LLM and inside it."""
    least = _smallest(elastic.budgets) if elastic.budgets else None
    average = min(elastic.averages, default=None)

    def tell(spec: PruningSpec) -> bool:
        averages = [stage.average for stage in spec.stages if stage.average is not None]
        return (least is None or spec.keep == least) and (average is None or averages == [average])

    return tell


def _smallest(budgets: Sequence[Budget]) -> Budget:
    """Return the smallest budget.

    Raises:
        ConfigError: if numbers of tokens stand beside shares: which is smaller depends on the image.
    """
    for budget in budgets:
        check_budget(budget)
    if all(isinstance(budget, int) for budget in budgets):
        return min(budgets, key=int)
    if any(isinstance(budget, int) for budget in budgets):
        raise ConfigError(
            f"elastic.sandwich needs to know the smallest of elastic.budgets {list(budgets)}, and numbers of tokens "
            "stand beside shares of them; write all as numbers, or all as shares"
        )
    return min(budgets, key=lambda budget: share_of(budget) or 0.0)
