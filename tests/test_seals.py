"""The chain of seals: what was changed between the base and the results is refused by name, and found by verify."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from conftest import ROOT, TINY_VLM, scene_sample
from safetensors.torch import load_file, save_file

import prunetune
from prunetune.cli import main
from prunetune.configs import EvaluateConfig, ModelConfig, RecalibrateConfig, TrackingConfig, load_config
from prunetune.data_recipes import load_recipe
from prunetune.evaluation.records import read_manifest, read_results, results_hash, write_manifest, write_results
from prunetune.evaluation.report.compare import compare
from prunetune.evaluation.report.comparison import read_comparison
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import TaskError
from prunetune.models import Arm, CheckpointError, export_merged, read_record, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.models.card import adapter_card
from prunetune.models.hashes import tensor_hash
from prunetune.models.record import RECORD, portable, text_of
from prunetune.models.seal import sealed
from prunetune.models.stored import base_hashes, not_finite, stored_projector_hash
from prunetune.pruning import PruningError, PruningSpec
from prunetune.scripts.tracked import tracked_compare
from prunetune.scripts.verify import verify
from prunetune.tiny_world.recipe import SceneImages
from prunetune.train.record import run_record

EARLIER = ROOT / "tests" / "data" / "arm_format_1"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class World:
    """One of everything that prunetune writes, about one base: never changed, tests take copies."""

    folder: Path
    base: Path

    @property
    def adapter(self):
        return self.folder / "run" / "adapter"

    def arm(self, name):
        return self.folder / "arms" / name


def evaluated(world, name, *overrides, base=None):
    options = ["--model.path", str(base or world.base), "--model.dtype", "float32", "--tasks",
               "[tiny_world_validation]", "--limit", "8", "--batch_size", "8", "--max_new_tokens", "3",
               "--output", str(world.arm(name))]  # fmt: skip
    return evaluate(load_config(EvaluateConfig, None, [*options, *overrides]))


DIVPRUNE = ("--pruning.pruner", "divprune", "--pruning.keep", "16")


def recalibrated(base, output, spec, change):
    """Write what a recalibration writes, with weights that were not trained for it."""
    values = {"model": {"path": str(base), "dtype": "float32"}, "pruning": spec.model_dump(), "output": str(output),
              "data": {"recipe": "tiny_world", "max_samples": 4}}  # fmt: skip
    config = RecalibrateConfig.model_validate(values)
    data = load_recipe("tiny_world", max_samples=4)
    arm = Arm.load(config.model, config.pruning, device="cpu")
    tensors = {name: change(tensor.clone()) for name, tensor in projector_state(arm.model).items()}
    record = run_record(config, data, arm, tensors, 7, None)
    output.mkdir(parents=True)
    (output / "config.yaml").write_text(f"model: {{path: {base}}}\n")
    write_adapter(output / "adapter", tensors, wrap_projector(arm.model), record)


@pytest.fixture(scope="module")
def world(untrained_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seals")
    base = folder / "the_base"
    shutil.copytree(untrained_folder, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a base\n")
    world = World(folder, base)
    recalibrated(base, folder / "run", PruningSpec("divprune", 16), lambda tensor: tensor * -1)
    evaluated(world, "dense")
    evaluated(world, "free", *DIVPRUNE)
    evaluated(world, "tuned", *DIVPRUNE, "--adapter", str(world.adapter))
    arms = [world.arm(name) for name in ("dense", "free", "tuned")]
    tracked_compare(arms, folder / "comparison", TrackingConfig())
    main(["export", "--model", str(base), "--adapter", str(world.adapter), "--output", str(folder / "export"),
          "--rows", str(folder / "comparison" / "table.csv")])  # fmt: skip
    return world


@pytest.fixture
def copy(world, tmp_path):
    """Copy everything but the base, to be damaged."""
    for name in ("run", "arms", "comparison", "export"):
        shutil.copytree(world.folder / name, tmp_path / name)
    return World(tmp_path, world.base)


def rewritten(file, change):
    """Change the tensors of a safetensors file."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def states(checks):
    return {check.link: check.holds for check in checks}


def broken(path, **options):
    return sorted(check.link for check in verify(path, **options) if check.holds is False)


# ---- hashes ----------------------------------------------------------------------------------------------------


