"""`prunetune calibrate`: the numbers are the definition's, profiles are sealed, and nobody else's file is touched."""

import json
import shutil

import numpy as np
import oracles
import pytest
import torch
from conftest import ROOT, TINY_VLM

from prunetune.cli import main
from prunetune.configs import EvaluateConfig, ModelConfig, RecalibrateConfig, load_config
from prunetune.data_recipes import Formatter, Sample, Turn, load_recipe
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import read_manifest
from prunetune.evaluation.run.calibrate import Spread, _layers, _of_drawn_images, calibrate, fitted_lines
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import get_task
from prunetune.models import Arm, load_model
from prunetune.models.adapter import projector_state
from prunetune.models.profile import Profile, read_profile, resolved, write_profile
from prunetune.models.seal import sealed
from prunetune.outputs import OutputError
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, registered_methods
from prunetune.pruning.fitting import Choice, Fit, Mean, unfitted
from prunetune.pruning.methods.adaptive import Adaptive
from prunetune.pruning.ops.complexity import attention_entropy, erank
from prunetune.pruning.registry import method_of, register_pruner
from prunetune.pruning.spec import StageSpec
from prunetune.scripts.verify import verify
from prunetune.train.record import run_record

CONFIG = ROOT / "configs" / "recalibrate" / "tiny_adaptive_16.yaml"
TINY = ModelConfig(path=str(TINY_VLM), dtype="float32")
CLIP = str(TINY_VLM / "clip")


def test_erank_of_known_matrices():
    eye = torch.eye(6)[None]
    assert erank(eye).item() == pytest.approx(6)
    assert erank(torch.ones(1, 5, 9)).item() == pytest.approx(1, abs=1e-4)
    assert erank(torch.zeros(1, 5, 9)).item() == pytest.approx(1)
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    for item in range(2):
        assert erank(x)[item].item() == pytest.approx(oracles.erank(x[item].double().numpy()), rel=1e-5)
    low = (x[:, :, :2] @ torch.randn(2, 2, 500, generator=torch.Generator().manual_seed(1))).float()
    assert erank(low)[0].item() < 2.01  # two directions; float32 noise in the others does not count


def test_entropy_of_known_attention():
    assert attention_entropy(torch.full((1, 3, 16), 0.01)).item() == pytest.approx(np.log(16))
    one = torch.zeros(1, 3, 16)
    one[..., 5] = 0.7
    assert attention_entropy(one).item() == pytest.approx(0)


def test_spread_of_few_values():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 3.0, 4.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny world with 320 questions: the shipped one takes seconds to draw."""
    file = tmp_path_factory.mktemp("recipes") / "small.yaml"
    file.write_text("name: small\nformat: shapes_world\nsplit: recalibration\nscenes: 40\n")
    return str(file)


# ---- what is fitted -----------------------------------------------------------------------------------------------


def test_means_are_those_of_the_configured_sample(tmp_path, capsys, recipe):
    """The shipped file stays as it is; the profile holds the mean of what the pruner chooses from."""
    before, file = CONFIG.read_bytes(), tmp_path / "new" / "adaptive.json"
    main(["calibrate", "--config", "recalibrate/tiny_adaptive_16", "--count", "12", "--batch-size", "5", "--profile",
          str(file), "--data.recipe", recipe])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"12 items of recipe {recipe}, pruner adaptive" in printed and "walk ran dry:" in printed
    assert CONFIG.read_bytes() == before and [path.name for path in file.parent.iterdir()] == ["adaptive.json"]
    config, profile = load_config(RecalibrateConfig, CONFIG, ["--data.recipe", recipe]), read_profile(file)
    data = load_recipe(recipe)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.data.seed or 0))[:12].tolist()
    model, processor = load_model(str(TINY_VLM))
    batch = Formatter(processor, data.images).prompt_batch([data[index] for index in order])
    with torch.no_grad():
        (tokens,) = PrunedModel(model, PruningSpec("fastervlm", 16)).prepare(batch).vision["image"].groups
    ranks = [oracles.erank(oracles.of(tokens, "projected", item)) for item in range(12)]
    assert profile.options == {"erank_avg": pytest.approx(np.mean(ranks), abs=2e-3)}
    entropy = config.model_copy(
        update={"pruning": config.pruning.model_copy(update={"options": {"complexity": "attention_entropy"}})}
    )
    p = tokens.signals["cls_attention"].double().mean(1)
    p = p / p.sum(1, keepdim=True)
    fitted = calibrate(entropy, 12, 5).profile
    assert fitted.options == {"entropy_avg": pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=2e-3)}


def on_validation(pruner, keep=8, **options):
    return EvaluateConfig(
        model=TINY,
        pruning=PruningSpec(pruner, keep, options, text_tower=CLIP),
        tasks=["tiny_world_validation"],
        max_new_tokens=6,
        output="unused",
    )


@pytest.fixture(scope="module")
def fitted_sign(tmp_path_factory):
    """CDPruner's sign, fitted on a benchmark: in this world the published one is the wrong one."""
    profile = calibrate(on_validation("cdpruner"), 160, 80).profile
    file = tmp_path_factory.mktemp("profiles") / "cdpruner.json"
    write_profile(file, profile)
    return file


