"""What shipped configurations cost, into their headers and the page: ``python -m prunetune.scripts.planned``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from prunetune.configs import RecalibrateConfig, load_config
from prunetune.models.blueprint import model_without_weights
from prunetune.train.gpus import GPUS
from prunetune.train.plan import Plan, budgets, duration, make_plan

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "recalibrate"
PAGE = ROOT / "docs" / "recalibration.md"
BEGIN, END = "<!-- begin: python -m prunetune.scripts.planned -->\n", "<!-- end -->\n"
COST = re.compile(r"^# Cost:.*\n(#   .*\n)*", re.MULTILINE)
HEADER = (
    "| configuration | tokens a sample | FLOP | 8 A100-80 | 1 H200 | largest token budget on 80 GB | on an H200 |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def planned_files() -> list[Path]:
    """Return the shipped recalibrations of real models."""
    return [path for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith("tiny")]


def plans(file: Path) -> tuple[Plan, Plan]:
    """Return a configuration's plans on 8 A100 with 80 GB and on one H200."""
    config = load_config(RecalibrateConfig, file)
    model = _model(config.model.path)
    many = make_plan(config, GPUS["a100-80"], 8, model=model)
    return many, make_plan(config, GPUS["h200"], 1, load=many.load, model=model)


_model = cache(model_without_weights)


def header_of(file: Path, many: Plan, one: Plan) -> str:
    """Return a configuration's text with what it costs in its header."""
    sentence = (
        f"Cost: {duration(many.seconds)} on 8 A100-80, {duration(one.seconds)} on 1 H200 (planned, not measured: "
        f"{many.cost.total:.2g} FLOP at an assumed MFU of {many.mfu:.0%}, {many.load.samples:,} samples of about "
        f"{many.load.tokens:,.0f} tokens; prunetune plan --config recalibrate/{file.stem} --gpus 8 --gpu a100-80)."
    )
    lines = textwrap.wrap(sentence, 116, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return COST.sub("".join(f"# {line}\n" for line in lines), file.read_text(), count=1)


def page_with(rows: list[str]) -> str:
    """Return the page with the table of all shipped configurations."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join([*HEADER, *rows]) + "\n" + END + after


def written() -> Iterator[tuple[Path, str]]:
    """Yield every file that holds plans, with the text that it should have."""
    rows = []
    for file in planned_files():
        many, one = plans(file)
        yield file, header_of(file, many, one)
        small, large = budgets(many.needs, many.gpu)["plain"], budgets(one.needs, one.gpu)["plain"]
        rows.append(
            f"| `{file.stem}` | {many.load.tokens:,.0f} | {many.cost.total:.2g} | {duration(many.seconds)} | "
            f"{duration(one.seconds)} | {small:,} | {large:,} |"
        )
    yield PAGE, page_with(rows)


if __name__ == "__main__":
    for path, text in written():
        path.write_text(text)
