"""Run the analyses of a configuration into one folder: tables, figures and the page that shows them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunetune.configs import AnalyzeConfig, to_yaml
from prunetune.data_recipes.placeholders import check_question
from prunetune.evaluation.analysis.complexity import Complexity
from prunetune.evaluation.analysis.concentration import Concentration
from prunetune.evaluation.analysis.corruption import Corruption, check_names, library
from prunetune.evaluation.analysis.diversity import Diversity
from prunetune.evaluation.analysis.hallucination import Hallucination
from prunetune.evaluation.analysis.images import Dataset, datasets_of
from prunetune.evaluation.analysis.look import Eye
from prunetune.evaluation.analysis.overlap import Overlap
from prunetune.evaluation.analysis.pages import INDEX, ImageAnalysis, Part, page
from prunetune.evaluation.analysis.positions import Positions
from prunetune.evaluation.analysis.record import FORMAT, RECORD
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash
from prunetune.models import Arm
from prunetune.models.code import code_record
from prunetune.models.seal import sealed
from prunetune.outputs import ANALYSIS, OutputFolder, write_text
from prunetune.plugins import plugin_records


def analyze(config: AnalyzeConfig, arm: Arm | None = None, bar: bool = True) -> Path:
    """Write the analyses of a configuration and return the page that shows them.

    Images are encoded once for all methods. Everything is written at once in the end: what an earlier call wrote there
    is replaced, and stays if this one fails.

    Args:
        config: what is looked at, and where it is written to.
        arm: one with the configuration's model and adapter that is loaded already, which keeps everything; None loads
            it.
        bar: whether a progress bar is shown.

    Raises:
        OutputError: if the folder holds something else, is in use, or can't be written.
        TaskError: for benchmarks, folders or runs that can't be analysed.
        CheckpointError, PruningError, DataError: for weights, pruners or images that can't work.
    """
    reads = (
        config.model.path if config.reads_images else None,
        config.adapter,
        config.data,
        config.images,
        *config.runs,
    )
    folder = OutputFolder(config.output, ANALYSIS, config.overwrite, reads=reads)
    with folder, folder.staged(whole=True) as new:
        # Before the model: a missing file should not wait for minutes of loading.
        datasets = datasets_of(config) if config.reads_images else []
        if config.reads_images and "corruption" in config.analyses:
            check_names(config.corruption.names)
            library()
        hallucination = Hallucination(config.runs, config.kinds, config.allow) if config.runs else None
        parts: list[Part] = []
        looked: dict[str, Any] = {}
        if datasets:
            if arm is None:
                arm = Arm.load(config.model, adapter=config.adapter)
            _check_is_configured(arm, config)
            if config.images is not None:
                check_question(arm.processor, config.question)
            eye = Eye(arm, {label: arm.with_pruning(spec) for label, spec in config.specs.items()})
            parts += _of_images(config, eye, datasets, new, bar)
            looked = _about_images(arm, eye, datasets)
        if hallucination is not None:
            parts.append(hallucination.write(new))
            looked["runs"] = hallucination.record()
        (new / INDEX).write_text(page("Analysis", _about(config, looked), parts), encoding="utf-8")
        (new / "config.yaml").write_text(to_yaml(config.model_copy(update={"overwrite": False})), encoding="utf-8")
        write_text(new / RECORD, _record(config, looked, new))
    return folder.path / INDEX


def _check_is_configured(arm: Arm, config: AnalyzeConfig) -> None:
    """Check that an arm which was loaded before is the one that the configuration asks for."""
    if (arm.base.config, arm.adapter) != (config.model, config.adapter) or arm.spec.pruner != "identity":
        raise TaskError(f"the arm that was loaded for {config.output} is not the unpruned one its configuration names")


def _of_images(config: AnalyzeConfig, eye: Eye, datasets: Sequence[Dataset], folder: Path, bar: bool) -> list[Part]:
    """Look at all images once, and write what each analysis found."""
    labels = list(eye.arms)
    makers: dict[str, Any] = {
        "complexity": lambda: Complexity(folder, eye.signal),
        "diversity": lambda: Diversity(folder, labels),
        "concentration": lambda: Concentration(folder, eye.signal, labels),
        "positions": lambda: Positions(labels),
        "overlap": lambda: Overlap(labels),
    }
    analyses: list[ImageAnalysis] = [make() for name, make in makers.items() if name in config.analyses]
    corruption = None
    if "corruption" in config.analyses:
        corruption = Corruption(eye, config.corruption, config.batch_size)
    total = sum(len(dataset.items) for dataset in datasets) if analyses else 0
    if corruption is not None:
        total += corruption.steps(datasets)
    with tqdm(total=total, desc="analyze", unit="image", dynamic_ncols=True, disable=not bar) as shown:
        for dataset in datasets if analyses else ():
            _look(eye, dataset, analyses, config.batch_size, shown)
        if corruption is not None:
            for dataset in datasets:
                corruption.run(dataset, shown.update)
    parts = [analysis.write(folder) for analysis in analyses]
    return parts if corruption is None else [*parts, corruption.write(folder)]


def _look(eye: Eye, dataset: Dataset, analyses: Sequence[ImageAnalysis], batch_size: int, shown: Any) -> None:
    for start in range(0, len(dataset.items), batch_size):
        items = dataset.items[start : start + batch_size]
        for item, looked in zip(items, eye.batch(dataset.images, dataset.samples(items)).looked(), strict=True):
            for analysis in analyses:
                analysis.add(dataset, str(item.image), looked)
        shown.update(len(items))


def _about_images(arm: Arm, eye: Eye, datasets: Sequence[Dataset]) -> dict[str, Any]:
    return {
        "frozen_hash": arm.base.frozen_hash,
        "original_projector_hash": arm.base.hashes.original_projector_hash,
        "projectors": list(arm.base.hashes.projectors),
        "settings_hash": arm.base.settings_hash,
        "projector_hash": arm.projector_hash,
        "device": str(arm.device),
        "attention": eye.signal,
        "datasets": {own.name: {"images": len(own.items), "hash": own.hash} for own in datasets},
    }


def _about(config: AnalyzeConfig, looked: dict[str, Any]) -> list[str]:
    """Return the first lines of the page: of what, and of how many images."""
    if not config.reads_images:
        return ["Of finished evaluations."]
    own = ", ".join(f"{name} ({about['images']} images)" for name, about in looked["datasets"].items())
    methods = ", ".join(f"{label} ({spec.keep})" for label, spec in config.specs.items())
    adapter = "" if config.adapter is None else f" with the projector of {config.adapter}"
    return [
        f"Of {config.model.path}{adapter} in {config.model.dtype}, on {own}; methods with their budgets: {methods}."
    ]


def _record(config: AnalyzeConfig, looked: dict[str, Any], folder: Path) -> str:
    """Return the sealed record: what was looked at by what, and the hash of every file."""
    packages = ("torch", "transformers", "numpy", "matplotlib")
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    record = {
        "format": FORMAT,
        "config": config.model_dump(mode="json", exclude={"overwrite"}),
        **looked,
        "prunetune": code_record(),
        "plugins": plugin_records(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "files": files,
    }
    return json.dumps(sealed(record), indent=2) + "\n"
