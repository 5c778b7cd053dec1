"""The feature cache: what it holds equals what tower and pruner make, and it is refused for anything else."""

from __future__ import annotations

import copy
import json
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import test_idefics3
import test_llava
import test_llava_next
import test_qwen2_5_vl
import test_qwen3_vl
import torch
from conftest import ROOT, TINY_VLM, scene_sample
from launches import arguments, environment, losses, run, run_several
from PIL import Image

from prunetune.cli import main
from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.errors import PrunetuneError
from prunetune.models import Arm
from prunetune.models.adapter import projector_state
from prunetune.models.features import FeatureData, FeatureFormatter, FeatureStore, make, make_features
from prunetune.models.features.kept import (
    check_can_be_stored,
    choose_before_projector,
    joined,
    kept_images,
    kept_slots,
    newline_of,
)
from prunetune.models.features.shard import Entry, Shard, write_shard
from prunetune.models.features.store import stored_images
from prunetune.models.ranks import Ranks
from prunetune.outputs import FEATURES, OutputFolder
from prunetune.pruning import PruningError, PruningSpec
from prunetune.pruning.stored import choice_of
from prunetune.tiny_world.recipe import SceneImages

CLIP = str(TINY_VLM / "clip")
CHOICES = [
    PruningSpec("prismprune", 16),
    PruningSpec("prismprune", "25%"),
    PruningSpec("visionzip", 16),  # merges
    PruningSpec("vispruner", 16),
    PruningSpec("divprune", 16),  # chooses by the projector's output
    PruningSpec("prumerge", options={"neighbours": 8}, keep=16),  # merges, and keeps what the image asks for
]
QUESTIONS = ("what number is shown ?", "where is the circle ?", "describe the southeast .")


def some_samples(scenes=5):
    """Two questions about each of some scenes, and one sample of text alone."""
    found = []
    for scene in range(scenes):
        for number in range(2):
            sample = scene_sample(10_000_001 + scene, QUESTIONS[(scene + number) % 3])
            found.append(replace(sample, id=f"{sample.id}-{number}"))
    return [*found, Sample("text", "vg", None, (Turn("what number is shown ?", "4 7"),))]


def data(samples=None, images=None):
    return FeatureData("scenes", some_samples() if samples is None else samples, images or SceneImages())


def made(folder, arm, choices, own=None, batch_size=2):
    with OutputFolder(folder, FEATURES) as output:
        return make_features(output, arm, choices, own or data(), Ranks(), batch_size)


@pytest.fixture(scope="module")
def base():
    return Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), CHOICES[0], device="cpu")


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    return made(tmp_path_factory.mktemp("features") / "cache", base, CHOICES)


TEXT = [PruningSpec("trim", 16, text_tower=CLIP), PruningSpec("trimtokenator", 16)]


@pytest.fixture(scope="module")
def by_question(base, tmp_path_factory):
    return made(tmp_path_factory.mktemp("features") / "text", base.with_pruning(TEXT[0]), TEXT)


def unshared(arm, spec):
    """An arm with a projector of its own to train, and a tower that can't be run."""
    own = copy.deepcopy(arm.model)
    base = copy.copy(arm.base)
    base.model = own
    arm = arm.with_pruning(spec)
    pruned = type(arm.pruned)(own, spec, arm.processor.tokenizer, arm.pruned.original)
    return replace(arm, base=base, pruned=pruned)


def two_steps(arm, batches):
    """Train the projector by plain gradient descent; losses, gradients, and which positions stayed."""
    arm.model.requires_grad_(False)
    projector = projector_state(arm.model, keep_vars=True)
    for parameter in projector.values():
        parameter.requires_grad_(True)
    arm.model.train()
    losses, gradients, kept = [], [], []
    with arm.pruned.attach(seen=lambda pruned: kept.append((pruned.keep, pruned.kept, pruned.notes_per_image))):
        for batch in batches:
            loss = arm.model(**batch).loss
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append({name: parameter.grad.clone() for name, parameter in projector.items()})
            with torch.no_grad():
                for parameter in projector.values():
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
    assert all(parameter.grad is None for parameter in arm.model.parameters())
    return losses, gradients, kept