def test_hashes_of_files_are_those_of_the_tensors_in_every_dtype(tmp_path):
    tensors = {"b.weight": torch.randn(3, 4), "a.bias": torch.randn(5), "c": torch.tensor(2.5), "d": torch.empty(0, 3)}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file({f"base_model.model.{name}": tensor for name, tensor in cast.items()}, tmp_path / "t.safetensors")
        assert stored_projector_hash(tmp_path / "t.safetensors") == tensor_hash(cast), dtype
        assert not_finite(tmp_path / "t.safetensors") == []
        if dtype.is_floating_point:
            for value in (torch.nan, torch.inf, -torch.inf):
                save_file(cast | {"c": torch.tensor(value, dtype=dtype)}, tmp_path / "n.safetensors")
                assert not_finite(tmp_path / "n.safetensors") == ["c"], (dtype, value)


def test_the_hash_of_an_earlier_version_is_the_same():
    """The frozen hash of the bundled model, as the version before the seals wrote it."""
    earlier = json.loads((EARLIER / "manifest.json").read_text())["frozen_hash"]
    assert base_hashes(TINY_VLM, ("multi_modal_projector",)).frozen_hash == earlier


# ---- the base's projector --------------------------------------------------------------------------------------


def test_a_merged_model_is_not_taken_for_the_training_free_base(copy, world, tmp_path):
    """Its weights alone, put in the base's place: frozen hash and settings are the base's."""
    merged = tmp_path / "merged"
    shutil.copytree(world.base, merged)
    shutil.copy(world.folder / "export" / "model.safetensors", merged / "model.safetensors")
    forged = evaluated(copy, "forged", *DIVPRUNE, base=merged)
    path = forged / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["path"] = str(world.base)
    path.write_text(json.dumps(sealed(manifest)))
    one, other = read_manifest(copy.arm("dense")), read_manifest(forged)
    assert one.frozen_hash == other.frozen_hash and one.settings_hash == other.settings_hash
    with pytest.raises(TaskError, match="differ in original_projector_hash") as refused:
        compare([copy.arm("dense"), forged, copy.arm("tuned")])
    assert "\n" not in str(refused.value)
    assert "original_projector_hash" in broken(forged)


def test_an_adapter_is_refused_on_another_projector_of_the_same_base(world, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(world.base, merged)
    shutil.copy(world.folder / "export" / "model.safetensors", merged / "model.safetensors")
    expected = base_hashes(world.base, ("multi_modal_projector",)).original_projector_hash
    found = base_hashes(merged, ("multi_modal_projector",)).original_projector_hash
    with pytest.raises(CheckpointError, match=f"started from {expected[:12]}, this base holds {found[:12]}"):
        Arm.load(ModelConfig(path=str(merged), dtype="float32"), adapter=world.adapter, device="cpu")


def test_an_export_is_a_tuned_arm_and_never_training_free(copy):
    folder = evaluated(copy, "exported", *DIVPRUNE, base=copy.folder / "export")
    manifest = read_manifest(folder)
    assert manifest.projector.adapter is None and manifest.projector.tuned_for["pruner"] == "divprune"
    with pytest.raises(TaskError, match="has no training-free arm"):
        compare([folder])


# ---- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: rewritten(f / WEIGHTS, lambda n, t: t / 2), "was changed after it was written: its tensors' hash is"),
    (lambda f: edit(f, projector_hash="0" * 64), "its seal is"),
    (lambda f: edit(f, seal=None), "its seal is"),
    (lambda f: edit(f, step=9999), "can't be trusted: it was changed after it was written"),
    (lambda f: forge(f, projector_hash="0" * 64), "its record says 000000000000"),
    (lambda f: forge(f, original_projector_hash=None), "lacks 'original_projector_hash'"),
    (lambda f: forge(f, projector_hash=None), "lacks 'projector_hash'"),
    (lambda f: (f / RECORD).write_text("[]"), "it holds list, expected an object"),
    (lambda f: edit(f, format=7), "has format 7, this version reads 1 and 2"),
    (lambda f: with_nan(f), "holds NaN or infinity as float32"),
])  # fmt: skip
def test_a_changed_adapter_is_refused_by_every_use(copy, damage, message, tmp_path):
    damage(copy.adapter)
    model = ModelConfig(path=str(copy.base), dtype="float32")
    free = Arm.load(model, PruningSpec("divprune", 16), device="cpu")
    uses = {
        "load": lambda: Arm.load(model, adapter=copy.adapter, device="cpu"),
        "with_adapter": lambda: free.with_adapter(copy.adapter),
        "prunetune.load": lambda: prunetune.load(copy.adapter, device="cpu"),
        "evaluate": lambda: evaluated(copy, "again", *DIVPRUNE, "--adapter", str(copy.adapter)),
    }
    for name, use in uses.items():
        with pytest.raises(CheckpointError, match=message) as refused:
            use()
        assert "\n" not in str(refused.value), name
    with pytest.raises(SystemExit, match=message):
        main(["export", "--model", str(copy.base), "--adapter", str(copy.adapter), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert broken(copy.adapter) != []


def edit(folder, **fields):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | fields))


