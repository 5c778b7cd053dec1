"""What carries over to real models: for each finding the launch line that would test it, with its planned cost."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from findings_study.results import Results
from prunetune.configs import RecalibrateConfig, load_config
from prunetune.models.blueprint import model_without_weights
from prunetune.train.gpus import GPUS
from prunetune.train.plan import Plan, duration, make_plan

CONFIG = "recalibrate/llava15_7b_prismprune_64"
QUICK = f"{CONFIG}_quick"
GPU = "h200"
PRUNERS = (
    "[{pruner: fastervlm}, {pruner: vispruner, weight: 1.5}, {pruner: prismprune}, {pruner: divprune, weight: 3.0}]"
)
BUDGETS = "[32, 64, 144, 288]"
"""The shares that 8, 16, 36 and 72 are of 144 tokens, of LLaVA-1.5's 576."""
ELASTIC = ["--elastic.pruners", PRUNERS, "--elastic.budgets", BUDGETS]
ROBUST = ["--objective.terms", "{gce: 1.0, hidden: 1.0}"]


@dataclass(frozen=True)
class Check:
    """A finding and what would test it.

    Attributes:
        finding: what is asked, with the table that answers it for the tiny VLM.
        config: the shipped configuration.
        options: what differs from it.
        times: how many runs of the line there are, for other pruners, budgets or values.
        then: what is done with the result.
    """

    finding: str
    config: str
    options: list[str]
    times: int = 1
    then: str = ""


CHECKS = [
    Check(
        "Is one elastic projector near its specialists, and what does it cost without pruning (table 1)?",
        CONFIG,
        [*ELASTIC, *ROBUST],
        then="Evaluate it at every pruner and budget, and with `--pruning.pruner identity`; a learning rate for it "
        "comes from `prunetune find-rate` with the same options.",
    ),
    Check(
        "The sixteen specialists that it stands against (table 1), here the one of DivPrune at 64.",
        CONFIG,
        ["--pruning.pruner", "divprune", "--pruning.keep", "64"],
        times=16,
    ),
    Check(
        "Do few questions bring most of the gain (table 6)? 20,000 samples of GQA, which is also the cheap test to "
        "begin with, and what the lines below differ from.",
        QUICK,
        [*ELASTIC, *ROBUST],
    ),
    Check(
        "Does seeing the data unpruned explain the gain (table 3)? The dense control.",
        QUICK,
        ["--pruning.pruner", "identity", "--pruning.keep", "100%"],
        then="Evaluate it at 64 tokens of each pruner.",
    ),
    Check(
        "How much of the gain is about few tokens, whichever they are (table 3)? Random pruning. A picture keeps one "
        "draw there, where it had a new one every time here.",
        QUICK,
        ["--elastic.pruners", "[{pruner: random}]", "--elastic.budgets", BUDGETS, "--elastic.dense", "0.0"],
        then="Evaluate it at 64 tokens of each pruner.",
    ),
    Check(
        "Must training and evaluation choose by the same projector, and does it matter which (table 4)?",
        QUICK,
        ["--pruning.pruner", "divprune", "--pruning.choose_with", "original"],
        then="Its twin has `--pruning.choose_with tuned`.",
    ),
    Check(
        "Which objective (table 5)? ce, gce, kl, hidden and their sums, one run each.",
        QUICK,
        [*ELASTIC, "--objective.terms", "{kl: 1.0}"],
        times=6,
    ),
    Check(
        "Does a share of whole pictures keep the accuracy without pruning (table 8)?",
        QUICK,
        [*ELASTIC, *ROBUST, "--elastic.dense", "0.0"],
        then="Line 3 has the share of 1/4.",
    ),
]


def options_text(options: list[str]) -> str:
    """Return options as a shell takes them; those of an elastic run are in a variable."""
    if options[: len(ELASTIC)] == ELASTIC:
        rest = options_text(options[len(ELASTIC) :])
        return f'"${{E[@]}}" {rest}'.rstrip()
    return " ".join(option if option.startswith("--") else shlex.quote(option) for option in options)


