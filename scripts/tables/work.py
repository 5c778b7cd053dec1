"""One process's share of a table: features of a model's images, and cells, with one model loaded for all of them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.configs import ConfigError, ModelConfig, TableConfig
from prunetune.errors import PrunetuneError
from prunetune.outputs import FEATURES, OutputFolder
from prunetune.pruning import PruningSpec
from prunetune.reading import one_line
from prunetune.scripts.tables.cells import Model, Plan, TableArm, lay_out
from prunetune.scripts.tables.state import is_evaluated, is_of_other_settings, is_trained, remade

Job = tuple[str, str]
"""What is to be done, and for what: a "training", a "cell", "features" of MODEL/BENCHMARK, "training_features" of
MODEL/CACHE."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: which.
        error: why it failed, one line; None if it did not.
        seconds: that it took.
        where: the process, for logs.
    """

    job: Job
    error: str | None = None
    seconds: float = 0.0
    where: str = ""


class Worker:
    """Runs jobs in this process; the model it used last stays loaded, and all arms share its weights.

    Args:
        config: the table's.
        device: where models go; None is this process's GPU if there is one.
    """

    def __init__(self, config: TableConfig, device: str | None = None) -> None:
        self.plan: Plan = lay_out(config)
        self.device = device
        self._loaded: tuple[ModelConfig, Any] | None = None
        self._cells = {cell.name: cell for cell in self.plan.cells}
        self._models = {model.slug: model for model in self.plan.models}

    def run(self, job: Job) -> Outcome:
        """Do a job; whatever goes wrong is told in the outcome, so that others go on."""
        kind, name = job
        began = time.monotonic()
        error = None
        try:
            self._kinds()[kind](name)
        except PrunetuneError as failure:
            error = one_line(failure)
        except Exception as failure:  # a bug, or a device out of memory: the other arms may work
            error = f"{type(failure).__name__}: {one_line(failure)}"
            self._write_traceback(job)
        return Outcome(job, error, time.monotonic() - began, f"{os.uname().nodename}:{os.getpid()}")

    def _kinds(self) -> dict[str, Callable[[str], None]]:
        return {
            "training": self._training,
            "features": self._features,
            "training_features": self._training_features,
            "cell": self._cell,
        }

    def _arm(self, config: ModelConfig) -> Any:
        """Return the unpruned arm of a model, which is loaded if it was not the last one."""
        from prunetune.models import Arm

        if self._loaded is None or self._loaded[0] != config:
            self._loaded = None  # its memory is free before the next one is read
            self._loaded = (config, Arm.load(config, device=self.device))
        return self._loaded[1]

    def _cell(self, name: str) -> None:
        from prunetune.scripts.tracked import tracked_evaluate

        cell = self._cells[name]
        if is_evaluated(cell):  # by a process that died before it could say so
            return
        base = self._arm(cell.arm.model.config)
        # Not through the arm that ran before: the projector is put on the base's, whatever that was.
        arm = base.with_pruning(cell.config.pruning).with_adapter(cell.config.adapter)
        anew = self.plan.config.remake and is_of_other_settings(cell)
        tracked_evaluate(cell.config.model_copy(update={"overwrite": anew}), arm, bar=False)

    def _training(self, name: str) -> None:
        from prunetune.scripts.launch import LOG, launch_recalibration

        training = next(one for one in self.plan.trainings if one.name == name)
        if is_trained(training):
            return
        status = launch_recalibration(training.file, [*training.overrides, *remade(self.plan.config, training)])
        if status != 0:
            raise ConfigError(f"the recalibration ended with status {status}; see {training.config.output}/{LOG}")

    def _features(self, name: str) -> None:
        from prunetune.evaluation.run.features import feature_data

        slug, _, task = name.partition("/")
        model, config = self._models[slug], self.plan.config
        data = feature_data([task], config.data, config.limit, config.max_pixels, None)
        specs = self.plan.specs(model, base_alone=True)
        tuned = [arm.spec for arm in self._arms(model) if arm.training is not None]
        self._make(self.plan.features(model, task), model.config, data, specs, tuned, all_tokens=True)

    def _training_features(self, name: str) -> None:
        from prunetune.data_recipes import load_recipe
        from prunetune.models.features import FeatureData
        from prunetune.train.elastic import settings_of

        slug, _, cache = name.partition("/")
        model = self._models[slug]
        trained = []
        for arm in self._arms(model):
            if arm.training is not None and Path(str(arm.training.config.features)).name == cache:
                trained.append(arm.training.config)
        settings = trained[0].data
        data = FeatureData.of_recipe(load_recipe(settings.recipe, **settings.model_dump(exclude={"recipe"})))
        tuned = []
        for config in trained:
            tuned += [config.pruning, *(one.spec for one in settings_of(config.pruning, config.elastic))]
        asks_dense = any(config.objective.asks_dense_model or config.elastic.on for config in trained)
        assert trained[0].features is not None  # or there would be no such job
        self._make(Path(trained[0].features), model.config, data, [], tuned, all_tokens=asks_dense)

    def _arms(self, model: Model) -> list[TableArm]:
        return [arm for arm in self.plan.arms if arm.model.slug == model.slug]

    def _make(
        self,
        folder: Path,
        config: ModelConfig,
        data: Any,
        specs: Sequence[PruningSpec],
        tuned: Sequence[PruningSpec],
        all_tokens: bool,
    ) -> None:
        """Keep what arms need of some images.

        Args:
            folder: of the cache.
            config: the model.
            data: the images.
            specs: prunings that run with the base's projector.
            tuned: prunings that run with others: where that changes the choice, all tokens are kept to choose from.
            all_tokens: whether they are kept in any case.
        """
        from prunetune.models.features import make_features
        from prunetune.models.ranks import join_ranks
        from prunetune.scripts.caching import stored_before_training

        arm = self._arm(config)
        stored, anew = stored_before_training(arm, tuned)
        wanted: list[PruningSpec] = []
        for spec in [*specs, *stored, *([PruningSpec()] if all_tokens or anew else [])]:
            if spec not in wanted:
                wanted.append(spec)
        with OutputFolder(folder, FEATURES) as opened:
            make_features(opened, arm, wanted, data, join_ranks(), batch_size=32)

    def _write_traceback(self, job: Job) -> None:
        """Keep what a bug looks like, for a report; the table shows one line."""
        folder = self.plan.output / "failures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{job[0]}-{job[1].replace('/', '-')}.txt").write_text(traceback.format_exc(), encoding="utf-8")