def test_the_better_sign_is_taken_and_what_was_measured_is_kept(fitted_sign):
    profile = read_profile(fitted_sign)
    assert profile.options == {"relevance_sign": 1} and profile.measure == "score by tiny_world_validation"
    published, other = profile.evidence["relevance_sign"]
    assert (published.value, published.gain, other.value) == (-1, None, 1)
    assert other.gain == pytest.approx(other.score - published.score, abs=2e-4)
    assert other.gain_interval[0] > 0 and profile.data.samples == 160
    arm = Arm.load(TINY, on_validation("cdpruner").pruning, device="cpu")
    assert profile.model.text_tower_hash == arm.text_tower_hash
    assert profile.model.frozen_hash == arm.base.hashes.frozen_hash


def test_on_a_recipe_the_likelihood_of_the_answers_decides(recipe):
    """The same sign by another measure; one sample's likelihood is the stock loss of that sample alone."""
    values = {"model": {"path": str(TINY_VLM), "dtype": "float32"}, "data": {"recipe": recipe}, "output": "o",
              "pruning": {"pruner": "cdpruner", "keep": 8, "text_tower": CLIP}}  # fmt: skip
    config = RecalibrateConfig.model_validate(values)
    result = calibrate(config, 96, 32)
    assert result.profile.options == {"relevance_sign": 1}
    one = calibrate(config, 1).profile.evidence["relevance_sign"][0]
    arm = Arm.load(config.model, config.pruning, device="cpu")
    data = load_recipe(recipe)
    first = int(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[0])
    with torch.no_grad():
        loss = arm.pruned.forward(**arm.formatter(data.images).training_batch([data[first]])).loss
    assert one.score == pytest.approx(-float(loss), abs=1e-3)


def test_a_published_value_is_left_only_for_one_that_is_better_beyond_chance():
    """With all tokens kept both signs answer alike: the published one stays."""
    fitted = calibrate(on_validation("cdpruner", "100%"), 16, 16).profile
    assert fitted.options == {"relevance_sign": -1}
    assert fitted.evidence["relevance_sign"][1].gain == 0
    assert "every relevance_sign answers alike at keep 100%" in "\n".join(fitted_lines(fitted))


def test_a_layer_is_one_that_the_model_has():
    fitted = calibrate(on_validation("hiprune", alpha=0.5), 80, 80).profile
    assert [row.value for row in fitted.evidence["object_layer"]] == [1, 2, 3, 4]  # of 5; the published 9 is not there
    assert fitted.options["object_layer"] in (1, 2, 3, 4) and fitted.pruning["options"] == {"alpha": 0.5}
    assert _layers(23, 9) == [1, 4, 7, 9, 10, 14, 17, 20, 23] and _layers(3, 9) == [1, 2, 3]


