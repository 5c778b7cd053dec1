"""The ``prunetune`` command line: reads arguments, calls one function, prints where the results are."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {}


def command(name: str, about: str) -> Callable[[Callable[[list[str]], None]], Callable[[list[str]], None]]:
    """Register a subcommand."""

    def register(function: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
        COMMANDS[name] = (function, about)
        return function

    return register


@command("demo", "the whole story on the bundled tiny VLM: prune, recalibrate, compare (CPU, minutes)")
def demo(arguments: list[str]) -> None:
    """Run the demo."""
    from prunetune.scripts.demo import run_demo

    parser = argparse.ArgumentParser("prunetune demo")
    parser.add_argument("--quick", action="store_true", help="fewer scenes and training samples: at most 2 minutes")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args(arguments)
    run_demo(options.output, quick=options.quick)


@command("recalibrate", "launch DeepSpeed to recalibrate a projector: --config FILE.yaml [--section.field value]")
def recalibrate(arguments: list[str]) -> None:
    """Launch the trainer on all or ``devices`` devices."""
    from prunetune.scripts.launch import launch_recalibration

    file, overrides = _config_and_overrides(arguments)
    sys.exit(launch_recalibration(file, overrides))


@command("evaluate", "run one arm on tasks: --config FILE.yaml [--section.field value]")
def evaluate(arguments: list[str]) -> None:
    """Evaluate one arm."""
    from prunetune.configs import EvaluateConfig, load_config, to_yaml
    from prunetune.models.ranks import launched_ranks
    from prunetune.scripts.tracked import tracked_evaluate

    file, overrides = _config_and_overrides(arguments)
    config = load_config(EvaluateConfig, file, overrides)
    if launched_ranks().is_zero:
        print(to_yaml(config))
    folder = tracked_evaluate(config)
    if launched_ranks().is_zero:
        print(f"results: {folder}")


@command("compare", "one table of dense, training-free and tuned arms: RUN RUN ... [--output DIR]")
def compare(arguments: list[str]) -> None:
    """Compare evaluated arms."""
    from prunetune.configs import TrackingConfig
    from prunetune.evaluation.report.quoted import read_quoted
    from prunetune.evaluation.report.table import to_markdown
    from prunetune.scripts.tracked import tracked_compare

    parser = argparse.ArgumentParser("prunetune compare")
    parser.add_argument("runs", nargs="+", type=Path, help="folders written by prunetune evaluate")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder of the table and the plot")
    parser.add_argument("--wandb", choices=["off", "auto", "offline", "online"], default="off")
    parser.add_argument(
        "--difficulty-filter", type=Path, metavar="RUN", help="compare only what this downsample arm gets wrong"
    )
    parser.add_argument("--quoted", type=Path, help="YAML list of rows from papers, shown and marked as quoted")
    options = parser.parse_args(arguments)
    quoted = read_quoted(options.quoted) if options.quoted else []
    tracking = TrackingConfig(wandb=options.wandb)
    rows = tracked_compare(options.runs, options.output, tracking, options.difficulty_filter, quoted)
    print(to_markdown(rows, quoted))
    print(f"table.md, table.csv, plot.png: {options.output}")


@command("score", "re-score saved predictions without a model: TASK --predictions FILE --data DIR")
def score(arguments: list[str]) -> None:
    """Print one JSON object with every metric of the task."""
    import json

    from prunetune.evaluation.report.grader import Grader
    from prunetune.evaluation.report.score import score_file

    parser = argparse.ArgumentParser("prunetune score")
    parser.add_argument("task", help="a name from `prunetune list tasks`")
    parser.add_argument("--predictions", type=Path, required=True, help="our results.jsonl or LLaVA's answers.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="folder with the published annotation files")
    parser.add_argument("--protocol", help="whose rules; each task has one, which is the default")
    parser.add_argument("--grader", metavar="URL", help="OpenAI-compatible endpoint that judges open answers too")
    parser.add_argument("--grader-model", default="gpt-3.5-turbo")
    options = parser.parse_args(arguments)
    grader = Grader(options.grader, options.grader_model) if options.grader else None
    result = score_file(options.task, options.predictions, options.data, options.protocol, grader)
    print(json.dumps(result, indent=2))


@command("data", "check a recipe's data, or say what to download: check | prepare --recipe R --image-root DIR")
def data(arguments: list[str]) -> None:
    """Check or prepare data."""
    from prunetune.scripts.data_commands import run

    run(arguments)


@command("calibrate", "measure how complex a data sample is: --config FILE.yaml [--count N] [--section.field value]")
def calibrate(arguments: list[str]) -> None:
    """Measure effective rank and attention entropy, and write their means to the configuration of `adaptive`."""
    from prunetune.configs import RecalibrateConfig, load_config
    from prunetune.evaluation.run.calibrate import calibrate as measure
    from prunetune.evaluation.run.calibrate import write_averages

    parser = argparse.ArgumentParser("prunetune calibrate", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="a recalibration's YAML; its options are updated")
    parser.add_argument("--count", type=int, default=512, help="how many samples")
    parser.add_argument("--batch-size", type=int, default=8)
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(RecalibrateConfig, options.config, overrides)
    result = measure(config, options.count, options.batch_size)
    print(f"{result.items} items of recipe {config.data.recipe}, pruner {config.pruning.pruner}\n")
    print(result.to_markdown())
    if config.pruning.pruner == "adaptive":
        written = write_averages(options.config, result)
        print(f"\nwritten to {options.config}: " + ", ".join(f"{name}: {value}" for name, value in written.items()))
    else:
        print("\nnothing written: the averages are options of `adaptive`")


@command("export", "merge a recalibrated projector into a full stock checkpoint")
def export(arguments: list[str]) -> None:
    """Export a merged checkpoint."""
    from prunetune.configs import ModelConfig
    from prunetune.models import Arm, export_merged

    parser = argparse.ArgumentParser("prunetune export")
    parser.add_argument("--model", required=True, help="folder or hub id of the base")
    parser.add_argument("--revision")
    parser.add_argument("--adapter", required=True, help="the adapter folder of a recalibration")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = ModelConfig(path=options.model, revision=options.revision, dtype=options.dtype)
    arm = Arm.load(config, adapter=options.adapter, device="cpu")
    export_merged(arm.model, arm.processor, options.output)
    print(f"stock checkpoint and mm_projector.bin: {options.output}")


@command("visualize", "draw the tokens that methods keep over pictures")
def visualize(arguments: list[str]) -> None:
    """Draw kept tokens."""
    from prunetune.configs import ModelConfig
    from prunetune.evaluation.run.visualize import visualize as draw
    from prunetune.pruning import PruningSpec

    parser = argparse.ArgumentParser("prunetune visualize")
    parser.add_argument("--model", default="assets/tiny_vlm")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--pruners", nargs="+", default=["fastervlm", "vispruner", "prismprune", "divprune"])
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--text-tower", help="CLIP checkpoint of the vision tower, for methods that read the question")
    parser.add_argument("--task", default="tiny_world_validation")
    parser.add_argument("--data", help="folder of the benchmark's published files")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/visualize"))
    options = parser.parse_args(arguments)
    specs = [PruningSpec(name, options.keep, text_tower=options.text_tower) for name in options.pruners]
    config = ModelConfig(path=options.model, dtype=options.dtype)
    for path in draw(config, specs, options.task, options.count, options.output, options.data):
        print(path)


@command("list", "what there is: pruners, families, recipes or tasks")
def list_what(arguments: list[str]) -> None:
    """List what can be named in a configuration."""
    from prunetune.scripts.listing import LISTS

    parser = argparse.ArgumentParser("prunetune list")
    parser.add_argument("what", choices=sorted(LISTS))
    print(LISTS[parser.parse_args(arguments).what]())


def _config_and_overrides(arguments: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    options, overrides = parser.parse_known_args(arguments)
    return options.config, overrides


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand; errors of the user's making end with their message alone."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in COMMANDS:
        lines = [f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items()]
        usage = "usage: prunetune COMMAND [...]\n\n" + "\n".join(lines)
        known = not arguments or arguments[0] in ("-h", "--help")
        print(usage) if known else sys.exit(f"error: unknown command {arguments[0]!r}\n\n{usage}")
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from prunetune.configs import ConfigError
    from prunetune.data_recipes import DataError
    from prunetune.evaluation.tasks import TaskError
    from prunetune.pruning import PruningError

    try:
        COMMANDS[arguments[0]][0](arguments[1:])
    except (ConfigError, DataError, PruningError, TaskError) as error:  # anything else is a bug and shows where it is
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
