"""Run one arm on tasks, into results.jsonl and manifest.json."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prunetune.configs import EvaluateConfig, to_yaml
from prunetune.data_recipes import Formatter, Sample, Turn
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.results import MANIFEST, gather, read_results, shard, start, write_json
from prunetune.evaluation.score import interval
from prunetune.evaluation.sources import open_images, read_items
from prunetune.evaluation.tasks import Item, Task, get_task
from prunetune.evaluation.tasks.base import Pair, items_hash, task_folder
from prunetune.models import Arm, read_record
from prunetune.models.ranks import Ranks, join_ranks


@dataclass(frozen=True)
class Work:
    """The items of one task, in their fixed batches."""

    task: Task
    data: Path
    batches: list[list[Item]]


def evaluate(config: EvaluateConfig, arm: Arm | None = None, device: str | None = None) -> Path:
    """Run one arm and return its folder; a run that was killed goes on with the batches that are not done.

    Batches are cut the same way in every run and dealt to the ranks in turn (``torchrun`` or ``deepspeed`` start
    several), so an interrupted run, an uninterrupted one and one on several ranks write the same results.

    Args:
        config: the arm, its tasks and where results go.
        arm: one with the configuration's model, pruning and adapter that is loaded already; None loads it.
        device: where it is loaded to; None is the GPU if there is one.

    Raises:
        TaskError: if the folder holds results of another configuration, naming the field.
        CheckpointError, PruningError, DataError: for weights, pruners or pictures that can't work.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    ranks = join_ranks()
    works = [_work(name, config) for name in config.tasks]
    if arm is None:
        arm = Arm.load(config.model, config.pruning, config.adapter, device)
    _check_is_configured(arm, config)
    manifest = _manifest(config, works, arm)
    batches = {work.task.name: [[item.id for item in batch] for batch in work.batches] for work in works}
    if ranks.is_zero:
        start(output, manifest)
        (output / "config.yaml").write_text(to_yaml(config))
        gather(output, batches)
    ranks.wait()
    done = {(row["task"], row["id"]) for row in read_results(output)}
    ranks.wait()  # nobody appends before everybody has read

    began = time.monotonic()
    _run(config, works, arm, done, ranks)
    seconds = time.monotonic() - began
    ranks.wait()
    if ranks.is_zero:
        gather(output, batches)
        rows = read_results(output)
        kept = [row["kept"] for row in rows]
        manifest |= {
            "complete": True,
            "metrics": {work.task.name: _measured(work, rows, output) for work in works},
            "kept_tokens": {"mean": sum(kept) / len(kept), "min": min(kept), "max": max(kept)},
            "items_per_second": round((len(rows) - len(done)) / seconds, 2) if len(rows) > len(done) else None,
        }
        write_json(output / MANIFEST, manifest)
    ranks.destroy()
    return output


def _check_is_configured(arm: Arm, config: EvaluateConfig) -> None:
    """Check that an arm which was loaded before is the one that the configuration asks for."""
    asked = (config.model, config.pruning, config.adapter)
    if (arm.base.config, arm.spec, arm.adapter) != asked:
        raise TaskError(f"the arm that was loaded for {config.output} is not the one its configuration names")


def _run(config: EvaluateConfig, works: list[Work], arm: Arm, done: set[tuple[str, str]], ranks: Ranks) -> None:
    """Answer this rank's batches that are not done yet."""
    todo = [(work, batch) for work in works for batch in work.batches if (work.task.name, batch[0].id) not in done]
    todo = todo[ranks.rank :: ranks.world]
    formatters: dict[str, Formatter] = {}
    with (
        shard(Path(config.output), ranks.rank, ranks.world).open("a") as results,
        tqdm(
            total=sum(len(batch) for _, batch in todo),
            desc=Path(config.output).name,
            unit="item",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not ranks.is_zero,
        ) as bar,
    ):
        for work, batch in todo:
            name = work.task.name
            if name not in formatters:
                formatters[name] = arm.formatter(open_images(work.task, work.data, batch))
            rows = list(_answers(arm, formatters[name], work.task, batch, config.max_new_tokens))
            results.write("".join(json.dumps(row) + "\n" for row in rows))
            results.flush()
            bar.update(len(batch))


def _measured(work: Work, rows: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Return a task's metrics with their interval, writing the upload file where the benchmark has one."""
    said = {row["id"]: row["prediction"] for row in rows if row["task"] == work.task.name}
    pairs: list[Pair] = [(said[item.id], item) for batch in work.batches for item in batch]
    metrics = {**work.task.measure(pairs), "interval_95": interval(work.task, pairs)}
    if work.task.upload is not None:
        metrics["upload"] = work.task.upload(pairs, output).name
    return metrics


def _work(name: str, config: EvaluateConfig) -> Work:
    task, data = get_task(name), task_folder(config.data, name)
    items, size = read_items(task, data)[: config.limit], config.batch_size
    return Work(task, data, [items[start : start + size] for start in range(0, len(items), size)])


def _answers(arm: Arm, formatter: Formatter, task: Task, batch: list[Item], new: int) -> Iterator[dict]:
    """Generate the answers of one batch and score them."""
    samples = [Sample(item.id, item.source, item.image, (Turn(item.question, None),)) for item in batch]
    for item, answer in zip(batch, arm.answer(formatter, samples, new), strict=True):
        yield {
            "task": task.name,
            "id": item.id,
            "source": item.source,
            "image": item.image,
            "question": item.question,
            "answer": item.answer,
            "prediction": answer.text,
            "score": None if task.score is None else task.score(answer.text, item),
            "kept": answer.kept,
        }


def _manifest(config: EvaluateConfig, works: list[Work], arm: Arm) -> dict[str, Any]:
    """Return everything that decides an arm's numbers."""
    return {
        "format": 1,
        "complete": False,
        "model": config.model.model_dump(),
        "frozen_hash": arm.base.frozen_hash,
        "settings_hash": arm.base.settings_hash,
        "template_hash": hashlib.sha256(arm.template.encode()).hexdigest(),
        "projector": {
            "adapter": config.adapter,
            "hash": arm.projector_hash,
            "tuned_for": read_record(config.adapter)["pruning"] if config.adapter is not None else None,
        },
        "pruning": config.pruning.model_dump(),
        "tasks": {
            work.task.name: {
                "items": sum(len(batch) for batch in work.batches),
                "hash": items_hash([item for batch in work.batches for item in batch]),
                "protocol": work.task.protocol,
                "prompt": work.task.prompt,
            }
            for work in works
        },
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "image_processor": type(arm.processor.image_processor).__name__,
        "device": torch.cuda.get_device_name() if arm.device.type == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
