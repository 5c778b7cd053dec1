"""The thin layer over Hugging Face Trainer and DeepSpeed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from prunetune.configs import RecalibrateConfig
from prunetune.data_recipes import Formatter, RecipeData, Sample
from prunetune.data_recipes.formatting import IGNORE_INDEX, supervised
from prunetune.models.arm import placed
from prunetune.models.features import FeatureFormatter
from prunetune.models.hashes import tensor_hash
from prunetune.train.deepspeed_settings import deepspeed_config
from prunetune.train.engine.layout import MicroBatch, StepSampler
from prunetune.train.float8 import float8_tensors
from prunetune.train.masters import gathered_projector as gathered_projector
from prunetune.train.masters import whole
from prunetune.train.objectives.aim import Aim, scales_of
from prunetune.train.visual import tower_work

UNSUPERVISED = "unsupervised"
"""Goes with a batch: how many of its samples lost every answer token."""
COUNTS = "counts"
"""Goes with a batch: whether its samples are trained on."""
PATIENCE = 900
"""Seconds that a batch may take to be read; a data loading process that says nothing for so long is stuck."""


class SampleDataset(Dataset):
    """A recipe's samples, a micro-batch at a time; images are opened when a batch is built."""

    def __init__(self, data: RecipeData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, batch: MicroBatch) -> tuple[list[Sample], MicroBatch]:
        return [self.data[index] for index in batch.indices], batch


def training_batch(
    formatter: Formatter | FeatureFormatter, samples: Sequence[Sample], taken: MicroBatch
) -> dict[str, Any]:
    """Return the model input of a micro-batch: with the setting of each sample, and without labels if none counts."""
    if isinstance(formatter, FeatureFormatter):
        batch = formatter.training_batch(samples, taken.cells)
    else:
        batch = formatter.training_batch(samples)
    if taken.cells is not None:
        batch["cells"] = list(taken.cells)
    if not taken.counts:
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    return batch


class StepCollator:
    """Builds the batches of an update on one rank; the labels of a batch that does not count are taken away."""

    def __init__(self, formatter: Formatter | FeatureFormatter) -> None:
        self.formatter = formatter

    def __call__(self, batches: Sequence[tuple[list[Sample], MicroBatch]]) -> list[dict[str, Any]]:
        """Return one model input per micro-batch, with the number of samples that lost every answer token."""
        built = []
        for samples, taken in batches:
            batch = training_batch(self.formatter, samples, taken)
            batch[UNSUPERVISED] = int((~supervised(batch["labels"]).any(dim=1)).sum()) if taken.counts else 0
            batch[COUNTS] = taken.counts
            built.append(batch)
        return built