@pytest.mark.parametrize(
    "spec", [spec for spec in CHOICES if spec.pruner != "divprune"], ids=lambda s: f"{s.pruner}{s.keep}"
)
def test_two_steps_of_training_equal_those_without_it(base, cache, spec):
    samples = some_samples()
    groups = [samples[:4], [samples[-1], *samples[4:7]]]  # the second with a row of text alone
    plain, cached = unshared(base, spec), unshared(base, spec)
    formatter = plain.formatter(SceneImages())
    expected = two_steps(plain, [formatter.training_batch(group) for group in groups])
    store = FeatureStore.open(cache, cached, data(), trains=True)
    without_pixels = FeatureFormatter(store, cached)
    batches = [without_pixels.training_batch(group) for group in groups]
    assert all("pixel_values" not in batch for batch in batches)
    cached.model.base_model.vision_tower = None  # nothing may ask for it
    losses, gradients, kept = two_steps(cached, batches)
    for (keep, counts, notes), (keep2, counts2, notes2) in zip(kept, expected[2], strict=True):
        assert torch.equal(keep, keep2) and counts == counts2 and notes == notes2
    assert losses == pytest.approx(expected[0], rel=0, abs=1e-6)
    assert expected[0][0] != expected[0][1]
    for own, other in zip(gradients, expected[1], strict=True):
        for name in other:
            assert other[name].abs().max() > 1e-4
            torch.testing.assert_close(own[name], other[name], rtol=1e-5, atol=1e-6)


def test_text_alone_has_a_gradient_of_zero(base, cache):
    arm = unshared(base, CHOICES[0])
    store = FeatureStore.open(cache, arm, trains=True)
    text = some_samples()[-1:]
    batch = FeatureFormatter(store, arm).training_batch(text)
    assert batch["stored"].rows.shape[0] == 0
    losses, gradients, _ = two_steps(arm, [batch])
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients[0].values())
    plain = base.formatter(SceneImages()).training_batch(text)
    with torch.no_grad():
        assert losses[0] == pytest.approx(float(base.model.eval()(**plain).loss), abs=1e-6)


@pytest.mark.parametrize("spec", [CHOICES[2], CHOICES[4], *TEXT], ids=lambda spec: spec.pruner)
def test_answers_equal_those_without_it(base, cache, by_question, spec):
    """Training-free also of methods that choose by the projector, and per question of those that read it."""
    arm = base.with_pruning(spec)
    samples = [replace(s, turns=(Turn(s.turns[0].question, None),)) for s in some_samples()]
    store = FeatureStore.open(by_question if spec in TEXT else cache, arm, data())
    plain = arm.answer(arm.formatter(SceneImages()), samples, 4)
    assert arm.answer(FeatureFormatter(store, arm), samples, 4) == plain
    assert [answer.kept for answer in plain][-1] == 0


def test_the_rows_are_those_that_enter_the_projector(base, cache):
    """Read from the tower itself, with a hook, and not through what wrote them."""
    arm = base.with_pruning(CHOICES[0])
    store = FeatureStore.open(cache, arm)
    (sample,) = some_samples()[:1]
    batch = arm.formatter(SceneImages()).prompt_batch([sample])
    entered = []
    handle = arm.model.base_model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: entered.append(args[0])
    )
    with torch.no_grad():
        pruned = arm.pruned.prepare(arm.place(batch))
    handle.remove()
    indices = pruned.chosen["image"].selections[0].indices[0]
    stored = store.batch([sample])
    torch.testing.assert_close(stored.rows, entered[0][0, indices], rtol=1e-5, atol=1e-5)
    assert stored.stays.nonzero()[:, 0].tolist() == indices.tolist()
    assert stored.lengths == (144,) and store.placeholders(sample) == 144 and store.kept(sample) == 16


