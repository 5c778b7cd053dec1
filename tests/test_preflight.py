"""What is wrong is told before any rank starts, what a rank is told by whom, and what its marks hold."""

import json
import os

import pytest
from conftest import TINY_VLM

from prunetune.cli import main
from prunetune.configs import ConfigError
from prunetune.scripts import launch as launching
from prunetune.train.checkpoints import (
    BrokenMark,
    Mark,
    check_files,
    check_made_with,
    file_hashes,
    find_checkpoint,
    finished_step,
    mark_finished,
    other_code,
    read_mark,
)
from prunetune.train.launchers import complete_environment, first_host

TINY = ["recalibrate", "--config", "recalibrate/tiny_divprune_16", "--model.path", str(TINY_VLM)]


@pytest.mark.parametrize(("options", "message"), [
    (["--pruning.pruner", "divprun"], "unknown pruner 'divprun', did you mean 'divprune'?"),
    (["--pruning.options", "{nonsense: 1}"], "nonsense"),
    (["--pruning.keep", "0"], "keeps at least 1 visual token"),
    (["--pruning.keep", "200"], "asks for 200 visual tokens, but each item has only 144"),
    (["--pruning.pruner", "cdpruner"], "text_tower"),
    (["--pruning.pruner", "trim", "--pruning.text_tower", "nowhere"], "text_tower"),
    (["--data.recipe", "nowhere"], "unknown recipe 'nowhere'"),
    (["--data.recipe", "vg_textvqa_gqa", "--data.file", "{tmp}/no.json"], "no.json does not exist"),
    (["--data.recipe", "vg_textvqa_gqa", "--data.file", "{tmp}/broken.json"], "broken.json"),
    (["--data.image_root", "{tmp}/nowhere"], "nowhere is no folder"),
    (["--model.path", "{tmp}/nowhere"], "neither a folder nor a checkpoint"),
    (["--model.path", "{tmp}"], "lacks its .safetensors weights"),
    (["--model.path", "{tmp}/cut"], "model.safetensors can't be read"),
    (["--model.template", "vicuna_v2"], "unknown template 'vicuna_v2'"),
    (["--model.attention", "flash_attention_2"], "can't be loaded as it is configured"),
    (["--train.deepspeed", "zero9"], "neither zero1, zero2, zero3 nor the path of a DeepSpeed JSON"),
    (["--train.trainable", "[projectr]"], "no module is called 'projectr'"),
    (["--train.trainable", "[vision_tower]"], "the trainable set must be exactly the projector"),
    (["--train.epochs", ".inf"], "train.epochs: input should be a finite number, got inf"),
    (["--train.epochs", ".nan"], "train.epochs: input should be"),
    (["--tracking.wandb", "online"], "no W&B key"),
    (["--output", "{tmp}/broken.json"], "broken.json is a file, and a folder is needed"),
])  # fmt: skip
def test_nothing_is_started_for_what_can_not_work(options, message, tmp_path, monkeypatch):
    def started(*_, **__):
        raise AssertionError("the launcher was started")

    monkeypatch.setattr(launching.subprocess, "Popen", started)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "broken.json").write_text('[{"conversations": [')
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes((TINY_VLM / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(SystemExit) as end:
        main([*TINY, "--output", str(tmp_path / "out"), *(part.replace("{tmp}", str(tmp_path)) for part in options)])
    assert message in str(end.value.code)


def test_float16_on_a_cpu_that_can_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_fp16_supported", lambda: False, raising=False)
    with pytest.raises(SystemExit, match="DeepSpeed can't train in float16 on this CPU"):
        main([*TINY, "--output", str(tmp_path), "--model.dtype", "float16"])


# ---- who started a rank ----------------------------------------------------------------------------------------


def test_a_process_without_a_launcher_is_the_only_rank():
    environment = {}
    complete_environment(environment)
    assert {**environment, "MASTER_PORT": ""} == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}  # fmt: skip


def test_a_launchers_own_words_stay_as_they_are():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    complete_environment(environment)
    assert environment == {"RANK": "3", "WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


def test_srun_says_which_rank_a_task_is():
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711",
            "SLURM_STEP_NODELIST": "gpu[03-04]", "MASTER_PORT": "777"}  # fmt: skip
    complete_environment(step)
    assert (step["RANK"], step["LOCAL_RANK"], step["WORLD_SIZE"]) == ("9", "1", "16")
    assert (step["MASTER_ADDR"], step["MASTER_PORT"]) == ("gpu03", "777")


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu03", "gpu03"), ("gpu03,gpu04", "gpu03"), ("gpu[03-05,9],login", "gpu03"), ("a-b[1,3]", "a-b1"),
    ("rack1-n[2-4]-ib,x", "rack1-n2-ib"), ("node-1.cluster", "node-1.cluster"),
])  # fmt: skip
def test_the_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first


