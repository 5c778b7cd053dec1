"""What an output folder can hold: which files a command writes there, and how an older folder is recognised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """What an output folder can hold.

    Attributes:
        name: what messages call it.
        files: the files that a command writes there, relative to the folder: ``#`` is a number, ``*`` anything within
            a name and ``**`` any path. What is named while it is written comes on top, see :meth:`OutputFolder.claim`.
        earlier: by which a folder of a version without ``.prunetune.json`` is recognised: files, each with some text
            that it holds.
        last: the file without which the others are worth nothing; it is removed first and written last.
    """

    name: str
    files: tuple[str, ...] = ()
    earlier: tuple[tuple[str, str], ...] = ()
    last: str = ""

    def wrote_earlier(self, folder: Path) -> bool:
        """Return whether a version without markers wrote this folder."""
        return bool(self.earlier) and all(_holds(folder / name, text) for name, text in self.earlier)

    def below(self, place: str) -> tuple[str, ...]:
        """Return the files of such a folder that lies in ``place`` of another one."""
        return tuple(f"{place}/{name}" for name in self.files)


def _holds(file: Path, text: str) -> bool:
    try:
        with file.open("rb") as stream:
            return text.encode() in stream.read(1 << 16)
    except OSError:
        return False


_TRACKED = (
    "config.yaml",
    "log.jsonl",
    "libraries.log",
    "wandb_id.txt",
    "wandb/latest-run",
    "wandb/debug*.log",
    "wandb/*run-#_#-*/**",
)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "prunetune.json", "README.md")
CHECKPOINT_FILES = (
    ".prunetune-new-*",  # a mark that was being written as the run was killed
    "adapter_*",
    "complete.json",
    "complete.json.partial",
    "ema.safetensors",
    "global_step#/*.pt",
    "held_out.json",
    "held_out_best.safetensors",
    "latest",
    "optimizer.pt",
    "README.md",
    "rng_state*.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "zero_to_*.py",
)


EVALUATION = Kind(
    "evaluation",
    (*_TRACKED, "manifest.json", "results.jsonl", "results.rank#.jsonl"),
    (("manifest.json", '"frozen_hash"'),),
)


RECALIBRATION = Kind(
    "recalibration",
    (
        *_TRACKED,
        "launch.log",
        "numbers.json",
        "finished.json",
        "finished.json.partial",
        *(f"adapter/{name}" for name in ADAPTER_FILES),
        *(f"best/{name}" for name in ADAPTER_FILES),
        *(f"checkpoint-#/{name}" for name in CHECKPOINT_FILES),
    ),
    (("config.yaml", "pruning:"), ("log.jsonl", '"learning_rate"')),
)


COMPARISON = Kind(
    "comparison",
    (*_TRACKED, "table.md", "table.csv", "table.tex", "table.json", "comparison.json", "plot.png"),
    (("table.csv", "tuned_minus_training_free"), ("table.md", "| arm |")),
)


FEATURES = Kind("feature cache", ("features.json", "features-#.safetensors", "libraries.log"), last="features.json")


TEACHER = Kind("teacher", ("teacher.json", "teacher-#.safetensors", "libraries.log"), last="teacher.json")


VISUALIZATION = Kind("visualization", ("libraries.log",), (("kept_00.png", "PNG"),))
ANALYSIS = Kind("analysis", ("analysis.json", "config.yaml", "index.md", "libraries.log"), last="analysis.json")
ANSWERS = Kind("figure of answers", ("answers.png",))
RATE = Kind("learning-rate sweep", ("lr_finder.json", "lr_finder.png", "libraries.log"))
DIAL = Kind("dial", ("dial.json", "dial.png", "libraries.log", *(f"adapter/{name}" for name in ADAPTER_FILES)))
SOUP = Kind("soup", tuple(f"adapter/{name}" for name in ADAPTER_FILES))
EXPORT = Kind("export", last="config.json")
DEMO = Kind(
    "demo",
    (
        ".prunetune-demo",  # of earlier versions
        "libraries.log",
        "launch.log",
        "recipe.yaml",
        "runs.json",
        "summary.md",
        "kept_tokens/kept_#.png",
        *EVALUATION.below("arms/*"),
        *RECALIBRATION.below("recalibrate"),  # of versions that recalibrated one method
        *RECALIBRATION.below("recalibrate/*"),
        *FEATURES.below("features/*"),
        *ANSWERS.below("answers"),
        *COMPARISON.below("comparison"),
        *VISUALIZATION.below("kept_tokens"),
    ),
    ((".prunetune-demo", ""),),
)


TABLE = Kind(
    "table",
    (
        *_TRACKED,
        "failures/*.txt",
        "launch.log",
        "runs.json",
        "submitit/**",
        "workers/#.log",
        "table.md",
        "table.csv",
        "table.tex",
        "table.json",
        "report.html",
        "plot.png",
        "comparison.json",
        "profile.json",
        "profile.md",
        *EVALUATION.below("arms/*/*/*"),
        *RECALIBRATION.below("trained/*/*"),
        *FEATURES.below("features/*"),
    ),
)
