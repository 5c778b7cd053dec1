"""The command line: what it lists, what it explains, and how it fails."""

import os
import subprocess
import sys

import click
import pytest
from conftest import ROOT, TINY_VLM

from prunetune.cli import commands, main, options_page
from prunetune.cli.reference import PAGE, reference
from prunetune.cli.schema import SchemaCommand, schema_options
from prunetune.configs.load import shipped_configs
from prunetune.scripts import listing


def every_command(group=commands, path=()):
    """Yield each command with the words that call it."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


ALL = dict(every_command())


def test_lists_name_everything(capsys):
    expected = {
        "pruners": ("divprune", "reconstruction", "cls_attention"),
        "families": ("llava_next", "crop"),
        "recipes": ("vg_textvqa_gqa", "tiny_world"),
        "tasks": ("tiny_world", "exact match"),
        "formats": ("llava_json", "shapes_world"),
        "signals": ("cls_attention", "B H N"),
        "stages": ("fastv", "arXiv 2403.06764", "attention", "numbered anew"),
        "templates": ("vicuna_v1", "the model's own"),
        "plugins": ("tiny_world",),
    }
    assert set(expected) == set(listing.ROWS)
    for what, names in expected.items():
        main(["list", what])
        printed = capsys.readouterr().out
        assert all(name in printed for name in names), printed


@pytest.mark.parametrize("what", listing.SLOW)
def test_the_kept_tables_are_those_of_the_files(what):
    """Written by ``python -m prunetune.scripts.listing`` whenever a method, a stage, a family or a signal changes."""
    assert listing._kept_rows()[what] == listing.ROWS[what]()


def test_a_changed_file_is_imported_instead_of_the_kept_table(monkeypatch):
    monkeypatch.setattr(listing, "_source_hash", lambda: "another")
    assert listing._kept_rows() == {}


@pytest.mark.parametrize(("arguments", "message"), [
    (["evalute"], "No such command 'evalute'. Did you mean 'evaluate'?"),
    (["compare", "a", "--quotd", "x"], "No such option '--quotd'. Did you mean '--quoted'?"),
    (["evaluate", "--config", "no.yaml"], "config file no.yaml does not exist"),
    (["evaluate", "--config", "no.yaml"], "; `prunetune configs list` names them"),
    (["evaluate"], "give --config FILE, or one of the names that `prunetune configs list` prints"),
    (["compare", "nowhere"], "nowhere is no evaluated arm"),
    (["recalibrate", "--config", "configs/recalibrate/tiny_divprune_16.yaml", "--train.lr", "1"],
     "train.lr: unknown key"),
    (["evaluate", "--config", str(ROOT / "configs/evaluate/tiny_dense.yaml"), "--pruning.pruner", "divprun", "--output",
      "{tmp}", "--model.path", str(TINY_VLM)], "did you mean 'divprune'"),
    (["evaluate", "--config", str(ROOT / "configs/evaluate/tiny_dense.yaml"), "--pruning.pruner", "divprune",
      "--pruning.keep", "200", "--output", "{tmp}", "--model.path", str(TINY_VLM)], "asks for 200 visual tokens"),
    (["configs", "show", "evaluate/tiny_dens"], "did you mean 'evaluate/tiny_dense'?"),
    (["list", "pruner"], "'pruner' is not one of"),
])  # fmt: skip
def test_errors_end_with_their_message_alone(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main([part.replace("{tmp}", str(tmp_path)) for part in arguments])
    assert message in str(end.value.code)


def test_all_errors_of_file_and_command_line_are_told_at_once(tmp_path):
    file = tmp_path / "arm.yaml"
    file.write_text("model: {path: x, dtyp: float32}\ntasks: []\noutput: out\n")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--config", str(file), "--batch_siz", "3", "--max_new_tokens=none", "--plugins", "[./no.py]"])
    message = str(end.value.code)
    assert "has 5 errors" in message and "no.py does not exist" in message
    for key in ("model.dtyp", "tasks", "batch_siz", "max_new_tokens", "plugins"):
        assert f"  {key}: " in message


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_lists_every_option_with_type_default_and_meaning(words, capsys):
    main([*words, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    command = ALL[words]
    assert command.help and command.help.split()[0] in printed
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.opts[0] in printed and option.help, option
            default = option.to_info_dict()["default"]
            if default not in (None, False, ()) and not option.required:
                assert f"[default: {default}]" in printed
    if isinstance(command, SchemaCommand):
        unbroken = printed.replace("- ", "-")  # lines are broken at hyphens as well
        own = {flag for param in command.params for flag in param.opts}
        for option in schema_options(command.schema):
            if option.flag in own:  # told of once, by the command's own
                assert unbroken.count(f"{option.flag} ") == 1, option.flag
                continue
            assert option.about, f"{option.flag} has no description in the schema"
            told = option.default if option.default is not None else "required"
            assert f"{option.flag} {option.type}" in printed and f"{told}]".replace("- ", "-") in unbroken
            assert option.about.replace("- ", "-") in unbroken


def test_the_reference_page_is_the_one_of_these_commands():
    """Written by ``python -m prunetune.cli.reference``."""
    assert PAGE.read_text() == reference()


def test_the_options_page_is_the_one_of_this_schema():
    """Written by the same command; every field of every section is on it."""
    page = options_page.PAGE.read_text()
    assert page == options_page.options_page()
    for schema in options_page.FILES.values():
        for option in schema_options(schema):
            assert f"| `{option.flag.removeprefix('--')}` |" in page, option


QUICK = [["--version"], ["--help"], *([*words, "--help"] for words in ALL), *(["list", what] for what in listing.ROWS),
         ["configs", "list"], ["configs", "show", "evaluate/tiny_dense"], ["completion", "bash"]]  # fmt: skip


def test_what_runs_no_model_imports_no_heavy_library():
    code = f"""