def forge(folder, **fields):
    """Change fields and seal the record anew."""
    (folder / RECORD).write_text(text_of(json.loads((folder / RECORD).read_text()) | fields))


def with_nan(folder):
    rewritten(folder / WEIGHTS, lambda n, t: t.index_fill(0, torch.tensor([0]), torch.nan))
    forge(folder, projector_hash=stored_projector_hash(folder / WEIGHTS))


def test_a_projector_that_overflows_is_not_exported(world, tmp_path):
    """Finite in the file, infinite in float16."""
    recalibrated(world.base, tmp_path / "run", PruningSpec("divprune", 16), lambda tensor: tensor * 1e6)
    adapter = str(tmp_path / "run" / "adapter")
    arguments = ["export", "--model", str(world.base), "--adapter", adapter, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="holds NaN or infinity as float16"):
        main([*arguments, "--dtype", "float16"])
    arm = Arm.load(ModelConfig(path=str(world.base), dtype="float32"), device="cpu")
    with torch.no_grad():
        next(iter(projector_state(arm.model).values())).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="the projector: .* holds NaN"):
        export_merged(arm.model, arm.processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_an_earlier_version_is_read_and_its_hash_checked(copy):
    record = json.loads((copy.adapter / RECORD).read_text())
    for name in ("seal", "original_projector_hash", "projectors", "prunetune", "text_tower_hash", "license"):
        del record[name]
    (copy.adapter / RECORD).write_text(json.dumps(record | {"format": 1}))
    Arm.load(ModelConfig(path=str(copy.base), dtype="float32"), adapter=copy.adapter, device="cpu")
    found = states(verify(copy.adapter))
    assert found["projector_hash"] and found["seal"] is None and found["original_projector_hash"] is None
    rewritten(copy.adapter / WEIGHTS, lambda n, t: t / 2)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        Arm.load(ModelConfig(path=str(copy.base), dtype="float32"), adapter=copy.adapter, device="cpu")


def test_the_record_names_no_folder_of_this_machine(world):
    record = read_record(world.adapter)
    assert record["base_model"] == record["model"]["path"] == "the_base" and record["license"] == "apache-2.0"
    for file in [
        *world.adapter.iterdir(),
        *(world.folder / "export").glob("*.json"),
        world.folder / "export/README.md",
    ]:
        assert str(world.folder).encode() not in file.read_bytes(), file
    assert json.loads((world.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "the_base"
    assert portable("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf" and portable("C:\\models\\x") == "x"


def test_a_text_tower_that_was_changed_is_refused(tmp_path):
    tower = tmp_path / "clip"
    shutil.copytree(TINY_VLM / "clip", tower)
    spec = PruningSpec("trim", 16, text_tower=str(tower))
    recalibrated(TINY_VLM, tmp_path / "run", spec, lambda tensor: tensor)
    adapter, model = tmp_path / "run" / "adapter", ModelConfig(path=str(TINY_VLM), dtype="float32")
    record = read_record(adapter)
    assert len(record["text_tower_hash"]) == 64 and record["pruning"]["text_tower"] == "clip"
    arm = prunetune.load(adapter, base=TINY_VLM, text_tower=str(tower), device="cpu")
    assert arm.text_tower_hash == record["text_tower_hash"]
    assert arm.with_pruning(PruningSpec("divprune", 16)).text_tower_hash is None
    rewritten(tower / "model.safetensors", lambda n, t: t + 0.5 if "text_projection" in n else t)
    with pytest.raises(CheckpointError, match="was recalibrated with another text tower"):
        Arm.load(model, spec, adapter, device="cpu")


# ---- results ---------------------------------------------------------------------------------------------------


def edited_rows(folder, change, reseal=False):
    rows = read_results(folder)
    rows[3] = change(rows[3])
    write_results(folder, rows)
    if reseal:
        write_manifest(folder, read_manifest(folder).model_copy(update={"results_hash": results_hash(folder)}))


def test_edited_scores_are_refused_by_row(copy):
    folder = copy.arm("free")
    name = read_results(folder)[3].id
    edited_rows(folder, lambda row: row.model_copy(update={"score": 1 - row.score}), reseal=True)
    with pytest.raises(TaskError, match=f"row '{name}' of tiny_world_validation has score . ?, its prediction"):
        compare([folder])
    assert broken(folder) == ["scores"]


def test_edited_predictions_and_questions_are_refused(copy):
    said, asked = copy.arm("free"), copy.arm("dense")
    edited_rows(said, lambda row: row.model_copy(update={"prediction": row.prediction + " "}))
    with pytest.raises(TaskError, match="was changed after it was written: its hash is"):
        compare([said])
    assert broken(said) == ["results_hash"]
    edited_rows(asked, lambda row: row.model_copy(update={"answer": row.prediction, "score": 1.0}), reseal=True)
    with pytest.raises(TaskError, match="the questions of tiny_world_validation are not those of the manifest"):
        compare([asked])
    assert broken(asked) == ["questions"]


def test_an_edited_manifest_is_refused(copy):
    path = copy.arm("free") / "manifest.json"
    path.write_text(path.read_text().replace('"accuracy": ', '"accuracy": 1'))
    with pytest.raises(
        TaskError, match=r"manifest.json can't be trusted: it was changed after it was written: its seal"
    ):
        compare([copy.arm("free")])
    assert broken(copy.arm("free")) == ["seal"]


def test_scores_of_a_benchmark_that_is_not_loaded_say_what_to_load(copy):
    folder = copy.arm("free")
    for file in ("results.jsonl", "manifest.json"):
        text = (folder / file).read_text().replace("tiny_world_validation", "colours_of_mine")
        (folder / file).write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    plugin = {"name": "my_pruning.colours", "version": "1", "sha256": "0"}
    manifest |= {"results_hash": results_hash(folder), "plugins": [plugin]}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(TaskError, match=r"'colours_of_mine' is not loaded here; .*: --plugins my_pruning.colours"):
        compare([folder])


def test_arms_of_other_code_are_not_a_pair(copy):
    code = json.loads((copy.arm("free") / "manifest.json").read_text())["prunetune"]
    assert len(code["sha256"]) == 64 and code["version"] == json.loads(json.dumps(code))["version"]
    arms = [copy.arm(name) for name in ("dense", "free", "tuned")]
    for fields, message in (
        ({"version": "9"}, r"differ in prunetune.version \('0.1.0' and '9'\)"),
        ({"sha256": "f" * 64}, r"ran with different sources of prunetune: 0.1.0 \(source"),
    ):
        path = copy.arm("tuned") / "manifest.json"
        path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"prunetune": code | fields})))
        with pytest.raises(TaskError, match=message):
            compare(arms)
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"prunetune": code | {"commit": "x"}})))
    assert len(compare(arms).rows) == 3  # a commit alone changes no number


