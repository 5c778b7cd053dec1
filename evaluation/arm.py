"""One arm: a model, a pruner, a projector and tasks, run into results.jsonl and manifest.json."""

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

from configs import EvaluateConfig, to_yaml
from data_recipes import Formatter, Sample, Turn
from data_recipes.formatting import template_text
from evaluation.ranks import Ranks, join_ranks
from evaluation.results import MANIFEST, gather, read_manifest, read_results, shard, start, write_json
from evaluation.score import interval
from evaluation.sources import open_images, read_items
from evaluation.tasks import Item, Task, get_task
from evaluation.tasks.base import Pair, items_hash, task_folder
from pruning import PrunedModel, PruningSpec
from pruning.checkpoint import (
    checkpoint_folder,
    frozen_hash,
    load_model,
    projector_state,
    read_record,
    settings_hash,
    tensor_hash,
)
from pruning.text import instruction_text


@dataclass(frozen=True)
class Work:
    """The items of one task, in their fixed batches."""

    task: Task
    data: Path
    batches: list[list[Item]]


def evaluate(config: EvaluateConfig, device: str | None = None) -> Path:
    """Run one arm and return its folder; a run that was killed goes on with the batches that are not done.

    Batches are cut the same way in every run and dealt to the ranks in turn (``torchrun`` or ``deepspeed`` start
    several), so an interrupted run, an uninterrupted one and one on several ranks write the same results.

    Raises:
        TaskError: if the folder holds results of another configuration, naming the field.
        CheckpointError, PruningError, DataError: for weights, pruners or pictures that can't work.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    ranks = join_ranks()
    works = [_work(name, config) for name in config.tasks]
    model, processor = load_model(
        **config.model.model_dump(include={"path", "revision", "dtype", "attention"}), adapter=config.adapter
    )
    model.to(device or (f"cuda:{ranks.local}" if torch.cuda.is_available() else "cpu"))
    pruned = PrunedModel(model, PruningSpec(**config.pruning.model_dump()), processor.tokenizer)
    manifest = _manifest(config, works, pruned, processor)
    batches = {work.task.name: [[item.id for item in batch] for batch in work.batches] for work in works}
    if ranks.chief:
        start(output, manifest)
        (output / "config.yaml").write_text(to_yaml(config))
        gather(output, batches)
    ranks.wait()
    done = {(row["task"], row["id"]) for row in read_results(output)}
    ranks.wait()  # nobody appends before everybody has read

    began = time.monotonic()
    _run(config, works, pruned, processor, done, ranks)
    seconds = time.monotonic() - began
    ranks.wait()
    if ranks.chief:
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
    ranks.leave()
    return output


def _run(
    config: EvaluateConfig,
    works: list[Work],
    pruned: PrunedModel,
    processor: Any,
    done: set[tuple[str, str]],
    ranks: Ranks,
) -> None:
    """Answer this rank's batches that are not done yet."""
    todo = [(work, batch) for work in works for batch in work.batches if (work.task.name, batch[0].id) not in done]
    todo = todo[ranks.rank :: ranks.world]
    read = instruction_text if pruned.reads_text else None
    formatters: dict[str, Formatter] = {}
    with (
        shard(Path(config.output), ranks.rank, ranks.world).open("a") as results,
        torch.inference_mode(),
        tqdm(
            total=sum(len(batch) for _, batch in todo),
            desc=Path(config.output).name,
            unit="item",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not ranks.chief,
        ) as bar,
    ):
        for work, batch in todo:
            name = work.task.name
            if name not in formatters:
                images = open_images(work.task, work.data, batch)
                formatters[name] = Formatter(
                    processor, images, config.model.template, config.model.square, instructions=read
                )
            rows = list(_answers(pruned, formatters[name], work.task, batch, config.max_new_tokens))
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


def _answers(pruned: PrunedModel, formatter: Formatter, task: Task, batch: list[Item], new: int) -> Iterator[dict]:
    """Generate the answers of one batch and score them."""
    samples = [Sample(item.id, item.source, item.image, (Turn(item.question, None),)) for item in batch]
    inputs = {
        name: value.to(pruned.model.device) if isinstance(value, torch.Tensor) else value
        for name, value in formatter.prompt_batch(samples).items()
    }
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(pruned.model.dtype)
    tokens = pruned.generate(**inputs, max_new_tokens=new, do_sample=False)
    texts = formatter.processor.batch_decode(tokens, skip_special_tokens=True)
    assert pruned.last is not None  # generate has just run
    kept = iter(pruned.last.kept)  # per picture, in reading order
    for item, text in zip(batch, texts, strict=True):
        prediction = text.strip()
        yield {
            "task": task.name,
            "id": item.id,
            "source": item.source,
            "image": item.image,
            "question": item.question,
            "answer": item.answer,
            "prediction": prediction,
            "score": None if task.score is None else task.score(prediction, item),
            "kept": next(kept) if item.image is not None else 0,
        }


def _manifest(config: EvaluateConfig, works: list[Work], pruned: PrunedModel, processor: Any) -> dict[str, Any]:
    """Return everything that decides an arm's numbers."""
    folder = checkpoint_folder(config.model.path, config.model.revision)
    template = template_text(processor, config.model.template)
    return {
        "format": 1,
        "complete": False,
        "model": config.model.model_dump(),
        "frozen_hash": frozen_hash(folder, pruned.family.projectors),
        "settings_hash": settings_hash(folder),
        "template_hash": hashlib.sha256(template.encode()).hexdigest(),
        "projector": {
            "adapter": config.adapter,
            "hash": tensor_hash(projector_state(pruned.model)),
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
        "image_processor": type(processor.image_processor).__name__,
        "device": torch.cuda.get_device_name() if pruned.model.device.type == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


__all__ = ["evaluate", "read_manifest", "read_results"]