class RecalibrationTrainer(Trainer):
    """Hugging Face Trainer on a pruned model: what it calls a batch is all that a rank does for one update.

    Args:
        formatter: turns samples into batches.
        data: what is trained on.
        sampler: yields an update's micro-batches of this rank.
        aim: makes the losses of a micro-batch.
        loss: "token_mean" or "micro_batch_mean".
        kwargs: Trainer's own.
    """

    def __init__(
        self,
        formatter: Formatter | FeatureFormatter,
        data: RecipeData,
        sampler: StepSampler,
        aim: Aim,
        loss: str = "token_mean",
        **kwargs: Any,
    ) -> None:
        self.formatter, self.sampler, self.aim, self.loss = formatter, sampler, aim, loss
        order: Any = sampler.order
        # A sum of steps over steps per epoch: 1e-6 lifts 0.9999... over the epoch's end.
        order.epoch = lambda: int((self.state.epoch or 0) + 1e-6)
        self.unsupervised = 0
        self._loader: DataLoader | None = None
        self._terms: dict[str, Tensor] = {}  # of the updates since the last row of the log
        self._updates = 0
        collator: Any = StepCollator(formatter)
        super().__init__(data_collator=collator, train_dataset=SampleDataset(data), **kwargs)
        self.remove_callback(PrinterCallback)  # the progress bar and the log say it

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this rank's updates; one whose processes are stuck ends in an error, not in a wait."""
        workers = self.args.dataloader_num_workers
        self._loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type] # indexed by micro-batches
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            # Forked once and not in every epoch: a fork beside gloo's threads may leave a process that waits for a lock
            # of a thread which it does not have (CPython 3.11).
            persistent_workers=workers > 0,
            pin_memory=self.args.dataloader_pin_memory,
            timeout=PATIENCE if workers else 0,
        )
        return self._loader

    def end_loading(self) -> None:
        """End the data loading processes, once no more batches are asked for.

        Left to the garbage collector, each is waited for in vain, for ten seconds: it takes the queue that would tell
        them before the loader that would ask it to.
        """
        if self._loader is not None:
            self._loader._iterator = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Return the next update; what it is divided by, the training step counts."""
        with self._phase("data"):
            return [next(epoch_iterator) for _ in range(num_batches)], None

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: Trainer's estimate knows neither pruning nor frozen weights."""
        return 0

    def held_out_sums(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what is measured on a held-out batch of the formatter, summed by unit, on the wrapped model."""
        return self.aim.held_out_sums(self.model_wrapped, self._placed(batch))

    def held_out_loss(self, measure: Callable[[Any, torch.device], float]) -> float:
        """Return what a held-out loss is now; of the run's numbers it is a phase, and none of its samples count."""
        engine = self.aim.engine
        numbers = engine.numbers
        with nullcontext() if numbers is None else numbers.phase("held_out"):
            engine.numbers = None
            try:
                return measure(self.model_wrapped, self.args.device)
            finally:
                engine.numbers = numbers

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward over an update's micro-batches on this rank, and return its part of the loss.

        With "token_mean" an update's loss is for each term the mean over all its units, such as supervised tokens, over
        all ranks. The part of a rank is multiplied by the number of ranks, since DeepSpeed takes the mean of their
        gradients.
        """
        model.train()
        objective = self.aim.objective
        units = [self.aim.units(batch, number == 0, batch.pop(COUNTS)) for number, batch in enumerate(inputs)]
        scales = self._scales(units)
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs):
            self.unsupervised += batch.pop(UNSUPERVISED)
            last = number == len(inputs) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            tower = tower_work(self.aim.engine.pruned.model, batch)  # before sizes of images are on a device
            losses = self.aim.losses(model, self._placed(batch), tower)
            scale = dict(zip(objective.units, scales[number], strict=True))
            parts = [own * scale[unit] for unit, own in losses.units.items()]
            loss = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
            # With the last micro-batch's backward pass DeepSpeed also updates the weights.
            with self._phase("backward"):
                self.accelerator.backward(loss, scale_wrt_gas=False)
            total += loss.detach()
            for term, own in losses.terms.items() if self.aim.several else ():
                self._terms[term] = self._terms.get(term, 0) + own * scale[objective.unit_of(term)]
        self._updates += 1
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a row; where the loss is a sum of terms, with the mean of each, unweighted. All ranks call this."""
        if "loss" in logs and self._terms:
            means = torch.stack([self._terms[term].double() for term in self.aim.objective.weights]) / self._updates
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= {f"loss_{term}": own for term, own in zip(self.aim.objective.weights, means.tolist(), strict=True)}
        if "loss" in logs:
            self._terms, self._updates = {}, 0
        super().log(logs, *args, **kwargs)

    def _phase(self, name: str) -> AbstractContextManager[None]:
        numbers = self.aim.engine.numbers if self.aim is not None else None
        return nullcontext() if numbers is None else numbers.phase(name)

    def _placed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on the device, pixels in the model's dtype: the numbers that evaluation gives it."""
        return placed(batch, self.args.device, self.aim.engine.pruned.model.dtype, self.formatter.finish)

    def _scales(self, units: Sequence[Mapping[str, int]]) -> Tensor:
        """Return what each micro-batch's losses are multiplied by, by unit; 0 where there is none of it, not 1 / 0."""
        weights, numbers = scales_of(units, self.loss)
        whole = torch.tensor(numbers, dtype=torch.float64).to(self.args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(whole)
        own = torch.tensor(weights, dtype=torch.float64).to(self.args.device)
        return (own * self.args.world_size / whole.clamp(min=1)).float()

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
        per_device_train_batch_size=train.batch_size * train.accumulation,  # Trainer sees whole updates
        gradient_accumulation_steps=1,
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
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )


def use_plain_collectives_on_cpu() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction on a CPU: gloo is enough, and needs no compiler."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def frozen_tensors_hash(peft_model: PeftModel) -> str:
    """Return a SHA-256 of every frozen tensor in memory, which training must not change; all ranks call this.

    What a checkpoint's files hold is another hash, :func:`prunetune.models.hashes.frozen_files_hash`.
    """
    digest = hashlib.sha256()
    # One tensor at a time: under ZeRO-3 all of them together would not fit one GPU.
    for name, parameter in sorted(peft_model.get_base_model().named_parameters()):
        if not parameter.requires_grad:
            with whole([parameter]):
                digest.update(tensor_hash({name: parameter}).encode())
    digest.update(tensor_hash(float8_tensors(peft_model)).encode())
    return digest.hexdigest()


def drop_frozen_from_state_dict(peft_model: PeftModel) -> None:
    """Keep frozen weights out of checkpoints; DeepSpeed alone forgets those that are tied under a second name."""

    def hook(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(prefix + name, None)

    peft_model.register_state_dict_post_hook(hook)