def test_unsealed_arms_are_compared_among_themselves_alone(copy, tmp_path):
    assert compare([EARLIER]).rows[0].kept == 16
    with pytest.raises(TaskError, match="did not record the base's projector .format 1.*evaluate it again"):
        compare([EARLIER, copy.arm("free")])
    assert states(verify(EARLIER))["seal"] is None and states(verify(EARLIER))["scores"]


# ---- verify ----------------------------------------------------------------------------------------------------


def test_verify_finds_everything_whole(world, capsys):
    links = {"seal", "projector_hash", "frozen_hash", "original_projector_hash", "settings_hash", "text_tower_hash"}
    for path in (world.adapter, world.folder / "run", world.arm("tuned"), world.folder / "export"):
        found = states(verify(path, base=str(world.base)))
        assert {*links, "prunetune"} - {"projector_hash"} <= found.keys() and False not in found.values(), (path, found)
        assert found["prunetune"] and found["frozen_hash"] and found["original_projector_hash"]
    found = states(verify(world.folder / "comparison"))
    assert len(found) == 10 and set(found.values()) == {True}
    with pytest.raises(SystemExit) as end:
        main(["verify", str(world.folder / "run")])  # the base is found through the run's own configuration
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "nothing is broken" in printed and "original_projector_hash  holds" in printed


