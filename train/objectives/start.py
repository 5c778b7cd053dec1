"""From a run's configuration to its aim, and what can be known to be wrong before the first step."""

from __future__ import annotations

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import DataError, Formatter, RecipeData
from prunetune.data_recipes.content import column
from prunetune.models import Arm
from prunetune.models.features import FeatureFormatter
from prunetune.train.deepspeed_settings import zero_stage
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.lengths import prompt_prefix
from prunetune.train.objectives.aim import Aim, Teacher
from prunetune.train.objectives.anchor import Anchor
from prunetune.train.objectives.live import LiveTeacher
from prunetune.train.objectives.objective import Objective
from prunetune.train.objectives.stored import StoredTeacher


def aim_of(
    config: RecalibrateConfig,
    arm: Arm,
    formatter: Formatter | FeatureFormatter,
    data: RecipeData,
    partitioned: bool = False,
) -> Aim:
    """Return what a run trains towards.

    It is to be called before PEFT, DeepSpeed or another projector has the model: teacher and anchor are of the original
    one.

    Args:
        config: the run's.
        arm: the model with the original projector.
        formatter: what turns samples into batches.
        data: what it trains on.
        partitioned: whether ZeRO-3 will hold the weights in pieces.

    Raises:
        ConfigError, PruningError: for a term that this model or this run can't have.
        DataError: if a term reads answers, and there are samples without.
    """
    objective = Objective(config.objective)
    check_answers(objective, data)
    prefix = prompt_prefix(arm, formatter, data)
    engine = Engine(arm.pruned, config.engine, prefix, objective.reads)
    head = head_of(arm.pruned, config.engine, partitioned)
    teacher: Teacher | None = None
    if objective.teacher_reads is not None:
        if config.objective.teacher is not None:
            teacher = StoredTeacher(config.objective.teacher, config, arm, objective, data)
        else:
            _check_whole(objective, formatter)
            teacher = LiveTeacher(arm, config.engine, objective.teacher_reads, prefix)
    anchor = Anchor(arm.model) if "anchor" in objective.weights else None
    return Aim(engine, objective, teacher, anchor, head)


def check_objective(config: RecalibrateConfig) -> None:
    """Check what the configuration alone says; raises ConfigError."""
    objective = Objective(config.objective)
    if list(objective.weights) == ["anchor"]:
        raise ConfigError(
            "objective.terms has the anchor alone, which keeps the projector where it is; give another term a weight"
        )
    if "anchor" in objective.weights and config.train.variant != "full":
        raise ConfigError(
            f"objective.terms anchor measures the projector's own weights, and train.variant {config.train.variant} "
            "trains others; set it to full, or leave the anchor out"
        )
    if zero_stage(config.train.deepspeed) != 3:
        return
    if objective.teacher_reads is not None and config.objective.teacher is None:
        raise ConfigError(
            f"objective.terms {objective.told()} run the teacher beside the model, and ZeRO-3 holds the weights "
            "they share in pieces; set objective.teacher to outputs of `prunetune teach`, or train.deepspeed to zero2"
        )
    if "anchor" in objective.weights:
        raise ConfigError(
            "objective.terms anchor measures whole weights, and ZeRO-3 holds them in pieces; set train.deepspeed to "
            "zero2, or leave the anchor out"
        )


def check_answers(objective: Objective, data: RecipeData) -> None:
    """Check that all samples have answers where a term reads them.

    Raises:
        DataError: naming a sample without.
    """
    if not objective.reads_answers:
        return
    answers = column(data.rows, "turns").combine_chunks().flatten().field("answer")
    if not answers.null_count:
        return
    lacking = next(sample for sample in data.rows if any(turn["answer"] is None for turn in sample["turns"]))
    what = "objective.kl_at: answers" if not objective.labelled else f"objective {objective.told()}"
    raise DataError(
        f"{what} reads answers, and {answers.null_count} turns of recipe {data.name!r} have none, such as sample "
        f"{lacking['id']!r}; `prunetune answers` writes the model's own"
    )


def _check_whole(objective: Objective, formatter: Formatter | FeatureFormatter) -> None:
    if isinstance(formatter, FeatureFormatter) and not getattr(formatter, "gives_whole", False):
        raise ConfigError(
            f"objective.terms {objective.told()} compare with a teacher that sees all visual tokens, and the feature "
            "cache holds those that are kept; run without features, or set objective.teacher to outputs of "
            "`prunetune teach`"
        )