def test_promprunes_turning_point_is_the_mean_entropy(recipe):
    values = {"model": {"path": str(TINY_VLM), "dtype": "float32"}, "data": {"recipe": recipe}, "output": "o",
              "pruning": {"pruner": "promprune", "keep": 8}}  # fmt: skip
    profile = calibrate(RecalibrateConfig.model_validate(values), 7, 3).profile
    data = load_recipe(recipe)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:7].tolist()
    model, processor = load_model(str(TINY_VLM))
    batch = Formatter(processor, data.images).prompt_batch([data[index] for index in order])
    with torch.no_grad():
        (tokens,) = PrunedModel(model, PruningSpec("fastervlm", 16)).prepare(batch).vision["image"].groups
    entropies = []
    for item in range(7):
        x = oracles.of(tokens, "projected", item)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        shares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        shares = shares[shares > 1e-12] / shares.sum()
        entropies.append(-(shares * np.log(shares)).sum() / np.log(min(x.shape)))
    assert profile.options == {"mu": pytest.approx(np.mean(entropies), abs=2e-3)}
    fixed = {**values, "pruning": {"pruner": "promprune", "keep": 8, "options": {"share_min": 1.0}}}
    assert calibrate(RecalibrateConfig.model_validate(fixed), 2, 2).profile is None


def test_vscans_layer_is_one_that_the_model_has():
    fitted = calibrate(on_validation("vscan"), 16, 16).profile
    assert [row.value for row in fitted.evidence["shallow_layer"]] == [1, 2, 3, 4]
    assert fitted.options["shallow_layer"] in (1, 2, 3, 4)


def test_options_without_weight_are_not_fitted(tmp_path, capsys, recipe):
    assert calibrate(on_validation("crisprune", alpha=0.0), 8).profile is None
    file = tmp_path / "divprune.json"
    line = ["calibrate", "--config", "recalibrate/tiny_divprune_16", "--count", "6", "--data.recipe", recipe]
    main([*line, "--profile", str(file)])
    printed = capsys.readouterr().out
    assert "nothing written: divprune has nothing to fit" in printed and "erank, kept tokens" in printed
    assert not file.exists()


def test_held_out_samples_are_taken_where_a_recipe_holds_out(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nformat: shapes_world\nsplit: recalibration\nscenes: 20\nheld_out: 16\n")
    values = {"model": {"path": str(TINY_VLM), "dtype": "float32"}, "data": {"recipe": str(recipe)}, "output": "o",
              "pruning": {"pruner": "adaptive", "keep": 8}}  # fmt: skip
    profile = calibrate(RecalibrateConfig.model_validate(values), 100).profile
    assert (profile.data.part, profile.data.samples) == ("held out", 16)


# ---- declarations -------------------------------------------------------------------------------------------------


def test_methods_declare_what_is_fitted():
    declared = {name: [fit.option for fit in method.fits] for name, method in registered_methods().items()}
    assert declared["adaptive"] == ["erank_avg", "entropy_avg"] and declared["hiprune"] == ["object_layer"]
    assert all(declared[name] == ["relevance_sign"] for name in ("cdpruner", "crisprune", "gridprune", "trim"))
    assert declared["promprune"] == ["mu"] and declared["vscan"] == ["shallow_layer"]
    own = {"relevance_sign", "erank_avg", "entropy_avg", "object_layer", "mu", "shallow_layer"}
    for method in registered_methods().values():  # whoever has such an option says so
        options = set(vars(method.pruner())) & own
        assert options == {fit.option for fit in method.fits}, method.name


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (Fit("sign"), "'sign', which is no field of Adaptive"),
        (Mean("scale"), "a mean of nothing"),
        (Choice("scale", values=(1,)), "a choice of 1 values"),
    ],
)
def test_a_declaration_that_can_not_be_fitted_is_refused(fit, message):
    with pytest.raises(PruningError, match=message):
        register_pruner("declared", paper="none", fits=[fit])(Adaptive)


# ---- profiles in use ----------------------------------------------------------------------------------------------