def test_half_precision_is_stored_as_it_is(base, tmp_path):
    """Made in the batches that are asked for, since in half precision a batch moves features by their last bits."""
    arm = other(base, dtype="bfloat16")
    samples = some_samples()[::2][:4]
    store = FeatureStore.open(made(tmp_path / "cache", arm, CHOICES[:1], data(samples), 4), arm, data(samples))
    cached = FeatureFormatter(store, arm).training_batch(samples)
    assert cached["stored"].rows.dtype == torch.bfloat16
    plain = arm.place(arm.formatter(SceneImages()).training_batch(samples))
    with torch.no_grad():
        loss, expected = (arm.pruned.forward(**batch).loss for batch in (cached, plain))
    assert float(loss) == pytest.approx(float(expected), rel=1e-2)
    kept = [arm.pruned.prepare(batch).keep for batch in (cached, plain)]
    assert torch.equal(*kept)


def test_an_image_is_stored_once_and_a_question_each(cache, by_question):
    assert len(FeatureStore(cache)) == 5 and len(FeatureStore(by_question)) == 10


def test_a_union_is_smaller_than_its_parts(base, cache, tmp_path):
    alone = made(tmp_path / "alone", base, [CHOICES[0]])
    both = made(tmp_path / "both", base, [CHOICES[0], CHOICES[1]])
    rows = {}
    for folder in (alone, both):
        shards = [Shard(file) for file in sorted(folder.glob("*.safetensors"))]
        rows[folder.name] = sum(len(shard.rows) for shard in shards)
    assert rows["alone"] == 5 * 16 and 5 * 36 <= rows["both"] < 5 * (16 + 36)


