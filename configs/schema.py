"""Every option there is, with its type, default and meaning. Unknown keys are errors."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prunetune.data_recipes.sampling import VideoSampling
from prunetune.plugins import load_plugins
from prunetune.pruning.spec import PruningSpec

DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of all sections: strict keys, nothing converted silently, no infinite number, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NamedMethod(Section):
    """One of several methods that are looked at together; a bare name is the method with its defaults."""

    pruner: str = Field(description="a name from `prunetune list pruners`")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own hyperparameters")
    name: str | None = Field(None, description="tells two rows of one pruner apart; None is the pruner's")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        return {"pruner": values} if isinstance(values, str) else values

    @property
    def label(self) -> str:
        """What its row is called."""
        return self.name or self.pruner


class ModelConfig(Section):
    """Which model, and how it is loaded."""

    path: str = Field(description="folder or hub id of a Hugging Face VLM checkpoint")
    revision: str | None = Field(None, description="hub revision; None is the default branch")
    dtype: DType = Field("bfloat16", description="dtype of all weights while running")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel of the LLM")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None,
        description="weights of the LLM in 4 (NF4) or 8 bits (LLM.int8), on a GPU with bitsandbytes; projector and "
        "vision tower stay in dtype",
        exclude_if=lambda quantization: quantization is None,  # records of unquantised models stay, to the byte
    )
    template: str = Field(
        "model",
        description="chat template: the model's own, vicuna_v1 as LLaVA-1.5's, one that a plug-in registers, or a "
        ".jinja file",
    )
    tokens: Literal["model", "legacy", "nonlegacy_431", "nonlegacy_437"] = Field(
        "model",
        description="whose tokens template vicuna_v1 gives: what the loaded tokenizer makes of the prompt, or what "
        "LLaVA's own code made of it: legacy, nonlegacy_431 (as LLaVA-1.5 was trained), nonlegacy_437 (as 1.6 was)",
        exclude_if=lambda tokens: tokens == "model",  # records without it stay, to the byte
    )
    projector: str | None = Field(
        None,
        description="the projector's path below `model.`, for architectures without a family; None guesses",
    )
    square: Literal["processor", "pad"] = Field(
        "processor", description="make pictures square as the processor does, or pad them first as LLaVA-1.5 does"
    )


class DataConfig(Section):
    """Which samples the projector is recalibrated on."""

    recipe: str = Field(description="a name from `prunetune list recipes`, or the path of a recipe YAML")
    file: str | None = Field(
        None, description="data file of recipes that read one, for example llava_v1_5_mix665k.json"
    )
    image_root: str | None = Field(None, description="folder that the image paths of the data file are relative to")
    max_samples: int | None = Field(None, ge=1, description="use this many samples, drawn by the seed; None is all")
    seed: int | None = Field(None, description="seed of the subset; None is the recipe's, or 0")
    max_missing: float | None = Field(
        None, ge=0, le=1, description="largest share of samples without their image file; None is the recipe's, or 1 %"
    )
    max_broken: float | None = Field(
        None,
        ge=0,
        le=1,
        description="largest share of records that are no conversation, which are left out; None is the recipe's, or "
        "1 %",
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="images with more pixels are refused before they are decoded, 3 bytes each"
    )


class TrainConfig(Section):
    """Optimization. Defaults are PrismPrune's: LLaVA-1.5's fine-tuning settings at 2e-5, the projector alone."""

    learning_rate: float = Field(2e-5, gt=0, description="peak, after the warm-up")
    epochs: float = Field(1.0, gt=0, description="passes over the data; may be a fraction")
    max_steps: int = Field(
        -1, ge=-1, description="stop after this many optimizer steps; -1 is no limit, 0 writes the projector as it is"
    )
    batch_size: int = Field(16, ge=1, description="samples per device; all devices' together make one micro-batch each")
    accumulation: int = Field(
        1, ge=1, description="micro-batches per device before an update, which sees batch_size x accumulation x devices"
    )
    loss: Literal["token_mean", "micro_batch_mean"] = Field(
        "token_mean",
        description="mean over all supervised tokens of an update, however they are laid out, or of the means of its "
        "micro-batches, as LLaVA's own training and so the papers' recipe means it",
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of all steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="course of the learning rate after the warm-up"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 switches clipping off")
    max_length: int = Field(2048, ge=8, description="longest sequence in tokens, before pruning")
    seed: int = Field(42, description="of the order of samples, and of everything that is drawn")
    sampling: Literal["shuffled", "length", "modality_length"] = Field(
        "shuffled", description="order of samples: random, or batches of similar length, of one modality (as LLaVA's)"
    )
    deepspeed: str = Field(
        "zero1",
        description="zero1, zero2, zero3 (for models that do not fit one device), or the path of a DeepSpeed JSON",
    )
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints")
    log_steps: int = Field(1, ge=1, description="optimizer steps between rows of the log")
    workers: int = Field(2, ge=0, description="data loading processes per device")
    trainable: list[str] | None = Field(
        None, description="modules that train; None is the family's projector. Anything else but the projector stops"
    )
    held_out: int = Field(
        0,
        ge=0,
        description="samples of whole images that a loss is measured on: of those that the recipe holds out, or else "
        "drawn from it and not trained on; 0 measures none",
    )
    eval_steps: int = Field(
        100, ge=1, description="optimizer steps between losses on held out samples, and one before and after training"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many of these losses in a row that are not the lowest; None never does"
    )
    resume: Literal["auto", "never"] = Field("auto", description="go on from the last checkpoint in the output folder")
    start_from: str | None = Field(
        None,
        description="folder of an adapter whose projector training begins with; None begins with the base's",
        exclude_if=lambda folder: folder is None,  # records of runs without these stay, to the byte
    )
    variant: Literal["full", "lora"] = Field(
        "full",
        description="what trains: the whole projector, or low-rank changes of its linear layers; both are stored as a "
        "whole projector",
        exclude_if=lambda variant: variant == "full",
    )
    lora_rank: int = Field(
        8, ge=1, description="rank of the changes of variant lora", exclude_if=lambda rank: rank == 8
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep a running mean of the projector's weights with this decay, and store it; None is the last",
        exclude_if=lambda decay: decay is None,
    )


Term = Literal["ce", "gce", "kl", "hidden", "feature", "anchor"]


def _cross_entropy() -> dict[Term, float]:
    return {"ce": 1.0}


class ObjectiveConfig(Section):
    """What the projector is trained towards: a weighted sum of terms.

    The teacher of kl, hidden and feature is the same model with all visual tokens and its original projector.
    """

    terms: dict[Term, float] = Field(
        default_factory=_cross_entropy,
        description="weight of each term: ce (cross entropy of the answers, as the papers), gce (generalised cross "
        "entropy, which gives up on answers that can't be seen), kl (the teacher's distribution), hidden (the "
        "teacher's hidden states at text positions behind the image), feature (the mean of the visual tokens before "
        "the LLM), anchor (distance of the weights to the original projector's)",
    )
    gce_q: float = Field(0.7, gt=0, le=1, description="q of gce, (1 - p^q) / q; towards 0 it is ce")
    kl_at: Literal["answers", "text"] = Field("answers", description="positions that kl compares")
    temperature: float = Field(1.0, gt=0, description="both distributions of kl are softened by it")
    hidden_layer: int | None = Field(
        None,
        ge=1,
        description="LLM layer behind which hidden compares, from 1; None is the last one. Without ce, gce and kl no "
        "later layer runs",
    )
    teacher: str | None = Field(
        None,
        description="folder of the teacher's outputs made by `prunetune teach`; None runs the teacher beside the model",
    )

    @property
    def asks_dense_model(self) -> bool:
        """Whether the dense model runs beside the one that trains, on all visual tokens."""
        return self.teacher is None and any(self.terms.get(term) for term in ("kl", "hidden", "feature"))

    @field_validator("terms")
    @classmethod
    def _some_term(cls, terms: dict[str, float]) -> dict[str, float]:
        if not any(weight > 0 for weight in terms.values()) or min(terms.values()) < 0:
            raise ValueError("give at least one term a weight above 0, and none a weight below")
        return terms


class MixedPruner(Section):
    """One of the methods that an elastic projector is trained for."""

    pruner: str = Field(description="a name from `prunetune list pruners`")
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own hyperparameters")
    weight: float = Field(1.0, gt=0, description="how often it is drawn, against the others")


class ElasticConfig(Section):
    """Train one projector over many settings; `pruning` is the one it is stored for."""

    pruners: list[MixedPruner] = Field(
        default_factory=list, description="the methods; none is the one of `pruning` alone"
    )
    budgets: list[int | float | str] = Field(
        default_factory=list,
        description='budgets that are drawn alike, each as of pruning.keep: 64, 0.111 or "11.1%"; none trains for '
        "the one of `pruning` alone, and nothing of this section counts",
    )
    averages: list[int | float] = Field(
        default_factory=list,
        description="visual tokens per layer, drawn alike, for the stage of pruning.stages whose keep is open; beside "
        "budgets each with each",
        exclude_if=lambda averages: not averages,  # records of runs without these stay, to the byte
    )
    dense: float = Field(0.25, ge=0, lt=1, description="share of the samples that keep all visual tokens")
    draw: Literal["sample", "update"] = Field("sample", description="one setting a sample, or one for a whole update")
    sandwich: bool = Field(
        False,
        description="of every update a quarter of the samples keeps all tokens and a quarter the smallest budget; "
        "the rest is drawn",
    )

    @property
    def on(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.budgets or self.averages)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.on and self.model_fields_set - {"budgets", "averages"}:
            raise ValueError("budgets is empty, and nothing else of elastic would count; list some, as [32, 64, 128]")
        if self.sandwich and self.draw == "update":
            raise ValueError("sandwich gives each update several settings, and draw: update gives it one; choose one")
        return self


class EngineConfig(Section):
    """How a step is computed: no switch changes loss or gradient beyond rounding, each changes what they cost."""

    token_budget: int | None = Field(
        None,
        ge=1,
        description="most tokens that a device takes at once, after pruning; the samples of an update are laid out by "
        "it, over devices and micro-batches. None takes batch_size samples at once",
    )
    packing: bool | Literal["auto"] = Field(
        "auto",
        description="put a micro-batch into one row without padding, samples do not see each other; auto does where "
        "the family's attention is causal alone",
    )
    supervised_logits: bool = Field(
        True, description="compute logits and their loss at supervised positions only, in pieces"
    )
    shared_prefix: bool = Field(
        True, description="compute what all prompts begin with once, as keys and values; where samples are packed"
    )
    project_kept: bool = Field(
        True, description="project kept tokens only, where the method does not choose by the projector's output"
    )
    stop_tower: bool = Field(True, description="leave out vision layers behind the last one that anything reads")
    checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute the LLM's activations; auto does if they would not fit the device's memory"
    )
    float8: bool = Field(
        False, description="compute the LLM's frozen linear layers in float8, on GPUs that can; evaluation never does"
    )


class TrackingConfig(Section):
    """Where numbers go beside the JSONL log, which is always written."""

    wandb: Literal["off", "auto", "offline", "online"] = Field(
        "off", description="auto is online with a W&B key and offline without; online stops without a key"
    )
    project: str = Field("prunetune", description="W&B project")
    name: str | None = Field(None, description="run name; None is the output folder's name")
    group: str | None = Field(
        None,
        description="W&B group; the trainings, arms and report of a table share one",
        exclude_if=lambda group: group is None,  # effective configurations without these stay, to the byte
    )
    job_type: str | None = Field(None, description="W&B job type", exclude_if=lambda job_type: job_type is None)
    tags: list[str] = Field(default_factory=list, description="W&B tags", exclude_if=lambda tags: not tags)
    adapters: bool = Field(
        True,
        description="keep recalibrated projectors as W&B artefacts",
        exclude_if=lambda adapters: adapters,
    )


class PluggedConfig(Section):
    """A configuration that may name what comes from outside this package."""

    plugins: list[str] = Field(
        default_factory=list,
        description="modules or .py files that register pruners, stages, families, signals, formats, templates or "
        "benchmarks; files are relative to the YAML file, on the command line to the working directory",
    )

    @field_validator("plugins")
    @classmethod
    def _loaded(cls, plugins: list[str]) -> list[str]:
        """Load them with the configuration, however it is made: on every rank, before a name of theirs is looked up."""
        load_plugins(plugins)
        return plugins


class RecalibrateConfig(PluggedConfig):
    """Recalibrate the projector of one model for one pruner and budget."""

    model: ModelConfig
    pruning: PruningSpec
    data: DataConfig
    elastic: ElasticConfig = Field(
        default_factory=ElasticConfig,
        description="train over many pruners and budgets instead of the one of `pruning`",
        exclude_if=lambda elastic: not elastic.on,  # records of runs without it stay, to the byte
    )
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig,
        description="what is trained towards; the papers' cross entropy by default",
        exclude_if=lambda objective: objective == ObjectiveConfig(),  # as above
    )
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()
    features: str | None = Field(
        None,
        description="folder of a feature cache made by `prunetune cache`, read in place of pixels, tower and pruner",
        exclude_if=lambda features: features is None,  # records of runs without one stay, to the byte
    )
    output: str = Field(description="folder for the adapter, checkpoints, logs and the effective config")
    overwrite: bool = Field(
        False,
        description="delete what an earlier recalibration wrote to the output folder, that alone, and start over",
    )
    devices: int | None = Field(
        None, ge=1, description="how many devices `prunetune recalibrate` launches; None is all"
    )
    grace: float = Field(
        120.0,
        gt=0,
        description="seconds between SIGTERM, SIGUSR1 or Ctrl-C to `prunetune recalibrate` and the end of ranks that "
        "have not taken a checkpoint and stopped",
    )


class BackendOptions(Section):
    """What a backend of evaluations may be told."""

    compile: bool = Field(
        True, description="of static: compile the steps behind the prompts, once for each size; false runs them as is"
    )
    cache_tokens: int | None = Field(
        None,
        ge=1,
        description="of continuous: prompt and answer tokens that are held at once; None derives it from memory",
    )
    step_tokens: int | None = Field(
        None,
        ge=1,
        description="of continuous: tokens that one step computes, of all prompts; None is 256 on a CPU, and "
        "transformers' choice on a GPU",
    )


Backend = Literal["plain", "continuous", "static"]

_READ_BY = {"compile": "static", "cache_tokens": "continuous", "step_tokens": "continuous"}


def check_backend_options(backend: Backend, options: BackendOptions, share_prefix: bool) -> None:
    """Check that a backend reads what it is told; raises ValueError."""
    for name in sorted(options.model_fields_set):
        if _READ_BY[name] != backend:
            raise ValueError(f"backend_options.{name} is read by backend {_READ_BY[name]}, and it is {backend}")
    if share_prefix and backend != "plain":
        raise ValueError(f"share_prefix needs backend: plain, and it is {backend}; choose one of the two")


class EvaluateConfig(PluggedConfig):
    """Run one arm on the named tasks."""

    model: ModelConfig
    pruning: PruningSpec = PruningSpec()
    adapter: str | None = Field(None, description="folder of a recalibrated projector; None is training-free")
    tasks: list[str] = Field(description="names from `prunetune list tasks`")
    data: str | None = Field(
        None, description="folder of the benchmarks' published files, with a folder per task or of one task alone"
    )
    limit: int | None = Field(None, ge=1, description="first items of every task only")
    batch_size: int = Field(1, ge=1, description="scores shift with it in half precision, so it is in the manifest")
    max_new_tokens: int = Field(128, ge=1, description="longest answer in tokens")
    share_prefix: bool = Field(
        False,
        description="compute what the questions about one image begin with once, where they share a batch; the same "
        "but for last bits, so it is in the manifest",
        exclude_if=lambda share: not share,  # effective configurations without it stay, to the byte
    )
    backend: Backend = Field(
        "plain",
        description="how answers are generated: batch by batch; prompts that join and leave a running batch of "
        "batch_size (continuous); or into a cache of one size with compiled steps (static). The same but for last "
        "bits, so it is in the manifest",
        exclude_if=lambda backend: backend == "plain",  # as above
    )
    backend_options: BackendOptions = Field(
        default_factory=BackendOptions,
        description="of that backend",
        exclude_if=lambda options: options == BackendOptions(),  # as above
    )
    max_pixels: int = Field(
        50_000_000, ge=1, description="images with more pixels are refused before they are decoded, 3 bytes each"
    )
    video: VideoSampling = VideoSampling()
    tracking: TrackingConfig = TrackingConfig()
    features: str | None = Field(
        None,
        description="folder of a feature cache made by `prunetune cache`, read in place of pixels, tower and pruner",
        exclude_if=lambda features: features is None,  # as of recalibrations
    )
    output: str = Field(description="folder for results.jsonl, manifest.json and the effective config")
    overwrite: bool = Field(
        False,
        description="delete what an earlier evaluation wrote to the output folder, that alone, and start over",
    )

    @model_validator(mode="after")
    def _read_by_the_backend(self) -> Self:
        check_backend_options(self.backend, self.backend_options, self.share_prefix)
        return self

    @field_validator("tasks")
    @classmethod
    def _some_task(cls, tasks: list[str]) -> list[str]:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError("name at least one task, and each only once")
        return tasks