def test_verify_says_what_it_can_not_check(copy, capsys):
    (copy.folder / "run" / "config.yaml").unlink()
    found = states(verify(copy.adapter))
    assert found["frozen_hash"] is None and found["settings_hash"] is None and found["projector_hash"]
    shutil.rmtree(copy.arm("dense"))
    found = states(verify(copy.folder / "comparison"))
    assert found["arm dense"] is None and found["numbers"] is None and found["arm free"]
    with pytest.raises(SystemExit, match="holds neither prunetune.json nor manifest.json nor comparison.json"):
        main(["verify", str(copy.folder)])


def test_verify_finds_what_is_broken(copy, tmp_path, capsys):
    table = copy.folder / "comparison" / "table.csv"
    table.write_text(table.read_text().replace("100.0000", "100.1"))
    assert broken(copy.folder / "comparison") == ["numbers", "table.csv"]
    table = copy.folder / "comparison" / "table.json"
    table.write_text(table.read_text().replace('"kept": 16.0', '"kept": 17.0'))
    assert broken(copy.folder / "comparison") == ["numbers", "table.csv", "table.json"]
    evaluated(copy, "other", *DIVPRUNE)
    shutil.copy(copy.arm("other") / "manifest.json", copy.arm("dense") / "manifest.json")
    assert "arm dense" in broken(copy.folder / "comparison")
    export = copy.folder / "export"
    rewritten(export / "model.safetensors", lambda n, t: t * 2 if "projector" in n else t)
    config = json.loads((export / "config.json").read_text())
    del config["prunetune"]
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        main(["verify", str(export)])
    assert end.value.code == 1 and "broken: export, prunetune" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="its projector are|its projector"):
        prunetune.load(export, device="cpu")


