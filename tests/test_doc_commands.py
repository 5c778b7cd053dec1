"""Every command that the documentation shows is run, by this file or by a test named below, or says what it needs.

A block whose commands can't run here begins with a comment that everybody sees: ``# needs: 8 GPUs with 80 GB``. Those
are read all the same: command, options and values must be there. All other lines stand in ``RUN_HERE`` or ``RUN_BY``.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib

import click
import pytest
from conftest import ROOT, TINY_VLM
from doc_commands import Shown, blocks, inline, lines, shown
from tuned import tuned

from prunetune import plugins
from prunetune.cli import commands, main
from prunetune.cli.commands.analyze import runs_as_list
from prunetune.cli.schema import SchemaCommand, schema_options
from prunetune.configs import (
    AnalyzeConfig,
    ConfigError,
    EvaluateConfig,
    RecalibrateConfig,
    ServeConfig,
    TableConfig,
    VisualizeConfig,
    load_config,
)
from prunetune.configs.load import shipped_configs
from prunetune.pruning import PruningSpec, registry

RUN_HERE = {
    "prunetune evaluate --config evaluate/tiny_dense": "--limit 16",
    "prunetune evaluate --config evaluate/tiny_divprune_16": "--limit 16",
    "prunetune evaluate --config evaluate/tiny_divprune_16 --adapter runs/recalibrate/tiny_divprune_16/adapter "
    "--output runs/evaluate/tiny_divprune_16_tuned": "--limit 16",
    "prunetune compare runs/evaluate/tiny_dense runs/evaluate/tiny_divprune_16 "
    "runs/evaluate/tiny_divprune_16_tuned": "",
    "prunetune verify runs/recalibrate/tiny_divprune_16/adapter": "",
    "prunetune export --model assets/tiny_vlm --adapter runs/recalibrate/tiny_divprune_16/adapter "
    "--output runs/merged": "",
    "prunetune visualize divprune fastervlm --keep 16": "--count 1",
    "prunetune visualize divprune visionzip --keep 16,25%": "--count 1 --output runs/two",
    "prunetune visualize --config visualize/tiny": "--count 1 --output runs/all",
    "prunetune visualize norm --keep 16 --plugins docs/examples/my_pruning/norm.py": "--count 1",
    "prunetune evaluate --config evaluate/tiny_divprune_16 --pruning.pruner norm --plugins "
    "'[docs/examples/my_pruning/norm.py]' --output runs/norm": "--limit 16",
    "prunetune plan --config recalibrate/tiny_divprune_16": "",
    "prunetune plan --config recalibrate/llava15_7b_prismprune_64 --gpus 1 --gpu h200": "",
    "prunetune plan --config recalibrate/llava15_7b_prismprune_64 --gpus 8 --gpu a100-80": "",
    "prunetune configs show tables/vispruner_llava15_7b": "",
    "prunetune configs list": "",
    "prunetune list pruners": "",
    "prunetune list tasks": "",
    "prunetune list plugins": "",
    "prunetune env": "",
}
"""Commands that run in seconds, in their order, and what makes them shorter still."""

RUN_BY = {
    "make demo": "tests/test_layout.py::test_the_quick_demo_from_the_wheel_recovers_what_pruning_lost",
    "prunetune demo --quick": "tests/test_layout.py::test_the_quick_demo_from_the_wheel_recovers_what_pruning_lost",
    "make test": ".ci/run",
    "prunetune recalibrate --config recalibrate/tiny_divprune_16": "tests/test_recalibrate.py",
    "prunetune recalibrate --config docs/examples/recalibrate_norm.yaml":
        "tests/test_plugins.py::test_the_examples_pruner_is_recalibrated_on_two_ranks_and_evaluated",
    "prunetune recalibrate --config C --train.start_from runs/first/adapter": "tests/test_start_from.py",
    "prunetune data prepare --recipe vg_textvqa_gqa":
        "tests/test_data_check.py::test_prepare_names_every_download_and_what_is_there",
    "prunetune teach --config FILE --output DIR --hidden":
        "tests/test_objectives.py::test_what_is_stored_is_what_the_live_teacher_says",
    "prunetune find-rate --config C [--lowest 1e-7] [--highest 1] [--steps 100] [--to DIR]":
        "tests/test_find_rate.py::test_the_tiny_vlm_twice_gives_the_same_numbers_and_the_run_is_untouched",
    "prunetune dial --adapter runs/x/adapter --strengths 0,0.25,0.5,0.75,1 --output runs/dial":
        "tests/test_dial.py::test_the_losses_are_those_of_the_held_out_samples_under_each_projector",
    "prunetune dial --adapter runs/x/adapter --choose --dense-within 0.01 --output runs/dial":
        "tests/test_dial.py::test_the_chosen_adapter_is_loaded_verified_and_evaluated_like_any_other",
    "prunetune export --model BASE --adapter runs/x/adapter --strength 0.7 --output merged":
        "tests/test_dial.py::test_an_export_at_a_strength_holds_the_same_projector",
    "prunetune soup runs/a/adapter runs/b/adapter runs/c/adapter --weights 1,1,2 --output runs/soup":
        "tests/test_soup.py::test_it_is_the_mean_of_the_tensors",
    "prunetune evaluate --config C --features /data/gqa": "tests/test_features.py::test_answers_equal_those_without_it",
    "prunetune score pope --predictions answers.jsonl --data /data/eval/pope":
        "tests/test_score.py::test_pope_pairs_by_question_and_not_by_order",
    "prunetune verify PATH": "tests/test_seals.py::test_verify_finds_everything_whole",
    "prunetune table --config tables/tiny": "tests/test_tables.py::test_cells_are_what_separate_evaluations_give",
    "prunetune table --config FILE --dry-run --gpu h200 --gpus 8":
        "tests/test_tables.py::test_the_plan_says_what_is_missing_and_what_it_costs",
    "prunetune profile --config tables/tiny --sizes 1,8 --clients 16":
        "tests/test_profile.py::test_every_arm_of_a_table_is_measured_beside_dense",
    "prunetune profile --config tables/vispruner_llava16_7b --analytic":
        "tests/test_profile.py::test_the_shape_alone_gives_a_table_and_writes_nothing",
    "pip install --no-deps --editable docs/examples":
        "tests/test_plugins.py::test_an_installed_package_is_found_by_its_entry_points",
    "python -m pytest docs/examples/tests": "tests/test_plugins.py::test_the_examples_pass_their_own_tests",
    "prunetune analyze --config analyze/tiny":
        "tests/test_analyze.py::test_the_page_shows_every_figure_and_the_record_seals_every_file",
    "prunetune analyze --runs runs/pope/dense runs/pope/fastervlm runs/pope/divprune":
        "tests/test_analyze.py::test_pope_rates_are_counted_by_hand_with_paired_differences",
    "prunetune calibrate --config FILE --pruning.stages '[{name: vtw}]' --count 20 --eta 0.003 --profile vtw.json":
        "tests/test_calibrate.py::test_the_layer_of_vtw_is_the_first_that_changes_answers_little",
    "prunetune evaluate --config FILE --pruning.stages '[{name: vtw}]' --pruning.profile vtw.json":
        "tests/test_calibrate.py::test_the_layer_of_vtw_is_the_first_that_changes_answers_little",
    "prunetune serve --config serve/tiny_divprune_16":
        "tests/test_serving.py::test_the_command_serves_and_ends_with_sigterm",
    "jupyter lab docs/notebooks/quickstart.ipynb": "tests/test_notebook.py",
}  # fmt: skip
"""Commands that other tests run, with other folders and fewer samples."""

WRITTEN = ("...", "shelves_64.yaml", "serve.yaml")
"""Configurations that a reader copies, or that a command writes."""
SHELL = ("trap", "wait", "[", "export", "mount", "printf", "curl", "cp", "cd", "served/serve.sh")
TOOLS = ("pip", "hf", "conda", "docker", "jupyter")
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.")
TINY = {
    EvaluateConfig: "evaluate/tiny_divprune_16",
    RecalibrateConfig: "recalibrate/tiny_divprune_16",
    TableConfig: "tables/tiny",
    AnalyzeConfig: "analyze/tiny",
    ServeConfig: "serve/tiny_divprune_16",
    VisualizeConfig: "visualize/tiny",
}
ALL = shown()
UNIQUE = {entry.line: entry for entry in ALL}


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """The plug-ins of the examples go with the test that loads them."""
    registry.registered_methods()
    for module, name in ((registry, "_METHODS"), (plugins, "_LOADED")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith("prunetune_plugin_"):
            del sys.modules[name]


def test_every_command_is_run_or_says_what_it_needs():
    told = [
        f"{entry.page}: {entry.line}"
        for entry in ALL
        if entry.needs is None and not {entry.line} & (RUN_HERE.keys() | RUN_BY.keys())
        if not entry.line.startswith("--")
    ]
    assert not told, (
        "say what these need in the first line of their block ('# needs: 8 GPUs'), or which test runs them in RUN_BY: "
        + "; ".join(told)
    )


def test_what_is_said_to_be_run_is_shown():
    assert not (RUN_HERE.keys() | RUN_BY.keys()) - UNIQUE.keys()


@pytest.mark.parametrize("where", sorted(set(RUN_BY.values())))
def test_the_test_that_runs_it_is_there(where):
    file, _, name = where.partition("::")
    text = (ROOT / file).read_text()
    assert not name or name in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("line", sorted(UNIQUE))
def test_what_is_shown_is_there(line):
    check(UNIQUE[line].words)


def test_what_is_said_in_passing_is_there():
    """``prunetune plan`` in a sentence: the command, and the options that are named."""
    for line, page in sorted({line: page for page, line in inline()}.items()):
        try:
            check(shlex.split(line.replace("\\|", "|").split("|")[0]), whole=False)
        except (AssertionError, click.ClickException, ValueError) as error:
            raise AssertionError(f"{page}: {line}: {error}") from error


def test_a_wrong_word_is_seen():
    """The checks themselves."""
    for line, message in [
        ("prunetune evalute --config C", "no command"),
        ("prunetune evaluate --confg C", "confg"),
        ("prunetune evaluate --config evaluate/tiny_dens", "no configuration"),
        ("prunetune evaluate --config C --pruning.pruner divprun", "divprun"),
        ("prunetune recalibrate --config C --train.batch_size many", "batch_size"),
        ("deepspeed --num_gpus 8 train/recalibrate.py --config C --train.learning_rat 1", "learning_rat"),
        ("torchrun --nproc_per_node 8 -m prunetune teach --config C --outptu x", "outptu"),
        ("prunetune dial --strengths 0,1", "--adapter"),
        ("python benchmarks/moving.py --clipz 4", "--clipz"),
        ("python benchmarks/nothing.py", "nothing.py"),
        ("make demos", "demos"),
        ("pip install '.[trane]'", "trane"),
        ("frobnicate --all", "frobnicate"),
        ("--train.learning_rat 1", "no option"),
    ]:
        with pytest.raises((AssertionError, click.ClickException, ConfigError, ValueError), match=message):
            check(Shown("page", line, None).words)
    block = "A='x y'  # set\nprunetune a \\\n    --b   c # said\n\nprunetune d '[1,\n 2]'\n"
    assert lines(block) == ["A='x y'", "prunetune a --b c", "prunetune d '[1, 2]'"]


def test_commands_of_the_pages_run(tmp_path, monkeypatch, capsys):
    """In their order, in one folder; the adapter is one that was not trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    tuned(TINY_VLM, tmp_path / "runs" / "recalibrate" / "tiny_divprune_16")
    for line, shorter in RUN_HERE.items():
        try:
            main(shlex.split(f"{line} {shorter}")[1:])
        except SystemExit as end:
            assert not end.code, f"{line}: {end.code}"
    printed = capsys.readouterr().out
    for part in ("| dense", "divprune + tuned projector", "71 min on 1 H200", "norm", "mmvet", "torch"):
        assert part in printed, part
    for file in ("evaluate/tiny_dense/manifest.json", "merged/model.safetensors", "norm/results.jsonl"):
        assert (tmp_path / "runs" / file).stat().st_size