def test_a_profile_fills_in_what_options_leave_open(fitted_sign, tmp_path, capsys):
    """Arms, manifests and records hold the options that ran, not the file that they came from."""
    spec = PruningSpec("cdpruner", 8, text_tower=CLIP, profile=str(fitted_sign))
    arm = Arm.load(TINY, spec, device="cpu")
    assert arm.pruned.pruner.relevance_sign == 1 and arm.spec.profile == str(fitted_sign)
    assert arm.pruning.options == {"relevance_sign": 1} and arm.pruning.profile is None
    assert arm.with_pruning(PruningSpec("cdpruner", 8, text_tower=CLIP)).pruned.pruner.relevance_sign == -1
    own = arm.with_pruning(spec.model_copy(update={"options": {"relevance_sign": -1}}))
    assert own.pruned.pruner.relevance_sign == -1 and resolved(own.spec).options == {"relevance_sign": -1}
    config = EvaluateConfig(model=TINY, pruning=spec, tasks=["tiny_world"], limit=8, batch_size=8, max_new_tokens=6,
                            output=str(tmp_path / "arm"))  # fmt: skip
    manifest = read_manifest(evaluate(config, arm))
    assert manifest.pruning == arm.pruning
    assert manifest.profile["seal"] == json.loads(fitted_sign.read_text())["seal"]
    assert manifest.profile["options"] == {"relevance_sign": 1}
    capsys.readouterr()
    same = config.model_copy(update={"tasks": ["tiny_world_validation"], "output": str(tmp_path / "same")})
    evaluate(same, arm)
    assert "was fitted on 160 items of tiny_world_validation, which is evaluated here" in capsys.readouterr().out


def test_a_recalibration_records_the_options_that_ran(fitted_sign, recipe, tmp_path):
    """And goes on only with the same ones: a profile that was written anew is another pruning."""
    from prunetune.train.run import _settings

    copy = tmp_path / "profile.json"
    shutil.copy(fitted_sign, copy)
    spec = PruningSpec("cdpruner", 8, text_tower=CLIP, profile=str(copy))
    config = RecalibrateConfig(model=TINY, pruning=spec, data={"recipe": recipe}, output="o")
    arm, data = Arm.load(TINY, spec, device="cpu"), load_recipe(recipe)
    record = run_record(config, data, arm, projector_state(arm.model), 1, None)
    assert record["pruning"]["options"] == {"relevance_sign": 1} and "profile" not in record["pruning"]
    assert record["profile"] == read_profile(copy).link()
    before = _settings(config, data, 1)
    write_profile(copy, read_profile(copy).model_copy(update={"options": {"relevance_sign": -1}}), overwrite=True)
    assert before["pruning"]["options"] == {"relevance_sign": 1} and before != _settings(config, data, 1)


def test_benchmarks_that_options_can_not_be_chosen_by_are_refused():
    config = on_validation("cdpruner")
    for tasks, message in ((["tiny_world", "gqa"], "measures on one benchmark"), (["vizwiz_test"], "are hidden")):
        with pytest.raises(TaskError, match=message):
            calibrate(config.model_copy(update={"tasks": tasks}), 8)


def test_a_profile_of_something_else_is_refused_with_what_differs(fitted_sign, untrained_folder, tmp_path):
    with pytest.raises(PruningError, match="fitted for the pruner 'cdpruner', this one is 'trim'"):
        Arm.load(TINY, PruningSpec("trim", 8, text_tower=CLIP, profile=str(fitted_sign)), device="cpu")
    spec = PruningSpec("cdpruner", 8, text_tower=CLIP, profile=str(fitted_sign))
    other = ModelConfig(path=str(untrained_folder), dtype="float32")
    with pytest.raises(PruningError, match="fitted to another model.*frozen weights [0-9a-f]{12}, here [0-9a-f]{12}"):
        Arm.load(other, spec, device="cpu")
    changed = tmp_path / "changed"
    shutil.copytree(TINY_VLM, changed)
    tokenizer = changed / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(PruningError, match="configuration, processor, tokenizer or template"):
        Arm.load(ModelConfig(path=str(changed), dtype="float32"), spec, device="cpu")
    with pytest.raises(PruningError, match="read together with its model"):
        PrunedModel(load_model(str(TINY_VLM))[0], spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["options"].update(relevance_sign=-1), "can't be trusted: it was changed"),
        (lambda values: values.update(sealed({**values, "format": 9})), "format 9, this version reads 1"),
        (lambda values: values.pop("kind"), "is no profile"),
        (lambda values: values.update(sealed({**values, "pruner": 3})), r"of another version \(pruner\)"),
    ],
)
def test_profiles_that_can_not_be_used_are_one_line(fitted_sign, tmp_path, change, message):
    values = json.loads(fitted_sign.read_text())
    change(values)
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(PruningError, match=message) as error:
        read_profile(tmp_path / "p.json")
    assert "\n" not in str(error.value)
    with pytest.raises(PruningError, match="does not exist; `prunetune calibrate --profile"):
        read_profile(tmp_path / "none.json")


