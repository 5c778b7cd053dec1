"""``prunetune score``."""

import json
from pathlib import Path

import click

from prunetune.cli.options import plugins_option


@click.command("score")
@click.argument("task")
@click.option("--predictions", type=Path, required=True, help="our results.jsonl or LLaVA's answers.jsonl")
@click.option("--data", type=Path, required=True, help="folder with the published annotation files")
@click.option("--protocol", help="whose rules; each task has its own by default, some can be scored by others")
@click.option("--grader", metavar="URL", help="OpenAI-compatible endpoint that judges open answers too")
@click.option("--grader-model", default="gpt-3.5-turbo", help="the model's name there")
@plugins_option
def command(
    task: str, predictions: Path, data: Path, protocol: str | None, grader: str | None, grader_model: str
) -> None:
    """Re-score saved predictions without a model; TASK is a name from `prunetune list tasks`."""
    from prunetune.evaluation.report.grader import Grader
    from prunetune.evaluation.report.score import score_file

    judge = Grader(grader, grader_model) if grader else None
    print(json.dumps(score_file(task, predictions, data, protocol, judge), indent=2))