import sys
from prunetune.cli import main
for arguments in {QUICK!r}:
    main(arguments)
    heavy = [name for name in ("torch", "transformers", "datasets", "deepspeed", "wandb") if name in sys.modules]
    assert not heavy, (arguments, heavy)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_shipped_configurations_are_listed_shown_and_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["configs", "list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in shipped_configs())
    text = (ROOT / "configs/evaluate/tiny_dense.yaml").read_text()
    main(["configs", "show", "evaluate/tiny_dense"])
    assert capsys.readouterr().out == text
    main(["configs", "copy", "evaluate/tiny_dense"])
    assert (tmp_path / "tiny_dense.yaml").read_text() == text
    (tmp_path / "tiny_dense.yaml").write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        main(["configs", "copy", "evaluate/tiny_dense"])
    assert (tmp_path / "tiny_dense.yaml").read_text() == "mine"
    main(["configs", "copy", "evaluate/tiny_dense", "other.yaml"])
    assert (tmp_path / "other.yaml").read_text() == text


def test_completion_knows_commands_and_options():
    def completed(words):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "_PRUNETUNE_COMPLETE": "bash_complete",
                       "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        line = [sys.executable, "-m", "prunetune"]
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        return [row.partition(",")[2] for row in done.stdout.splitlines()]

    assert completed("prunetune ev") == ["evaluate"]
    assert completed("prunetune recalibrate --train.war") == ["--train.warmup_ratio"]


def test_the_environment_names_versions_and_plugins(capsys):
    import torch

    main(["env"])
    printed = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in printed and "plug-in       tiny_world" in printed


def test_export_writes_a_stock_checkpoint_and_refuses_what_is_no_adapter(tmp_path):
    with pytest.raises(SystemExit, match="is no recalibrated projector"):
        main(["export", "--model", str(TINY_VLM), "--adapter", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_dictionary_takes_single_keys():
    """``--pruning.options.NAME value`` sets one option of a method."""
    from prunetune.configs import EvaluateConfig, load_config

    config = load_config(EvaluateConfig, "evaluate/tiny_dense", ["--pruning.options.power", "2"])
    assert config.pruning.options == {"power": 2}