def test_the_python_of_the_quick_start_runs(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "quickstart.md", "exec"), {})
    assert capsys.readouterr().out.startswith("['")


# ---- reading a command as its program would --------------------------------------------------------------------------


def check(words: list[str], whole: bool = True) -> None:
    """Check a command's program, options and values; with ``whole`` also that nothing it needs is missing."""
    if words[0] == "cd" and "&&" in words:
        words = words[words.index("&&") + 1 :]
    words = words[: words.index("&")] if "&" in words else words
    words = [word.strip("[]") if re.fullmatch(r"\[--.*|[^\[{]*\]", word) else word for word in words]
    program = words[0]
    module = re.search(r"(?:-m|--module) (prunetune\S*)|(train/recalibrate\.py)", " ".join(words))
    if program.startswith("--"):
        check_overrides(schema_with(program), None, words)
    elif program == "prunetune":
        check_prunetune(words[1:], whole)
    elif program in ("deepspeed", "torchrun", "srun", "python") and module:
        rest = words[words.index(module[1] or module[2]) + 1 :]
        check_prunetune(rest if module[1] == "prunetune" else ["recalibrate", *rest], whole)
    elif program == "python" and words[1].endswith(".py"):
        check_script(words[1:])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    elif program in TOOLS:
        check_extras(words)
    else:
        assert program in SHELL or (program in ("python", "torchrun") and words[-1] != program), (
            f"{program}: what is that?"
        )