@cache
def _model(path: str) -> object:
    return model_without_weights(path)


def planned(config: str, options: list[str]) -> Plan:
    """Return the plan of a run on one GPU, with the teacher beside it where there is one."""
    loaded = load_config(RecalibrateConfig, config, [*options, "--output", "unused"])
    return make_plan(loaded, GPUS[GPU], 1, model=_model(loaded.model.path))  # type: ignore[arg-type]


NEEDS = "# needs: a GPU with 80 GB, LLaVA-1.5-7B and its data"
"""What tests/test_doc_commands.py reads of blocks that it can't run."""


def section(results: Results) -> Iterator[str]:
    """Yield the last section."""
    yield "## What carries over to real models"
    yield ""
    yield (
        "Nothing of this page was measured on a real model. For each question that it asks, the line that would answer "
        "it on LLaVA-1.5-7B, with "
        f"what `prunetune plan` expects on one {GPU.upper()} (planned, not measured, at an assumed 45 % of its "
        "peak; a teacher's "
        "forward pass with all 576 tokens is counted in). Budgets are the same shares of the tokens as here."
    )
    yield ""
    yield "```bash"
    yield NEEDS
    yield "D=(--data.file llava_v1_5_mix665k.json --data.image_root images)"
    yield f"E=({ELASTIC[0]} '{PRUNERS}'"
    yield f"   {ELASTIC[2]} '{BUDGETS}')"
    yield "```"
    yield ""
    yield "In a configuration's YAML, line 1 differs from the shipped one by"
    yield ""
    yield "```yaml"
    yield "elastic:"
    yield f"  pruners: {PRUNERS}"
    yield f"  budgets: {BUDGETS}"
    yield "  dense: 0.25"
    yield "objective:"
    yield "  terms: {gce: 1.0, hidden: 1.0}"
    yield "```"
    yield ""
    for number, check in enumerate(CHECKS, 1):
        plan = planned(check.config, check.options)
        cost = duration(plan.seconds)
        if check.times > 1:
            cost = f"{cost} each, {duration(check.times * plan.seconds)} for {check.times}"
        teacher = plan.cost.teacher / plan.cost.total
        told = f", {teacher:.0%} of it the teacher" if teacher else ""
        yield f"{number}. {check.finding} Planned: {cost}{told}, {plan.load.samples:,} samples. {check.then}".rstrip()
        yield ""
        yield "   ```bash"
        yield f"   {NEEDS}"
        yield f'   prunetune recalibrate --config {check.config} "${{D[@]}}" --output runs/findings/{number} \\'
        yield f"       {options_text(check.options)}"
        yield "   ```"
        yield ""
    yield from _without_training()


def _without_training() -> Iterator[str]:
    """Yield what takes no training at all."""
    yield (
        f"{len(CHECKS) + 1}. Without any further training: the mean of specialists (table 3) and the dial (table 9)."
    )
    yield ""
    yield "   ```bash"
    yield f"   {NEEDS}"
    yield "   prunetune soup runs/a/adapter runs/b/adapter runs/c/adapter runs/d/adapter --output runs/findings/soup"
    yield "   prunetune export --model llava-hf/llava-1.5-7b-hf --adapter runs/findings/2/adapter --strength 0.5 \\"
    yield "       --output runs/findings/half"
    yield "   ```"
    yield ""
    yield "What should not be expected to carry over as it is:"
    yield ""
    yield (
        "* The size of the gains. The tiny VLM was trained to lose up to half of its tokens, and falls apart "
        "beyond that, "
        "which a real VLM does less; what pruning does not cost can't be brought back."
    )
    yield "* Learning rates: 5e-3 fits 33,000 weights of width 128; the papers' 2e-5 is LLaVA's own."
    yield "* How many questions suffice: this world has eight kinds of questions and 80 words."