# ---- marks -----------------------------------------------------------------------------------------------------


def checkpoint(output, step, settings, made_with=None):
    folder = output / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "rng_state_0.pth").write_bytes(os.urandom(64))
    (folder / "global_step" / "mp_rank_00_model_states.pt").write_bytes(os.urandom(64))
    Mark(step, settings, made_with or {}, file_hashes(folder)).write(folder / "complete.json")
    return folder


def cut(folder):
    (folder / "rng_state_0.pth").write_bytes(b"cut off")


def exchanged(folder):
    (folder / "global_step" / "mp_rank_00_model_states.pt").write_bytes(os.urandom(64))


def added(folder):
    (folder / "global_step" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"cos\nsystem\n")


def removed(folder):
    (folder / "rng_state_0.pth").unlink()


def half_a_mark(folder):
    (folder / "complete.json").write_text((folder / "complete.json").read_text()[:40])


def a_list(folder):
    (folder / "complete.json").write_text("[1]")


def first_format(folder):
    (folder / "complete.json").write_text('{"step": 12, "settings": {"seed": 1}}')


@pytest.mark.parametrize("damage", [cut, exchanged, added, removed, half_a_mark, a_list, first_format])
def test_the_newest_whole_checkpoint_is_found(tmp_path, damage):
    for step in (3, 9):
        checkpoint(tmp_path, step, {"seed": 1})
    newest = checkpoint(tmp_path, 12, {"seed": 1})
    (tmp_path / "checkpoint-15").mkdir()  # without a mark: killed while it was written
    assert find_checkpoint(tmp_path, {"seed": 1}).folder == newest
    damage(newest)
    found = find_checkpoint(tmp_path, {"seed": 1})
    assert found.folder == tmp_path / "checkpoint-9" and found.mark.step == 9
    assert list(found.damaged) == [newest] and found.damaged[newest]


def test_a_run_of_damaged_checkpoints_alone_does_not_begin_anew_in_silence(tmp_path):
    cut(checkpoint(tmp_path, 3, {}))
    with pytest.raises(ConfigError, match=r"no checkpoint in .* \(checkpoint-3: rng_state_0.pth is not what was"):
        find_checkpoint(tmp_path, {})


def test_files_of_desktops_and_file_systems_damage_nothing(tmp_path):
    folder = checkpoint(tmp_path, 3, {})
    (folder / ".nfs0000").write_text("")
    assert find_checkpoint(tmp_path, {}).folder == folder


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    checkpoint(tmp_path, 3, {}, {"base model": "a", "original projector": "b"})
    found = find_checkpoint(tmp_path, {})
    check_made_with(found, {"base model": "a", "original projector": "b"})
    with pytest.raises(ConfigError, match="checkpoint-3 was made with another original projector than there is now"):
        check_made_with(found, {"base model": "a", "original projector": "c"})


def test_a_checkpoint_of_another_version_is_gone_on_with_and_told(tmp_path):
    now = {"version": "2", "sha256": "b" * 64, "commit": None, "dirty": None}
    checkpoint(tmp_path, 3, {}, {"prunetune": {**now, "version": "1", "sha256": "a" * 64}})
    found = find_checkpoint(tmp_path, {})
    check_made_with(found, {"prunetune": now})
    assert other_code(found, {"prunetune": now}) == (
        f"{found.folder} was written by prunetune 1 (source aaaaaaaa) and is gone on with by 2 (source bbbbbbbb)"
    )
    assert other_code(found, {"prunetune": {**now, "sha256": "a" * 64}}) is None


def test_a_run_has_finished_while_its_adapter_is_as_it_was_written(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("1")
    assert finished_step(tmp_path, {"seed": 1}) is None
    mark_finished(tmp_path, 6, {"seed": 1}, {})
    assert finished_step(tmp_path, {"seed": 1}) == 6
    with pytest.raises(ConfigError, match="a run with other settings for seed has finished"):
        finished_step(tmp_path, {"seed": 2})
    (tmp_path / "adapter" / "weights").write_text("2")
    with pytest.raises(ConfigError, match="its adapter was changed since: adapter/weights is not what was written"):
        finished_step(tmp_path, {"seed": 1})


def test_a_mark_is_read_as_it_was_written(tmp_path):
    mark = Mark(3, {"seed": 1}, {"base model": "a"}, {})
    mark.write(tmp_path / "complete.json")
    assert read_mark(tmp_path / "complete.json") == mark
    values = json.loads((tmp_path / "complete.json").read_text())
    (tmp_path / "complete.json").write_text(json.dumps({**values, "files": ["x"]}))
    with pytest.raises(BrokenMark, match="does not hold what it should"):
        read_mark(tmp_path / "complete.json")
    with pytest.raises(BrokenMark, match="gone is missing"):
        check_files(tmp_path, Mark(3, {}, {}, {"gone": "0"}))