def test_verify_checks_a_profile_against_its_model(fitted_sign, untrained_folder, tmp_path):
    def broken(file, base):
        checks = verify(file, base)
        assert {"seal", "frozen_hash", "settings_hash", "text_tower_hash"} <= {check.link for check in checks}
        return {check.link for check in checks if check.holds is False}

    assert broken(fitted_sign, str(TINY_VLM)) == set()
    assert broken(fitted_sign, str(untrained_folder)) >= {"frozen_hash", "original_projector_hash"}
    edited = tmp_path / "edited.json"
    edited.write_text(fitted_sign.read_text().replace('"relevance_sign": 1', '"relevance_sign": -1'))
    assert [(check.link, check.holds) for check in verify(edited)] == [("seal", False)]


def test_files_of_others_and_shipped_ones_are_never_replaced(fitted_sign, tmp_path, monkeypatch):
    """Said before minutes of measuring."""
    monkeypatch.setattr("prunetune.evaluation.run.calibrate.calibrate", lambda *_: pytest.fail("it measured"))
    line = ["calibrate", "--config", "recalibrate/tiny_adaptive_16", "--overwrite", "--profile"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("pruning: {pruner: adaptive}  # quoted: mine\n")
    with pytest.raises(SystemExit, match=r"mine.yaml is in the way: it is no profile"):
        main([*line, str(mine)])
    assert mine.read_text() == "pruning: {pruner: adaptive}  # quoted: mine\n"
    for shipped in (CONFIG, ROOT / "configs" / "new.json"):
        with pytest.raises(SystemExit, match="lies among the shipped configurations"):
            main([*line, str(shipped)])
    profile = read_profile(fitted_sign)
    with pytest.raises(OutputError, match="holds a profile; choose another file, or give --overwrite"):
        write_profile(fitted_sign, profile)
    copy = tmp_path / "copy.json"
    shutil.copy(fitted_sign, copy)
    write_profile(copy, profile, overwrite=True)
    assert read_profile(copy) == profile and isinstance(profile, Profile)


def test_an_unfitted_method_says_so_once(fitted_sign, capsys):
    spec = PruningSpec("cdpruner", 8, text_tower=CLIP)
    arm = Arm.load(TINY, spec, device="cpu")
    arm.with_pruning(spec.model_copy(update={"keep": 16}))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "cdpruner runs with its published relevance_sign -1, not fitted to" in said
    arm.with_pruning(PruningSpec("cdpruner", 8, {"relevance_sign": -1}, text_tower=CLIP))
    arm.with_pruning(PruningSpec("crisprune", 8, {"alpha": 0.0}, text_tower=CLIP))
    arm.with_pruning(PruningSpec("divprune", 8))
    Arm.load(TINY, spec.model_copy(update={"profile": str(fitted_sign)}), device="cpu")
    assert capsys.readouterr().out == ""
    arm.with_pruning(PruningSpec("adaptive", 8))
    assert "adaptive runs with its published erank_avg 94.87," in capsys.readouterr().out
    arm.with_pruning(PruningSpec("promprune", 8))
    assert "promprune runs with its published mu 0.42, not fitted to" in capsys.readouterr().out
    vscan = method_of("vscan")
    assert unfitted(vscan.fits, vscan.pruner(), {}) == ["shallow_layer"]
    assert unfitted(vscan.fits, vscan.pruner(local_ratio=0.0), {}) == []


def test_a_configuration_that_sets_a_fitted_option_is_told(recipe, capsys):
    main(["calibrate", "--config", str(CONFIG), "--count", "3", "--data.recipe", recipe])
    printed = capsys.readouterr().out
    assert "sets erank_avg itself, which wins over a profile" in printed
    assert "nothing written: name a file with --profile" in printed


def boundary_settings(*more):
    return load_config(EvaluateConfig, "evaluate/tiny_dense", ["--pruning.stages", "[{name: vtw}]", *more])


def test_the_layer_of_vtw_is_the_first_that_changes_answers_little(tmp_path, capsys):
    found = calibrate(boundary_settings(), count=5, batch_size=3, eta=1.0, device="cpu")
    rows = found.profile.evidence["vtw boundaries"]
    assert [row.value for row in rows] == [1, 2] and found.profile.stages == {"vtw": [2]}
    # Prompt by prompt, in float64, by the definition.
    arm = Arm.load(TINY, PruningSpec(), device="cpu")
    task = get_task("tiny_world").open(None)
    items = _of_drawn_images([item for item in task.items if item.image is not None], 5)
    formatter = arm.formatter(task.open_images())
    at = {layer: PruningSpec(stages=[StageSpec(name="vtw", boundaries=[layer])]) for layer in (1, 2)}
    change = {1: [], 2: []}
    for item in items:
        prompt = formatter.prompt_batch([Sample(item.id, item.source, item.image, (Turn(item.question, None),))])
        with torch.no_grad():
            full, *others = (
                PrunedModel(arm.model, spec).forward(**prompt).logits[0, -1].double().softmax(-1).numpy()
                for spec in (PruningSpec(), *at.values())
            )
        for layer, own in zip(at, others, strict=True):
            change[layer].append(float((own * np.log(own / full)).sum()))
    for row in rows:
        assert -row.score == pytest.approx(np.mean(change[row.value]), rel=1e-3)
    assert 1.0 < np.mean(change[1]) and np.mean(change[2]) < 1.0
    with pytest.raises(PruningError, match=r"no boundary changes the answers by 0.001 or less, the least is 0\."):
        calibrate(boundary_settings(), count=5, batch_size=3, eta=0.001, device="cpu")
    # The profile is read where the stage names no layer, and stands in records.
    path = tmp_path / "vtw.json"
    write_profile(path, found.profile)
    text = path.read_text()
    assert "x |" in found.to_markdown() and all(check.holds is not False for check in verify(path))
    fitted = Arm.load(TINY, PruningSpec(stages=[StageSpec(name="vtw")], profile=str(path)), device="cpu")
    assert fitted.pruning.stages[0].boundaries == [2] and fitted.pruned.stages.schedule.points[0].boundary == 2
    assert fitted.profile.link()["stages"] == {"vtw": [2]}
    own = PruningSpec(stages=[StageSpec(name="vtw", boundaries=[1])], profile=str(path))
    assert resolved(own).stages[0].boundaries == [1]
    path.write_text(text.replace('"vtw": [\n      2', '"vtw": [\n      1'))
    with pytest.raises(PruningError, match="can't be trusted"):
        read_profile(path)
    assert "vtw runs with its published" not in capsys.readouterr().out


def test_stages_that_can_not_be_fitted_together_are_told():
    both = ["--pruning.stages", "[{name: vtw}, {name: vtw}]"]
    with pytest.raises(TaskError, match="withdraws all visual tokens twice"):
        calibrate(boundary_settings(*both), count=4, device="cpu")
    other = ["--pruning.stages", "[{name: vtw}, {name: fastv, boundaries: [2]}]"]
    with pytest.raises(TaskError, match="another stage has boundary 2"):
        calibrate(boundary_settings(*other), count=4, device="cpu")