def check_prunetune(words: list[str], whole: bool) -> None:
    """Read a command line with the command's own parser, and its configuration with the schema."""
    group, command, path = None, commands, []
    while isinstance(command, click.Group) and words:
        group, name = command, words[0]
        command = group.commands.get(name)
        if command is None and name.startswith("-"):
            return
        assert command is not None, f"no command {' '.join([*path, name])}"
        path, words = [*path, name], words[1:]
    if isinstance(command, click.Group):
        assert not whole
        return
    context = click.Context(command, info_name=path[-1], **command.context_settings)
    given = [word for before, word in zip(["", *words], words, strict=False) if word != "..." or before == "--config"]
    if given and given[-1].startswith("--") and not whole:  # an option without its value, as one speaks of it
        assert given[-1] in {flag for param in command.params for flag in param.opts} | {"--help"}
        return
    values, rest, _ = command.make_parser(context).parse_args(given)
    for param in command.params:
        missing = param.required and not values.get(param.name)
        assert not (missing and whole and "..." not in words), f"{path}: {param.opts} is missing"
        value = values.get(param.name)
        if value and not isinstance(param.type, (click.Path, click.File)) and not PLACEHOLDER.search(str(value)):
            param.type_cast_value(context, value)
    if isinstance(command, SchemaCommand) and isinstance(values.get("words"), list | tuple):
        check_flags(command.schema, [*values["words"], *rest])
    elif isinstance(command, SchemaCommand):
        rest = runs_as_list(rest) if command.name == "analyze" else rest
        check_overrides(command.schema, values.get("config"), rest)
    elif whole:
        assert not [word for word in rest if word.startswith("--")], rest