FAMILIES = {
    "llava": (test_llava.TestLlava, "prismprune"),
    "merging": (test_llava.TestLlava, "visionzip"),
    "crops and row ends": (test_llava_next.TestLlavaNext, "prismprune"),
    "crops, merged": (test_llava_next.TestLlavaNext, "tome"),
    "tiles": (test_idefics3.TestIdefics3, "tome"),
    "native resolution": (test_qwen2_5_vl.TestImages, "tome"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_families_equal_those_without_it(name, tmp_path):
    """Rows with no image, one and several: what of a row's images is stored together, and features bit for bit."""
    make_suite, method = FAMILIES[name]
    suite = make_suite()
    model = suite.make_model()
    inputs = suite.asked(suite.rows())
    plug = suite.plug(model, method, 3)
    plain = plug.prepare(inputs)
    rows = plain.rows["image"]
    with torch.inference_mode():
        vision = check_can_be_stored(model, plug.family, plug.encode(inputs))
        choice, reads_projector = choose_before_projector(plug, vision, (), rows, plug.spec.keep, {})
        images = kept_images(vision, [kept_slots(choice, vision, method, plug.spec.newline, plug.merges)])
    assert not reads_projector
    entries = []
    for row in sorted(set(rows)):
        own = [image for image, where in zip(images, rows, strict=True) if where == row]
        entries.append(Entry(bytes([row]) * 16, (1, 1), bytes(16), joined(own)))
    write_shard(tmp_path / "shard.safetensors", entries, newline_of(vision), [False], "")
    shard = Shard(tmp_path / "shard.safetensors")
    found = [(shard, number) for number in range(len(entries))]
    stored = stored_images(found, [0] * len(found), [choice_of(plug.spec)], shard)
    cached = plug.prepare({key: value for key, value in inputs.items() if key != "pixel_values"}, stored=stored)
    assert torch.equal(cached.keep, plain.keep)
    counts = [
        sum(n for n, where in zip(plain.kept["image"], rows, strict=True) if where == r) for r in sorted(set(rows))
    ]
    assert cached.kept["image"] == counts
    for key, value in plain.inputs.items():
        if key != "mm_encoder_outputs":
            assert not torch.is_tensor(value) or torch.equal(cached.inputs[key], value), key
    features = [
        torch.cat(list(pruned.inputs["mm_encoder_outputs"]["image"].pooler_output)) for pruned in (cached, plain)
    ]
    torch.testing.assert_close(*features, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(**cached.inputs).logits, model(**plain.inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_family_with_deepstack_levels_is_refused():
    suite = test_qwen3_vl.TestImages()
    model = suite.make_model()
    plug = suite.plug(model, "tome", 3)
    visions = plug.encode(suite.asked(suite.rows()))
    with pytest.raises(PrunetuneError, match="family 'qwen3_vl' can't be stored: it has deepstack levels"):
        check_can_be_stored(model, plug.family, visions)


def other(base, spec=CHOICES[0], **fields):
    return Arm.load(base.base.config.model_copy(update=fields), spec, device="cpu")


def changed(base, change, spec=CHOICES[0]):
    arm = unshared(base, spec)
    change(arm)
    return arm


def _move_tower(arm):
    with torch.no_grad():
        next(arm.model.base_model.vision_tower.parameters()).flatten()[0] += 1


def _move_projector(arm):
    with torch.no_grad():
        next(iter(projector_state(arm.model, keep_vars=True).values())).flatten()[0] += 1


def _resize(arm):
    arm.base.processor = copy.deepcopy(arm.base.processor)
    arm.base.processor.image_processor.image_mean = [0.1, 0.2, 0.3]


MADE_FOR_SOMETHING_ELSE = {
    "tower": (lambda b: changed(b, _move_tower), "another model or preprocessing: tower weights"),
    "dtype": (lambda b: other(b, dtype="bfloat16"), "model.dtype 'float32' there, 'bfloat16' here"),
    "square": (lambda b: other(b, square="pad"), "model.square 'processor' there, 'pad' here"),
    "processor": (lambda b: changed(b, _resize), "processor settings"),
    "pruner": (lambda b: b.with_pruning(PruningSpec("fastervlm", 16)), "holds what prismprune 16, .* not fastervlm 16"),
    "budget": (
        lambda b: b.with_pruning(PruningSpec("prismprune", 17)),
        r"not prismprune 17 \(keep 16 there, 17 here\)",
    ),
    "options": (
        lambda b: b.with_pruning(PruningSpec("prismprune", 16, {"salient_ratio": 0.25})),
        "options .*'salient_ratio': 0.5.* there, .*'salient_ratio': 0.25.* here",
    ),
    "tuned projector": (
        lambda b: changed(b, _move_projector, CHOICES[4]),
        "chooses by the projector's output, .* another",
    ),
}


@pytest.mark.parametrize("what", MADE_FOR_SOMETHING_ELSE)
def test_features_of_something_else_are_refused_in_one_line(base, cache, what):
    make_other, expected = MADE_FOR_SOMETHING_ELSE[what]
    with pytest.raises(PrunetuneError, match=expected) as raised:
        FeatureStore.open(cache, make_other(base))
    assert "\n" not in str(raised.value)


def test_another_projector_is_no_matter_to_what_is_chosen_before_it(base, cache):
    FeatureStore.open(cache, changed(base, _move_projector), data(), trains=True)


def test_a_choice_by_the_projector_is_refused_in_training(base, cache):
    with pytest.raises(PrunetuneError, match="divprune chooses by the projector's output, which training changes"):
        FeatureStore.open(cache, base.with_pruning(CHOICES[4]), trains=True)


def test_another_text_tower_is_refused(base, by_question, tmp_path):
    from transformers import CLIPModel, CLIPTokenizerFast

    clip = CLIPModel.from_pretrained(CLIP)
    with torch.no_grad():
        clip.text_projection.weight += 0.1
    clip.save_pretrained(tmp_path / "clip")
    CLIPTokenizerFast.from_pretrained(CLIP).save_pretrained(tmp_path / "clip")
    spec = TEXT[0].model_copy(update={"text_tower": str(tmp_path / "clip")})
    with pytest.raises(PrunetuneError, match="was made with another text tower: .* there, .* here"):
        FeatureStore.open(by_question, base.with_pruning(spec))


class Mirrored(SceneImages):
    """Other images of the same names."""

    def open(self, reference, sample_id):
        return super().open(reference, sample_id).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_other_images_of_the_same_names_are_refused(base, cache):
    with pytest.raises(PrunetuneError, match="made of other images: 'scene:10000001' of sample 's10000001-0'"):
        FeatureStore.open(cache, base, data(images=Mirrored()))


def test_a_missing_image_or_question_is_named(base, cache, by_question):
    more = data(some_samples(6))
    with pytest.raises(PrunetuneError, match="of sample 's10000006-0', 'scene:10000006': 1 of 6 entries of scenes"):
        FeatureStore.open(cache, base, more)
    store = FeatureStore.open(cache, base)
    with pytest.raises(PrunetuneError, match="no features of the image of sample 's7', 'scene:7'"):
        store.batch([scene_sample(7)])
    asked = scene_sample(10_000_001, "is this another question ?")
    with pytest.raises(PrunetuneError, match="no features of the image and question of sample"):
        FeatureStore.open(by_question, base.with_pruning(TEXT[0])).batch([asked])


def test_stored_features_of_another_budget_are_refused_by_the_plug(base, cache):
    store = FeatureStore.open(cache, base)
    batch = FeatureFormatter(store, base).prompt_batch(some_samples()[:2])
    with pytest.raises(PruningError, match="keep is 16 there and 12 here"):
        base.pruned.prepare(batch, keep=12)


def test_pixels_beside_stored_features_are_refused(base, cache):
    """A batch whose images are all elsewhere would run unpruned."""
    store = FeatureStore.open(cache, base)
    samples = some_samples()
    batch = base.formatter(SceneImages()).prompt_batch(samples[:1])
    with pytest.raises(PruningError, match="holds 'pixel_values' beside stored images"):
        base.pruned.prepare(batch, stored=store.batch(samples[-1:]))


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("features*"))}


def test_a_killed_run_goes_on_and_writes_the_same_bytes(base, cache, tmp_path, monkeypatch, capsys):
    whole = contents(cache)
    assert len(whole) == 4  # three shards of at most two images, and the index

    def killed(path, *args):
        if path.name.endswith("1.safetensors"):
            raise KeyboardInterrupt
        write_shard(path, *args)

    monkeypatch.setattr(make, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cache", base, CHOICES)
    with pytest.raises(PrunetuneError, match="was not finished; the same `prunetune cache` goes on"):
        FeatureStore(tmp_path / "cache")
    written = []
    monkeypatch.setattr(make, "write_shard", lambda path, *args: (written.append(path.name), write_shard(path, *args)))
    made(tmp_path / "cache", base, CHOICES)
    assert written == ["features-00001.safetensors", "features-00002.safetensors"]
    assert contents(tmp_path / "cache") == whole
    with pytest.raises(PrunetuneError, match="holds features that differ in choices; choose another folder"):
        made(tmp_path / "cache", base, CHOICES[:1])


def test_damage_is_told_and_mended(base, cache, tmp_path, capsys):
    whole = contents(cache)
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    (folder / ".prunetune.json").write_bytes((cache / ".prunetune.json").read_bytes())
    shard = folder / "features-00001.safetensors"
    sample = some_samples()[4]

    def refused(content, expected):
        shard.write_bytes(content)
        with pytest.raises(PrunetuneError, match=expected):
            FeatureStore.open(folder, base).batch([sample])

    content = bytearray(whole[shard.name])
    start = content.index(Shard(shard).features(0).tobytes())
    refused(content[:-5], f"{shard} has .* bytes of .*; the same `prunetune cache` makes it anew")
    content[start] ^= 1
    refused(content, f"{shard} is damaged: features of image 0 were changed")
    content = bytearray(whole[shard.name])
    keys = content.index(Shard(cache / shard.name).array("keys").tobytes())
    content[keys] ^= 1
    refused(content, f"{shard} is damaged: its index lists were changed")
    made(folder, base, CHOICES)
    assert "features-00001.safetensors is made anew" in capsys.readouterr().out
    assert contents(folder) == whole
    shard.unlink()
    with pytest.raises(PrunetuneError, match=f"{shard} is missing"):
        FeatureStore(folder)
    index = folder / "features.json"
    index.write_text(index.read_text().replace('"count": 5', '"count": 6'))
    with pytest.raises(PrunetuneError, match="changed after it was written"):
        FeatureStore(folder)
    with pytest.raises(PrunetuneError, match="holds no feature cache"):
        FeatureStore(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make, "free_bytes", lambda folder: 20_000)
    with pytest.raises(
        PrunetuneError, match=r"needs about \d+\.\d kB more for the features of 5 images, .* 20.0 kB free"
    ):
        made(tmp_path / "cache", base, CHOICES[:1])
    assert "features of 5 images for prismprune 16: about 8." in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


ARGUMENTS = ["cache", "--config", "evaluate/tiny_divprune_16", "--limit", "64", "--also-pruner", "prismprune",
             "--also-keep", "25%", "--batch-size", "2"]  # fmt: skip


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def test_two_ranks_write_the_same_bytes_as_one(tmp_path, capsys):
    """With the variables of torchrun; the arguments are those of a user."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    line = [sys.executable, "-m", "prunetune", *ARGUMENTS, "--features", str(tmp_path / "two")]
    ranks = []
    for rank in ("0", "1"):
        own = {**environment(), **meeting, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(line, env=own, cwd=ROOT, text=True, stderr=subprocess.STDOUT,
                                      stdout=subprocess.PIPE))  # fmt: skip
    main([*ARGUMENTS, "--features", str(tmp_path / "one")])
    printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert "take them with --features" in printed[0] and "features" not in printed[1]
    assert "of 8 images for divprune 16, prismprune 16, divprune 25%, prismprune 25%" in capsys.readouterr().out
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 4 + 1


def test_a_command_without_a_folder_says_what_to_give(capsys):
    with pytest.raises(SystemExit, match="give --features FOLDER"):
        main(ARGUMENTS)


# ---- in a recalibration --------------------------------------------------------------------------------------------


def test_a_recalibration_from_features_has_the_losses_of_one_from_pixels(untrained_folder, tmp_path):
    """Two ranks, token budgets, text alone among the samples; and a cache of another budget is refused in one line."""
    pruning = ("--pruning.pruner", "prismprune", "--pruning.keep", "16")
    features = str(tmp_path / "cache")
    options = [*arguments(untrained_folder, tmp_path / "made", *pruning), "--features", features]
    main(["cache", *options])
    runs = []
    for name, more in (("pixels", ()), ("features", ("--features", features))):
        budget = ("--engine.token_budget", "200", "--train.max_steps", "4")
        runs.append(arguments(untrained_folder, tmp_path / name, *pruning, *budget, *more))
    run_several(runs)
    assert losses(tmp_path / "features") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5)
    record = json.loads((tmp_path / "features" / "adapter" / "prunetune.json").read_text())
    assert record["features"] == FeatureStore(features).seal
    printed = run(untrained_folder, tmp_path / "other", *pruning, "--pruning.keep", "8", "--features", features,
                  world=1, status=1)  # fmt: skip
    assert "error: " in printed and "keep" in printed and "Traceback" not in printed
