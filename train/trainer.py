"""The thin layer over Hugging Face Trainer and DeepSpeed."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from prunetune.configs import RecalibrateConfig, TrainConfig
from prunetune.data_recipes import Formatter, RecipeData, Sample
from prunetune.data_recipes.formatting import IGNORE_INDEX
from prunetune.models.hashes import tensor_hash
from prunetune.pruning.hooks import is_partitioned
from prunetune.train.deepspeed_settings import deepspeed_config
from prunetune.train.sampling import GroupedSampler

PATIENCE = 900
"""Seconds that a batch may take to be read; a data loading process that says nothing for so long is stuck."""


class SampleDataset(Dataset):
    """A recipe's samples as a map-style dataset; images are opened when a batch is built."""

    def __init__(self, data: RecipeData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return self.data[index]


class RecalibrationTrainer(Trainer):
    """Hugging Face Trainer on a model whose forward pass is pruned: a `PrunedModel` is attached to it."""

    def __init__(
        self,
        formatter: Formatter,
        data: RecipeData,
        sampler: GroupedSampler | None = None,
        **kwargs: Any,
    ) -> None:
        self.sampler = sampler
        if sampler is not None:
            # A sum of steps over steps per epoch: 1e-6 lifts 0.9999... over the epoch's end.
            sampler.epoch = lambda: int((self.state.epoch or 0) + 1e-6)
        self.unsupervised = 0
        super().__init__(data_collator=formatter.training_batch, train_dataset=SampleDataset(data), **kwargs)
        self.remove_callback(PrinterCallback)  # the progress bar and the log say it
        self.model_accepts_loss_kwargs = False  # the stock loss is a mean over the batch's supervised tokens

    def get_train_dataloader(self) -> Any:
        """Return the stock data loader; one whose processes are stuck ends in an error instead of a wait for ever."""
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            # Accelerate wraps the loader, and copies this to the one that goes on within an epoch.
            getattr(loader, "base_dataloader", loader).timeout = PATIENCE
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the configured order; without one the trainer shuffles."""
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the stock loss; a micro-batch whose answers were all truncated away has loss 0, not 0 / 0."""
        supervised = (inputs["labels"][:, 1:] != IGNORE_INDEX).any(dim=1)  # the first token is predicted by none
        self.unsupervised += int((~supervised).sum())
        outputs = model(**inputs)
        # The zero stays tied to the projector, so that every rank takes part in the reduction of gradients.
        loss = outputs.loss if bool(supervised.any()) else outputs.logits.sum() * 0
        return (loss, outputs) if return_outputs else loss

    @property
    def skipped_steps(self) -> int:
        """Steps that DeepSpeed took no update in because the gradients overflowed, earlier runs' included."""
        engine: Any = self.deepspeed
        return int(engine.skipped_steps)

    def unsupervised_samples(self) -> int:
        """Return of how many samples truncation left no answer token, over all ranks; all ranks call this."""
        total = torch.tensor([self.unsupervised], device=self.args.device)
        return int(self.accelerator.reduce(total, reduction="sum").item())


def training_arguments(config: RecalibrateConfig, output: Path, total_steps: int) -> TrainingArguments:
    """Return Trainer's arguments for our options; DeepSpeed's JSON is filled in from them where it says "auto"."""
    train = config.train
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output),
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else None,
        deepspeed=deepspeed_config(train.deepspeed),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        lr_scheduler_type=train.schedule,
        warmup_steps=round(train.warmup_ratio * total_steps),
        max_grad_norm=train.max_grad_norm,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps,
        bf16=config.model.dtype == "bfloat16",
        fp16=config.model.dtype == "float16",
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,  # a NaN must be seen, not replaced by the last good loss
        save_steps=train.save_steps,
        save_total_limit=None,  # see prunetune.train.rotation
        dataloader_num_workers=train.workers,
        # Forked once and not in every epoch: a fork beside gloo's threads may leave a process that waits for a lock of
        # a thread which it does not have (CPython 3.11).
        dataloader_persistent_workers=train.workers > 0,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )


def use_plain_collectives_on_cpu() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction on a CPU: gloo is enough, and needs no compiler."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def steps_in_total(train: TrainConfig, samples: int, world_size: int) -> int:
    """Return the number of optimizer steps of the whole run."""
    if train.max_steps >= 0:
        return train.max_steps
    # Nothing is left out of an epoch, so each of these is rounded up.
    per_rank = math.ceil(samples / world_size)
    batches = math.ceil(per_rank / train.batch_size)
    steps_per_epoch = math.ceil(batches / train.accumulation)
    return max(1, math.ceil(train.epochs * steps_per_epoch))


def gathered_projector(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the trained tensors by their name in the unwrapped model, on every rank, also under ZeRO-3.

    They are DeepSpeed's float32 weights, of which a half-precision model runs with a rounded copy: most of a small
    step is less than half the distance between two bfloat16 numbers. Where DeepSpeed keeps none, they are the model's.

    Raises:
        RuntimeError: if the rounded ones are not what the model ran with.
    """
    trained = {}
    for name, parameter in peft_model.get_base_model().named_parameters():
        if parameter.requires_grad:
            trained[name.replace(".modules_to_save.default", "")] = parameter
    with _whole(list(trained.values())):
        # Cloned: under ZeRO-3 the whole ones are gone when the context closes.
        ran_with = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    tensors = {}
    for name, parameter in trained.items():
        tensors[name] = _in_float32(name, parameter, ran_with[name])
    return tensors


def _in_float32(name: str, parameter: torch.nn.Parameter, ran_with: Tensor) -> Tensor:
    if ran_with.dtype == torch.float32:
        return ran_with
    master = safe_get_full_fp32_param(parameter)  # all ranks call this: each holds a piece
    if master is None:
        return ran_with
    master = master.detach().cpu().clone()
    if not torch.equal(master.to(ran_with.dtype), ran_with):
        raise RuntimeError(f"{name}: DeepSpeed's float32 weights are not those the model ran with. Please report this")
    return master


def frozen_tensors_hash(peft_model: PeftModel) -> str:
    """Return a SHA-256 of every frozen tensor in memory, which training must not change; all ranks call this.

    What a checkpoint's files hold is another hash, :func:`prunetune.models.hashes.frozen_files_hash`.
    """
    digest = hashlib.sha256()
    # One tensor at a time: under ZeRO-3 all of them together would not fit one GPU.
    for name, parameter in sorted(peft_model.get_base_model().named_parameters()):
        if not parameter.requires_grad:
            with _whole([parameter]):
                digest.update(tensor_hash({name: parameter}).encode())
    return digest.hexdigest()


def drop_frozen_from_state_dict(peft_model: PeftModel) -> None:
    """Keep frozen weights out of checkpoints; DeepSpeed alone forgets those that are tied under a second name."""

    def hook(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(prefix + name, None)

    peft_model.register_state_dict_post_hook(hook)


def _whole(parameters: list[Any]) -> Any:
    """Return a context in which parameters that ZeRO-3 holds in pieces are whole on every rank."""
    if not is_partitioned(parameters):
        return nullcontext()
    return deepspeed.zero.GatheredParameters(parameters)