def check_overrides(schema, config: str | None, overrides: list[str]) -> None:
    """Load the configuration; a file that the reader is to write is the tiny one of its kind."""
    if config in shipped_configs() or (config and (ROOT / config).exists()):
        file = config
    else:
        known = config is None or config in WRITTEN or PLACEHOLDER.fullmatch(config)
        assert known, f"no configuration {config}"
        file = TINY[schema]
    if file and file.startswith("docs/"):
        file = str(ROOT / file)
    overrides = [word.replace("docs/examples", str(ROOT / "docs" / "examples")) for word in overrides]
    overrides = [word for word in overrides if word not in ("...", "./shelves.py")]
    loaded = load_config(schema, file, overrides)
    pruning = getattr(loaded, "pruning", None)
    if isinstance(pruning, PruningSpec) and pruning.profile is None:
        pruning.build()


def check_flags(schema, words: list[str]) -> None:
    """Check names of pruners, and options of a configuration that the command completes by itself."""
    known = {option.flag for option in schema_options(schema)}
    flags = [number for number, word in enumerate(words) if word.startswith("--")]
    assert {words[number] for number in flags} <= known, words
    names = {word for number, word in enumerate(words) if number not in flags and number - 1 not in flags}
    assert {name for name in names if not PLACEHOLDER.fullmatch(name)} <= {*registry.registered_methods(), "norm"}, (
        names
    )


def schema_with(flag: str):
    """Return the kind of configuration that an option alone belongs to."""
    for schema in TINY:
        if flag in {option.flag for option in schema_options(schema)}:
            return schema
    raise ValueError(f"no option {flag}")


def check_script(words: list[str]) -> None:
    """Check that a script is there, and names the options."""
    assert (ROOT / words[0]).exists(), words[0]
    text = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, word


def check_extras(words: list[str]) -> None:
    """Check extras of ours against pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for names in re.findall(r"^(?:\.|prunetune)\[(.+)\]$", word):
            assert set(names.split(",")) <= set(extras), names


def test_extras_that_pages_name_are_there():
    for page in {entry.page for entry in ALL}:
        for names in re.findall(r"prunetune\[([a-z,-]+)\]", (ROOT / page).read_text()):
            check_extras([f"prunetune[{names}]"])


def test_blocks_are_found():
    assert len(blocks(ROOT / "docs" / "guides" / "llava.md")) >= 7  # those in tabs as well