def test_verifying_an_arm_or_a_comparison_imports_no_torch(world):
    code = (
        "import sys; from prunetune.cli import main\n"
        "for path in sys.argv[1:]:\n"
        "    try: main(['verify', path])\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    paths = [world.arm("tuned"), world.folder / "comparison", world.adapter, world.folder / "export"]
    line = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


# ---- what travels: cards, one call to load, the hub ------------------------------------------------------------


def header_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_cards_say_what_the_projector_is_for(world):
    card, export = (world.adapter / "README.md").read_text(), (world.folder / "export" / "README.md").read_text()
    header = header_of(card)
    assert header["library_name"] == "peft" and header["license"] == "apache-2.0"
    assert {"prunetune", "visual-token-pruning"} <= set(header["tags"]) and "base_model" not in header
    assert header_of(export)["library_name"] == "transformers"
    for text in (card, export):
        assert "worse than the untouched base" in text and "tuned for divprune at 16 visual tokens" in text
        assert "recipe `tiny_world`, 4 samples" in text and "steps: 7" in text and "prunetune.load(" in text
    assert "## Measured" not in card and "| divprune + tuned projector | 16 |" in export
    named = header_of(adapter_card(read_record(world.adapter) | {"base_model": "llava-hf/llava-1.5-7b-hf"}))
    assert named["base_model"] == "llava-hf/llava-1.5-7b-hf" and named["base_model_relation"] == "adapter"
    config = json.loads((world.folder / "export" / "config.json").read_text())["prunetune"]
    assert config["pruning"]["keep"] == 16 and "worse than the untouched base" in config["warning"]


def test_the_lines_of_the_card_run_as_they_stand(world, capsys):
    card = (world.folder / "export" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER_OR_HUB_ID", str(world.folder / "export"))
    names = {"image": SceneImages().open("scene:1", "1"), "prompt": "USER: <image>\nwhat is shown ? ASSISTANT:"}
    exec(compile(code, "card", "exec"), names)
    assert capsys.readouterr().out.startswith("['") and names["arm"].spec.keep == 16


def test_export_warns(world, capsys, tmp_path):
    main(["export", "--model", str(world.base), "--adapter", str(world.adapter), "--output", str(tmp_path / "out")])
    warned = capsys.readouterr().out.splitlines()[-1]
    assert warned.startswith("warning: tuned for divprune at 16 visual tokens: without this pruning it answers worse")


def test_a_card_is_written_anew_unless_somebody_edited_it(copy, world, tmp_path):
    table = world.folder / "comparison" / "table.csv"
    before = (copy.adapter / "README.md").read_text()
    main(["card", str(copy.adapter), "--rows", str(table)])
    card = copy.adapter / "README.md"
    assert "| divprune + tuned projector | 16 |" in card.read_text()
    main(["card", str(copy.adapter)])
    assert card.read_text() == before and broken(copy.adapter, base=str(copy.base)) == []
    other = tmp_path / "other.csv"
    digits = read_record(copy.adapter)["projector_hash"][:16]
    other.write_text(table.read_text().replace(digits, "0" * 16))
    foreign = tmp_path / "foreign.csv"
    foreign.write_text(table.read_text().replace(read_record(copy.adapter)["frozen_hash"][:16], "0" * 16))
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    for file, message in (
        (other, f"has no row of the projector {digits}"),
        (foreign, "ran on frozen weights 0000"),
        (tmp_path / "no.csv", "it lacks arm, kept"),
        (tmp_path / "missing.csv", "does not exist"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["card", str(copy.adapter), "--rows", str(file)])
    card.write_text(before.replace("# the_base", "# My model"))
    with pytest.raises(SystemExit, match="was written or edited by somebody else"):
        main(["card", str(copy.adapter)])
    assert "# My model" in card.read_text()


def answers(arm):
    return arm.answer(arm.formatter(SceneImages()), [scene_sample(10_000_001, "where is the circle ?", None)], 6)


def test_one_call_loads_the_pruned_tuned_model(world):
    model = ModelConfig(path=str(world.base), dtype="float32")
    tuned = Arm.load(model, PruningSpec("divprune", 16), world.adapter, device="cpu")
    expected = answers(tuned)
    assert expected[0].kept == 16 and expected != answers(tuned.with_adapter(None))
    # The base by the configuration of the run beside the adapter, by hand, or within the export.
    for arm in (
        prunetune.load(world.adapter, device="cpu"),
        prunetune.load(world.folder / "run", device="cpu"),
        prunetune.load(world.adapter, base=world.base, device="cpu"),
        prunetune.load(world.folder / "export", device="cpu"),
    ):
        assert answers(arm) == expected and arm.projector_hash == tuned.projector_hash


def test_what_can_not_be_loaded_says_what_to_give(copy, tmp_path):
    (copy.folder / "run" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="'the_base' is neither .* give its folder or hub id as base="):
        prunetune.load(copy.adapter, device="cpu")
    with pytest.raises(CheckpointError, match="is an export, which holds its base; leave base away"):
        prunetune.load(copy.folder / "export", base=copy.base, device="cpu")
    with pytest.raises(CheckpointError, match="is neither a folder nor a projector on the hub"):
        prunetune.load("nobody/nothing", device="cpu")
    with pytest.raises(CheckpointError, match="prunetune.json is missing"):
        prunetune.load(copy.base, device="cpu")
    pruning = read_record(copy.adapter)["pruning"] | {"pruner": "mine"}
    forge(copy.adapter, pruning=pruning, plugins=[{"name": "my_pruning.norm", "version": "1", "sha256": ""}])
    with pytest.raises(PruningError, match=r"tuned with the plug-ins my_pruning.norm: load them first"):
        prunetune.load(copy.adapter, base=copy.base, device="cpu")


def cached(cache, repository, folder):
    """Lay a folder down as huggingface_hub keeps a repository that was downloaded."""
    home = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)


def test_hub_ids_are_loaded_from_the_cache_without_a_network(copy, tmp_path):
    forge(copy.adapter, base_model="me/base")
    cached(tmp_path / "cache", "me/tuned", copy.adapter)
    cached(tmp_path / "cache", "me/base", copy.base)
    code = "import prunetune; arm = prunetune.load('me/tuned', device='cpu'); print(arm.projector_hash, arm.spec.keep)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [read_manifest(copy.arm("tuned")).projector.hash, "16"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; what it was sent is kept."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.sent.append((self.path, body, self.headers.get("Authorization")))
        address = f"http://{self.headers['Host']}/me/tuned"
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            return self.answer(200, {"commitUrl": f"{address}/commit/1", "commitOid": "1", "url": address})
        return self.answer(200, {"url": address, "name": "me/tuned", "id": "1"})

    def do_GET(self):
        self.answer(200, {"id": "me/tuned", "sha": "0" * 40, "siblings": []})

    def answer(self, status, values):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sent = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(hub, folder, arguments, token):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0",
                   "HF_TOKEN": token, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    line = [sys.executable, "-m", "prunetune", *arguments, "--push-to-hub", "me/tuned"]
    return subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


def files_of(body):
    """Return path and content of every file of a commit."""
    files = {}
    for line in body.decode().splitlines():
        operation = json.loads(line)
        if operation["key"] == "file":
            files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
    return files


def test_an_export_is_uploaded_whole(hub, world, tmp_path):
    output = tmp_path / "out"
    arguments = ["export", "--model", str(world.base), "--adapter", str(world.adapter), "--output", str(output)]
    done = pushed(hub, tmp_path, arguments, "hf_good")
    assert done.returncode == 0, done.stderr
    assert f"uploaded: http://127.0.0.1:{hub.server_port}/me/tuned" in done.stdout
    (commit,) = [body for path, body, _ in hub.sent if "/commit/" in path]
    assert files_of(commit) == {file.name: file.read_bytes() for file in output.iterdir()}


def test_a_refused_upload_is_one_line_and_changes_nothing(hub, copy, tmp_path):
    before = {file.name: file.read_bytes() for file in copy.adapter.iterdir()}
    done = pushed(hub, tmp_path, ["card", str(copy.adapter)], "hf_bad")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be uploaded to 'me/tuned'" in done.stderr and "set HF_TOKEN" in done.stderr
    assert {file.name: file.read_bytes() for file in copy.adapter.iterdir()} == before


# ---- anything at all -------------------------------------------------------------------------------------------


def flipped(data, random):
    """Return bytes with a few of them changed, cut out or put in."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(data))
        kind = random.random()
        if kind < 0.6:
            data[place] = random.randrange(256)
        elif kind < 0.8:
            del data[place : place + random.randint(1, 40)]
        else:
            data[place:place] = random.choice([b"null", b"[]", b'"', b"{}", b"-1", b"\xff", b"1e999"])
        data = data or bytearray(b"x")
    return bytes(data)


def test_no_damage_is_a_traceback_and_none_to_weights_or_answers_goes_unseen(copy, world):
    """Whatever bytes are changed: refused in one line, or, of a record without a seal, something that nothing reads."""
    random = Random(0)
    model = Arm.load(ModelConfig(path=str(world.base), dtype="float32"), device="cpu")
    old = copy.folder / "old"
    shutil.copytree(copy.adapter, old)
    record = json.loads((old / RECORD).read_text())
    (old / RECORD).write_text(json.dumps({k: v for k, v in record.items() if k != "seal"} | {"format": 1}))
    arm, comparison = copy.arm("tuned"), copy.folder / "comparison"
    uses = {
        copy.adapter / RECORD: lambda: model.with_adapter(copy.adapter),
        copy.adapter / WEIGHTS: lambda: model.with_adapter(copy.adapter),
        old / RECORD: lambda: model.with_adapter(old),
        arm / "manifest.json": lambda: compare([copy.arm("free"), arm]),
        arm / "results.jsonl": lambda: compare([copy.arm("free"), arm]),
        comparison / "comparison.json": lambda: read_comparison(comparison),
        comparison / "table.csv": lambda: None,
        comparison / "table.json": lambda: None,
    }
    for file, use in uses.items():
        whole = file.read_bytes()
        for _ in range(60):
            data = flipped(whole, random)
            if same_content(file, data, whole):
                continue
            file.write_bytes(data)
            checks = verify(file.parent, base=str(world.base))
            assert "\n" not in " ".join(check.told for check in checks)
            if file.parent != old:
                assert any(check.holds is False for check in checks), file
            try:
                use()
                assert file.parent == old or file.name in ("table.csv", "table.json"), file
            except (CheckpointError, TaskError) as error:
                assert "\n" not in str(error), file
        file.write_bytes(whole)


def same_content(file, data, whole):
    """Whether a change leaves the JSON values as they are, or the end of a table."""
    if file.suffix != ".json":
        return data == whole
    try:
        return json.loads(data) == json.loads(whole)
    except (ValueError, RecursionError):
        return False
