"""`prunetune visualize`: what is drawn is what was selected, answers are evaluate's, and tiles lie at their place."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import visual_world
from conftest import ROOT, TINY_VLM
from PIL import Image
from video_world import build_processor, write_folder, write_model

from prunetune.cli import main
from prunetune.configs import ConfigError, EvaluateConfig, VisualizeConfig, load_config
from prunetune.configs.visualize import with_adapters, with_options
from prunetune.data_recipes import Sample, Turn
from prunetune.data_recipes.sample import DataError
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.visual.drawing.shapes import Words
from prunetune.evaluation.visual.drawing.svg import to_svg
from prunetune.evaluation.visual.merging import Traced
from prunetune.evaluation.visual.rows import arms_of, rows_of
from prunetune.evaluation.visual.run import visualize
from prunetune.models import Arm, CheckpointError, loading, peft_adapter
from prunetune.models.adapter import projector_state
from prunetune.models.seal import why_unsealed
from prunetune.pruning import PruningError, PruningSpec
from prunetune.pruning.families.base import registered_families
from prunetune.pruning.families.tiling import WHOLE, Tiling, anyres_tiling, written_tilings
from prunetune.pruning.registry import build_pruner, registered_methods
from prunetune.pruning.types import Selection, VisualTokens
from prunetune.scripts.verify import verify
from prunetune.tiny_world.recipe import SceneImages

SVG = "{http://www.w3.org/2000/svg}"
TINY = ("--model.path", str(TINY_VLM), "--model.dtype", "float32", "--device", "cpu")
TASK = ("--task", "tiny_world_validation")


def settings(output, *line):
    return load_config(VisualizeConfig, None, [*TINY, "--max_new_tokens", "6", *line, "--output", str(output)])


@pytest.fixture(scope="module")
def loaded():
    return Arm.load(load_config(VisualizeConfig, None, [*TINY, *TASK]).model, device="cpu")


@pytest.fixture(scope="module")
def tuned(loaded, tmp_path_factory):
    """Two projectors that are the base's with another sign: one for a method, one for several."""
    folder = tmp_path_factory.mktemp("tuned")
    tensors = {name: -tensor for name, tensor in projector_state(loaded.model).items()}
    record = {**loaded.base.hashes.record(), "pruning": PruningSpec("divprune", 16).model_dump()}
    other = Arm.load(loaded.base.config, device="cpu")  # wrapping changes the model that it is given
    wrapped = peft_adapter.wrap_projector(other.model)
    peft_adapter.write_adapter(folder / "one", tensors, wrapped, record)
    peft_adapter.write_adapter(folder / "elastic", tensors, wrapped, {**record, "elastic": {"budgets": [16]}})
    return folder


@pytest.fixture(scope="module")
def drawn(loaded, tuned, tmp_path_factory):
    """One run with all there is: kept, merged, dropped inside the LLM, tuned, a question that a method reads."""
    output = tmp_path_factory.mktemp("drawn") / "out"
    methods = [
        {"pruner": "divprune", "adapter": str(tuned / "one")},
        {"pruner": "visionzip"},
        {"pruner": "trimtokenator"},
        {"pruner": "divprune", "name": "inside", "budgets": ["50%"],
         "pruning": {"stages": [{"name": "fastv", "boundaries": [1], "keep": 24}]}},
    ]  # fmt: skip
    line = (*TASK, "--count", "2", "--methods", json.dumps(methods), "--budgets", '[8, "25%"]')
    visualize(settings(output, *line), loaded)
    return output


def record_of(output):
    values = json.loads((output / "kept.json").read_text())
    assert why_unsealed(values) is None
    return values


def cells_of(path):
    """The boxes of every cell of a figure by arm and budget: kind, token, token it went into, and where."""
    found = {}
    for group in ElementTree.parse(path).getroot().iter(f"{SVG}g"):
        boxes = []
        for box in group.findall(f"{SVG}rect"):
            if box.get("data-token") is not None:
                where = tuple(float(box.get(name)) for name in ("x", "y", "width", "height"))
                boxes.append((box.get("class"), int(box.get("data-token")), box.get("data-into"), where))
        found[group.get("data-arm"), group.get("data-budget")] = boxes
    return found


def kept_in(boxes):
    return [token for kind, token, _, _ in boxes if kind == "kept"]


def selection(loaded, sample, spec):
    """What a method keeps of one question, asked without anything of the visualization."""
    own = loaded.with_pruning(spec)
    inputs = own.place(own.formatter(SceneImages()).prompt_batch([sample]))
    return own.pruned.prepare(inputs).chosen["image"]


def first_sample(record):
    own = record["drawings"][0]
    return Sample(own["id"], "x", own["source"].split(", ")[1], (Turn(own["question"], None),))


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_boxes_are_the_selection(drawn, loaded):
    record, cells = record_of(drawn), cells_of(drawn / "kept_00.svg")
    for name, budget, count in (("divprune", 8, 8), ("divprune", "25%", 36), ("trimtokenator", 8, 8)):
        kept = selection(loaded, first_sample(record), PruningSpec(name, budget)).kept_tokens().nonzero()[:, 0]
        boxes = cells[name, str(budget)]
        shown = kept_in(boxes)
        assert shown == kept.tolist() and len(shown) == count
        assert sorted(token for kind, token, _, _ in boxes if kind == "dropped") == sorted({*range(144)} - {*shown})
        assert len(boxes) == 144  # each token once


def test_boxes_lie_over_their_patch(drawn):
    boxes = cells_of(drawn / "kept_00.svg")["divprune", "8"]
    left = min(where[0] for _, _, _, where in boxes)
    top = min(where[1] for _, _, _, where in boxes)
    side = 184 / 12
    for _, token, _, (x, y, width, height) in boxes:
        row, column = divmod(token, 12)
        assert abs(x + width / 2 - left - (column + 0.5) * side) < 0.6
        assert abs(y + height / 2 - top - (row + 0.5) * side) < 0.6


def test_a_percentage_draws_as_many_as_its_number(loaded, tmp_path):
    line = (*TASK, "--count", "1", "--methods", "[fps]", "--budgets", '["11.1%", 0.111, 16]', "--formats", "[svg]")
    visualize(settings(tmp_path / "out", *line), loaded)
    cells = cells_of(tmp_path / "out" / "kept_00.svg")
    kept = [
        [token for kind, token, _, _ in cells["fps", budget] if kind == "kept"] for budget in ("11.1%", "0.111", "16")
    ]
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 16
    assert not (tmp_path / "out" / "kept_00.png").exists() and not (tmp_path / "out" / "kept.html").exists()


def test_merged_tokens_go_where_the_method_put_them(drawn, loaded):
    """VisionZip: every token that is neither dominant nor a target goes to the target whose key is nearest."""
    record = record_of(drawn)
    choice = selection(loaded, first_sample(record), PruningSpec("visionzip", "25%"))
    (among,), (chosen,) = choice.candidates, choice.selections
    origin = chosen.origin[0]
    targets = origin[-round(36 * 5 / 32) :]
    dominant = origin[1 : -len(targets)]
    keys = torch.nn.functional.normalize(among.tokens.require("keys")[0].float(), dim=-1)
    expected = {}
    for token in sorted({*range(144)} - {*dominant.tolist(), *targets.tolist()}):
        expected[token] = int(targets[(keys[token] @ keys[targets].T).argmax()])
    taken = (set(chosen.of(0).tolist()) - set(origin.tolist())).pop()  # where [CLS] stands
    boxes = cells_of(drawn / "kept_00.svg")["visionzip", "25%"]
    assert {token: int(into) for kind, token, into, _ in boxes if kind == "merged"} == {
        token: into for token, into in expected.items() if token != taken
    }
    cell = next(c for c in record["drawings"][0]["cells"] if (c["arm"], c["budget"]) == ("visionzip", "25%"))
    assert len(cell["tokens"]["kept"]) == 36 and len(cell["tokens"]["merged_into"]) == 108


MERGING = ("bat", "downsample", "prumerge", "prumerge_plus", "prunesid", "tome", "trim", "visionzip", "vscan")


def test_every_method_that_merges_is_here():
    names = {name for name, method in registered_methods().items() if method.merges}
    assert names <= {*MERGING, "fastvid"}  # of videos


@pytest.mark.parametrize("name", MERGING)
def test_shares_make_up_the_merged_features(name):
    """What a method is said to have merged is what it handed over, with the tokens that it keeps anyway."""
    options = {"vscan": {"shallow_layer": 2}, "prumerge": {"neighbours": 8}}.get(name, {})
    pruner = build_pruner(name, options)
    draw = torch.Generator().manual_seed(3)
    signals = {}
    for need in pruner.needs:
        signal = need.partition("@")[0]
        shape = {"cls_feature": (2, 24), "keys": (2, 36, 16), "reader_keys": (2, 36, 16),
                 "image_embeds": (2, 36, 8), "text_embeds": (2, 1, 8), "reader_attention": (2, 36)}  # fmt: skip
        values = torch.randn(*shape.get(signal, (2, 4, 36)), generator=draw)
        signals[signal] = values.softmax(-1) if "attention" in signal else values
    features = 5 * torch.randn(2, 36, 24, generator=draw)
    tokens = VisualTokens(features, features[..., :12].contiguous(), signals, grid=(6, 6))
    plain, own = pruner(tokens, 9), Traced(pruner, True)(tokens, 9)
    assert all(torch.equal(a, b) for a, b in zip(plain.indices, own.indices, strict=True))
    if plain.merged is None and plain.mixing is None:
        assert own.shares is None
        return
    assert own.shares is not None
    for item in range(2):
        if plain.merged is None:
            assert torch.equal(own.shares[item], plain.mixing[item])
            continue
        made = own.shares[item] @ features[item]
        there = plain.origin[item] >= 0 if plain.origin is not None else torch.ones(len(made), dtype=torch.bool)
        assert torch.allclose(made[there], plain.merged[item][there], atol=2e-3)


def test_a_method_that_chooses_otherwise_when_asked_again_says_nothing():
    """It keeps other tokens of wider features, so that what it merged then is not what it merged."""

    class Fickle:
        needs = frozenset()

        def __call__(self, tokens, keep):
            first = tokens.features.shape[-1] % 2
            positions = torch.arange(first, first + keep).expand(len(tokens.features), -1)
            means = tokens.features.mean(dim=1, keepdim=True).expand(-1, keep, -1)
            return Selection(positions, list(means), list(positions))

    tokens = VisualTokens(torch.randn(1, 7, 4), torch.randn(1, 7, 4))
    assert Traced(Fickle(), True)(tokens, 3).shares is None
    wide = VisualTokens(torch.randn(1, 8, 4), torch.randn(1, 8, 4))  # of eight tokens it is even again
    assert torch.allclose(Traced(Fickle(), True)(wide, 3).shares[0], torch.full((3, 8), 1 / 8), atol=1e-4)


def test_tokens_that_the_llm_drops_are_those_of_the_stage(drawn):
    record = record_of(drawn)
    cell = next(c for c in record["drawings"][0]["cells"] if c["arm"] == "inside")
    assert cell["layers"] == [72, 24, 24] and cell["notes"]["llm_final_tokens"] == 24
    boxes = cells_of(drawn / "kept_00.svg")["inside", "50%"]
    kinds = [kind for kind, _, _, _ in boxes]
    assert (kinds.count("kept"), kinds.count("inside"), kinds.count("dropped")) == (24, 48, 72)
    entering = {token for kind, token, _, _ in boxes if kind in ("kept", "inside")}
    assert entering == set(cell["tokens"]["kept"]) | set(cell["tokens"]["inside"])


def test_which_tokens_a_stage_leaves_is_the_attention_of_the_last_prompt_token(drawn, loaded):
    """Eager attention of the layer before the boundary, computed by the stock model itself."""
    record = record_of(drawn)
    own = record["drawings"][0]
    eager = Arm.load(loaded.base.config.model_copy(update={"attention": "eager"}), device="cpu")
    arm = eager.with_pruning(PruningSpec("divprune", "50%"))
    inputs = arm.place(arm.formatter(SceneImages()).prompt_batch([first_sample(record)]))
    pruned = arm.pruned.prepare(inputs, padding_side="left")
    with torch.no_grad():
        output = arm.model(**pruned.inputs, output_attentions=True)
    visual = pruned.inputs["input_ids"][0] == arm.model.config.image_token_id
    heard = output.attentions[0][0, :, -1].mean(dim=0)[visual]
    entering = pruned.chosen["image"].kept_tokens().nonzero()[:, 0]
    expected = sorted(entering[heard.topk(24).indices].tolist())
    cell = next(c for c in own["cells"] if c["arm"] == "inside")
    assert cell["tokens"]["kept"] == expected


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_answers_and_scores_are_evaluates(drawn, loaded, tuned, tmp_path):
    record = record_of(drawn)
    ids = [item.id for item in get_task("tiny_world_validation").read(tmp_path)]
    limit = str(1 + max(ids.index(own["id"]) for own in record["drawings"]))
    base = [*TINY[:4], "--tasks", "[tiny_world_validation]", "--limit", limit, "--max_new_tokens", "6"]
    pruned = ("--pruning.pruner", "divprune", "--pruning.keep", "8")
    arms = {
        ("dense", None): (),
        ("divprune", 8): pruned,
        ("divprune, tuned", 8): (*pruned, "--adapter", str(tuned / "one")),
    }
    for (arm, budget), line in arms.items():
        config = load_config(EvaluateConfig, None, [*base, *line, "--output", str(tmp_path / arm)])
        rows = {row.id: row for row in read_results(evaluate(config, device="cpu", bar=False))}
        for own in record["drawings"]:
            cell = own["dense"] if arm == "dense" else next(
                c for c in own["cells"] if (c["arm"], c["budget"]) == (arm, budget)
            )  # fmt: skip
            row = rows[own["id"]]
            assert (cell["answer"], cell["score"], own["question"]) == (row.prediction, row.score, row.question)
            if arm != "dense":
                assert cell["reached_llm"] == row.kept


def test_the_figure_says_what_the_record_does(drawn):
    record = record_of(drawn)
    text = "".join(ElementTree.parse(drawn / "kept_01.svg").getroot().itertext())
    own = record["drawings"][1]
    assert own["question"] in text and f"right: {own['answer']}" in text
    for cell in own["cells"]:
        mark = "\u2713" if cell["score"] >= 0.5 else "\u2717"
        assert f"{mark} {cell['answer'] or '(nothing)'}"[:12] in text
    assert record["arms"][1]["projector_hash"] != record["original_projector_hash"]
    assert record["arms"][1]["tuned_for"]["keep"] == 16 and record["arms"][0]["adapter"] is None
    assert {"frozen_hash", "settings_hash", "template_hash", "prunetune", "versions"} <= record.keys()


def test_every_file_and_the_base_are_verified(drawn, tmp_path):
    checks = {check.link: check.holds for check in verify(drawn)}
    figures = ["kept_00.png", "kept_00.svg", "kept_01.png", "kept_01.svg", "kept.html"]
    assert all(checks[name] for name in ("seal", *figures, "frozen_hash")) and False not in checks.values()
    copied = tmp_path / "copied"
    shutil.copytree(drawn, copied)
    with (copied / "kept_00.svg").open("a") as file:
        file.write(" ")
    assert [check.link for check in verify(copied) if check.holds is False] == ["kept_00.svg"]
    text = (copied / "kept.json").read_text()
    (copied / "kept.json").write_text(text.replace('"score": 0.0', '"score": 1.0', 1))
    assert [check.link for check in verify(copied) if check.holds is False] == ["seal"]


@pytest.mark.parametrize("file", ["tiny", "llava15_7b"])
def test_shipped_visualizations_load_and_name_real_things(file):
    path = ROOT / "configs" / "visualize" / f"{file}.yaml"
    rows_of(load_config(VisualizeConfig, path))
    assert f"--config visualize/{file}" in path.read_text() and "Cost:" in path.read_text()


def test_maps_are_the_signals(drawn, loaded):
    """The CLS attention is the tower's own; the map's lightest cell is its highest token."""
    root = ElementTree.parse(drawn / "kept_00.svg").getroot()
    titles = [group.get("data-map") for group in root.iter(f"{SVG}g") if group.get("data-map")]
    assert titles == [
        "attention of [CLS], mean over heads",
        "cosine with the nearest word of the question, LLM space",
    ]
    image = next(image for image in root.iter(f"{SVG}image") if image.get("id") == "picture-map-0-0")
    pixels = _decoded(image.get("href")).astype(int).sum(axis=-1).flatten()
    sample = first_sample(record_of(drawn))
    arm = loaded.with_pruning(PruningSpec("fastervlm", 16))
    inputs = arm.place(arm.formatter(SceneImages()).prompt_batch([sample]))
    attention = arm.pruned.encode(inputs)["image"].groups[0].require("cls_attention")[0].mean(dim=0)
    assert pixels.shape == (144,) and pixels[int(attention.argmax())] == pixels.max()
    assert np.corrcoef(pixels, attention.numpy())[0, 1] > 0.9


def _decoded(address):
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def test_every_figure_reads_in_grey(drawn):
    """Kept patches are brighter than dropped ones on a grey picture, and have an outline."""
    grey = np.asarray(Image.open(drawn / "kept_00.png").convert("L")).astype(float)
    boxes = cells_of(drawn / "kept_00.svg")["divprune", "8"]
    light = {"kept": [], "dropped": []}
    for kind, _, _, (x, y, width, height) in boxes:
        inside = grey[round(2 * y) + 5 : round(2 * (y + height)) - 5, round(2 * x) + 5 : round(2 * (x + width)) - 5]
        light[kind].append(inside.mean())
    assert min(light["kept"]) > 2 * np.median(light["dropped"])


# ---- your own images, tiles, frames ----------------------------------------------------------------------------------


def test_your_own_images_and_question(loaded, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, suffix in enumerate(("png", "tiff", "png")):
        visual_world.gradient(60 + number, 90).save(folder / f"{number}.{suffix}")
    line = ("--images", f"[{folder}]", "--question", "what is shown ?", "--methods", "[divprune]", "--count", "2")
    paths = visualize(settings(tmp_path / "out", *line, "--formats", "[svg]"), loaded)
    assert [path.name for path in paths] == ["kept_00.svg", "kept_01.svg", "kept.json"]
    record = record_of(tmp_path / "out")
    assert [own["id"] for own in record["drawings"]] == ["0.png", "1.tiff"]
    assert record["drawings"][0]["answer"] is None and record["drawings"][0]["cells"][0]["score"] is None


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Folders of models that cut pictures into tiles, with their processors."""
    root = tmp_path_factory.mktemp("worlds")
    return {kind: (root / kind, visual_world.write(kind, root / kind)) for kind in visual_world.MADE}


def own_image(folder, tmp_path, *line):
    model = ("--model.path", str(folder), "--model.dtype", "float32", "--device", "cpu", "--max_new_tokens", "1")
    files = ("--images", f"[{tmp_path / 'one.png'}]", "--formats", "[svg]", "--output", str(tmp_path / "out"))
    return [*model, *files, *line]


# Height and width of the picture, and the rows and columns of its tiles.
CUT = {"llava_next": ((60, 150), (1, 2), 12), "internvl": ((90, 60), (3, 2), 3), "idefics3": ((60, 120), (1, 2), 4)}


@pytest.mark.parametrize("kind", CUT)
def test_tiles_lie_at_their_place(kind, worlds, tmp_path, monkeypatch):
    """On a picture whose colours grow from edge to edge, neighbouring tiles join without a step."""
    folder, processor = worlds[kind]
    (height, width), (rows, columns), side = CUT[kind]
    monkeypatch.setattr(loading, "_processor", lambda path, folder: processor)
    visual_world.gradient(height, width).save(tmp_path / "one.png")
    line = own_image(folder, tmp_path, "--question", "what is red ?", "--methods", "[divprune]", "--budgets", "[3]")
    visualize(load_config(VisualizeConfig, None, line))
    views = record_of(tmp_path / "out")["drawings"][0]["views"]
    names = [f"tile {row + 1}, {column + 1}" for row in range(rows) for column in range(columns)]
    assert [view["name"] for view in views] == ["whole image", *names]
    assert all(view["grid"] == [side, side] for view in views)
    root = ElementTree.parse(tmp_path / "out" / "kept_00.svg").getroot()
    images = {image.get("id"): image for image in root.iter(f"{SVG}image")}
    dense = next(group for group in root.iter(f"{SVG}g") if group.get("data-arm") == "dense")
    at = {use.get("href")[1:]: (float(use.get("x")), float(use.get("y"))) for use in dense.findall(f"{SVG}use")}
    whole = _decoded(images["picture-view-0"].get("href")).astype(int)
    left = min(at[f"picture-view-{number}"][0] for number in range(1, len(views)))
    top = min(at[f"picture-view-{number}"][1] for number in range(1, len(views)))
    for number in range(1, len(views)):
        name = f"picture-view-{number}"
        row, column = divmod(number - 1, columns)
        wide, high = float(images[name].get("width")), float(images[name].get("height"))
        assert at[name] == pytest.approx((left + column * wide, top + row * high), abs=0.05)
        tile = _decoded(images[name].get("href")).astype(int)
        red = tile[tile.shape[0] // 2].mean(axis=0)[0] / 255  # red says how far to the right it is
        assert red == pytest.approx((column + 0.5) / columns, abs=0.04)
    assert whole[:, -1, 0].min() > 230 and whole[:, 0, 0].max() < 25
    boxes = cells_of(tmp_path / "out" / "kept_00.svg")["divprune", "3"]
    kept = sum(kind_ == "kept" for kind_, _, _, _ in boxes)
    # A token that the model cuts away with a tile's padding may have been among the three.
    assert kept + sum(kind_ == "outside" for kind_, _, _, _ in boxes) >= 3 * len(views) >= kept
    assert len(boxes) == side**2 * len(views)


def test_padding_of_tiles_is_what_the_model_cuts_away(worlds, tmp_path, monkeypatch):
    """A picture of 60 x 150 pixels fills 67 of the 84 rows of its tiles, so 10 of their 12 rows of patches remain."""
    folder, processor = worlds["llava_next"]
    monkeypatch.setattr(loading, "_processor", lambda path, folder: processor)
    visual_world.gradient(60, 150).save(tmp_path / "one.png")
    line = own_image(folder, tmp_path, "--question", "what ?", "--methods", "[fastervlm]", "--budgets", "['100%']")
    visualize(load_config(VisualizeConfig, None, line))
    boxes = cells_of(tmp_path / "out" / "kept_00.svg")["fastervlm", "100%"]
    outside = sorted(token for kind, token, _, _ in boxes if kind == "outside")
    expected = [144 * tile + 12 * row + column for tile in (1, 2) for row in (0, 11) for column in range(12)]
    assert outside == expected and record_of(tmp_path / "out")["drawings"][0]["tokens"] == 3 * 144 - 48


def test_tilings_of_every_kind():
    """Rows and columns, from sizes or from what the prompt says; of several pictures in a row none is cut up."""
    assert anyres_tiling((60, 150), visual_world.PINPOINTS, 84) == Tiling(1, 2, whole=0)
    assert anyres_tiling((150, 140), visual_world.PINPOINTS, 84).tiles() == [1, 2, 3, 4]
    words = ["<s>", "<row_1_col_1>", "<image>", "<image>", "<row_1_col_2>", "<image>", "\n", "<row_2_col_1>", "<image>",
             "<row_2_col_2>", "<image>", "<global-img>", "<image>", "x", "<global-img>", "<image>", "</s>"]  # fmt: skip
    known = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [list(known)[number] for number in ids])
    ids = torch.tensor([known[word] for word in words])
    assert written_tilings(ids, known["<image>"], tokenizer) == [Tiling(2, 2, whole=4), WHOLE]
    vision = SimpleNamespace(image_size=84)
    model = SimpleNamespace(config=SimpleNamespace(image_grid_pinpoints=visual_world.PINPOINTS, vision_config=vision))
    family = registered_families()["llava_onevision"]
    sizes = {"image_sizes": torch.tensor([[60, 150], [150, 60]])}
    assert family.tilings(model, None, sizes, []) == [Tiling(1, 2, whole=0), Tiling(2, 1, whole=0)]
    assert family.tilings(model, None, {**sizes, "batch_num_images": [2]}, []) == [WHOLE, WHOLE]


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """A tiny Qwen2.5-VL for videos, whose processor is put in, and a folder of six frames."""
    monkeypatch.setattr(loading, "_processor", lambda path, folder: build_processor())
    (tmp_path / "qwen").mkdir()
    write_folder(tmp_path / "clip", 6)
    return ["--model.path", str(write_model(tmp_path / "qwen")), "--model.dtype", "float32", "--device", "cpu"]


def test_frames_of_a_video_stand_in_a_row(videos, tmp_path):
    line = ["--videos", f"[{tmp_path / 'clip'}]", "--question", "what moves ?", "--methods", "[evs, divprune]",
            "--budgets", "[8]", "--max_new_tokens", "1", "--video", "{frames: 4, frame_rate: 3.0}"]  # fmt: skip
    visualize(load_config(VisualizeConfig, None, [*videos, *line, "--output", str(tmp_path / "out")]))
    own = record_of(tmp_path / "out")["drawings"][0]
    assert [(view["name"], view["grid"]) for view in own["views"]] == [("frame 1", [3, 4]), ("frame 2", [3, 4])]
    cells = {cell["arm"]: cell["tokens"]["kept"] for cell in own["cells"]}
    assert len(cells["evs"]) == 16 and set(range(12)) <= set(cells["evs"])  # its first frame whole
    assert sum(token < 12 for token in cells["divprune"]) == 8 and len(cells["divprune"]) == 16
    boxes = cells_of(tmp_path / "out" / "kept_00.svg")["evs", "8"]
    first = [where for _, token, _, where in boxes if token < 12]
    second = [where for _, token, _, where in boxes if token >= 12]
    assert max(x + width for x, _, width, _ in first) < min(x for x, _, _, _ in second)


def test_signals_of_two_layers_are_read_in_two_runs(loaded, tmp_path):
    """One name has one place, so that two methods with different layers must not read each other's."""
    options = [{"object_layer": layer, "alpha": 0.5} for layer in (1, 3)]
    methods = [{"pruner": "hiprune", "name": str(number), "options": own} for number, own in enumerate(options)]
    line = (*TASK, "--count", "1", "--methods", json.dumps(methods), "--formats", "[svg]")
    visualize(settings(tmp_path / "out", *line), loaded)
    record = record_of(tmp_path / "out")
    shown = [sorted(cell["tokens"]["kept"]) for cell in record["drawings"][0]["cells"]]
    expected = []
    for own in options:
        choice = selection(loaded, first_sample(record), PruningSpec("hiprune", 16, own))
        expected.append(choice.kept_tokens().nonzero()[:, 0].tolist())
    assert shown == expected and expected[0] != expected[1]


def test_images_are_encoded_once_for_all_methods(loaded, tmp_path, monkeypatch):
    runs = []
    handle = loaded.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        line = (*TASK, "--count", "2", "--methods", "[divprune, fastervlm, visionzip]", "--budgets", "[8, 16]")
        visualize(settings(tmp_path / "out", *line, "--formats", "[svg]"), loaded)
    finally:
        handle.remove()
    assert len(runs) == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_names_of_pruners_stand_anywhere_among_the_options(tmp_path, capsys):
    main(["visualize", "prismprune", "--count", "1", "fps", "--keep", "8,25%", "--format", "svg", "--maps", "false",
          "--option", "prismprune.salient_ratio=0.3", "--output", str(tmp_path / "out")])  # fmt: skip
    told = capsys.readouterr().out.splitlines()
    assert told == [str(tmp_path / "out" / name) for name in ("kept_00.svg", "kept.json")]
    record = record_of(tmp_path / "out")
    assert [arm["label"] for arm in record["arms"]] == ["prismprune", "fps"]
    assert record["arms"][0]["pruning"]["options"] == {"salient_ratio": 0.3}
    assert [arm["budgets"] for arm in record["arms"]] == [[8, "25%"]] * 2
    config = load_config(VisualizeConfig, tmp_path / "out" / "config.yaml")
    assert config.maps is False and config.task == "tiny_world_validation"


WRONG = {
    "there is nothing to draw": (),
    "images of your own need a question": ("--images", "[a.png]"),
    "a question is asked about images of your own": (*TASK, "--question", "what ?"),
    "task 'tiny_world_validation' has images of its own": (*TASK, "--images", "[a.png]"),
    "formats.0: input should be 'png', 'svg' or 'html'": (*TASK, "--formats", "[gif]"),
    "budgets: 16 stands there twice": (*TASK, "--budgets", "[16, 16]"),
    "two methods are called divprune": (*TASK, "--methods", "[divprune, divprune]"),
    "methods: name at least one": (*TASK, "--methods", "[]"),
    "colour: unknown key": (*TASK, "--colour", "red"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_configuration_that_can_not_work_is_told_before_anything_is_loaded(message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(VisualizeConfig, None, [*TINY, *WRONG[message]])


REFUSED = {
    "image nowhere.png is missing": (TaskError, ("--images", "[nowhere.png]", "--question", "what ?")),
    "video nowhere is missing": (TaskError, ("--videos", "[nowhere]", "--question", "what ?")),
    "image clip.mp4 is a video; give it as a video": (TaskError, ("--images", "[clip.mp4]", "--question", "what ?")),
    "keep='120%' is no budget": (PruningError, (*TASK, "--budgets", "['120%']")),
    "keep=0: a budget keeps at least 1": (PruningError, (*TASK, "--budgets", "[0]")),
    "unknown pruner 'divprun', did you mean 'divprune'": (PruningError, (*TASK, "--methods", "[divprun]")),
    "pruner 'fps' has no option 'bets'": (PruningError, (*TASK, "--methods", "[{pruner: fps, options: {bets: 1}}]")),
    "methods: fps: scop: Extra inputs": (ConfigError, (*TASK, "--methods", "[fps]", "--pruning", "{scop: image}")),
    "has no question 'nobody'": (TaskError, (*TASK, "--ids", "[nobody]")),
    "unknown task 'tiny_word'": (TaskError, ("--task", "tiny_word")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_can_not_be_drawn_is_one_line_before_the_model_is_loaded(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Arm, "load", None)
    kind, line = REFUSED[message]
    with pytest.raises(kind, match=re.escape(message)) as raised:
        visualize(settings(tmp_path / "out", *line))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"folder \S+empty holds no images"):
        visualize(settings(tmp_path / "out", "--images", f"[{tmp_path / 'empty'}]", "--question", "what ?"))


def test_a_projector_of_another_method_is_refused_and_an_elastic_one_is_not(loaded, tuned, tmp_path):
    def line(folder):
        methods = json.dumps([{"pruner": "fps", "adapter": str(tuned / folder)}])
        return settings(tmp_path / folder, *TASK, "--count", "1", "--methods", methods, "--formats", "[svg]")

    with pytest.raises(
        CheckpointError, match="was recalibrated for divprune, and the method is fps; give it to divprune"
    ):
        visualize(line("one"), loaded)
    visualize(line("elastic"), loaded)
    assert [arm["label"] for arm in record_of(tmp_path / "elastic")["arms"]] == ["fps", "fps, tuned"]


def test_a_model_without_videos_is_not_asked_about_any(loaded, tmp_path):
    write_folder(tmp_path / "clip", 3)
    line = ("--videos", f"[{tmp_path / 'clip'}]", "--question", "what ?", "--methods", "[divprune]")
    with pytest.raises(TaskError, match="^model family 'llava' takes none; choose a model that takes videos"):
        visualize(settings(tmp_path / "out", *line), loaded)


def test_tokens_without_a_grid_are_refused_in_one_line(loaded, tmp_path, monkeypatch):
    from dataclasses import replace

    from prunetune.pruning import PrunedModel

    real = PrunedModel.encode

    def gridless(self, *given, **more):
        found = {}
        for name, vision in real(self, *given, **more).items():
            groups = tuple(replace(group, grid=None, no_grid="the model pools them") for group in vision.groups)
            found[name] = replace(vision, groups=groups)
        return found

    monkeypatch.setattr(PrunedModel, "encode", gridless)
    with pytest.raises(TaskError, match=r"the model pools them, so they can't be drawn over the image") as raised:
        visualize(settings(tmp_path / "out", *TASK, "--methods", "[divprune]"), loaded)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_options_and_adapters_of_the_command_line():
    methods = load_config(VisualizeConfig, None, [*TINY, *TASK, "--methods", "[prismprune, divprune]"]).methods
    changed = with_options(methods, ["prismprune.salient_ratio=0.3", "prismprune.other=[1, 2]"])
    assert changed[0].options == {"salient_ratio": 0.3, "other": [1, 2]} and changed[1] == methods[1]
    assert with_adapters(methods, ["divprune=a=b"])[1].adapter == "a=b"
    assert with_adapters(methods[:1], ["folder"])[0].adapter == "folder"
    for wrong in ("prismprune", "prismprune.beta", ".beta=1", "prismprune.=1"):
        with pytest.raises(ConfigError, match=r"write METHOD\.OPTION=VALUE"):
            with_options(methods, [wrong])
    with pytest.raises(ConfigError, match="no method is called 'fps'; there are prismprune, divprune"):
        with_options(methods, ["fps.a=1"])
    with pytest.raises(ConfigError, match="there are 2 methods; write METHOD=FOLDER"):
        with_adapters(methods, ["folder"])


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_no_address_and_every_drawing_has_words(drawn):
    text = (drawn / "kept.html").read_text()
    assert not re.findall(r"[a-z]+://", text) and "unsafe" not in text and " style=" not in text
    labels = re.findall(r'<svg viewBox[^>]*role="img" aria-label="([^"]+)"', text)
    record = record_of(drawn)
    cells = sum(len(own["cells"]) for own in record["drawings"])
    assert len(labels) == cells + 2 * (1 + 2)  # and for each question its picture and two maps
    assert any(label.startswith("divprune at 8 tokens: 8 of 144 kept; answer: ") for label in labels)


HOSTILE = '</svg><script>window.attacked = true</script><img src=x onerror="window.attacked = 1"> {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def hostile(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    visual_world.gradient(40, 60).save(folder / "one.png")
    methods = json.dumps([{"pruner": "fps", "name": HOSTILE}])
    line = ("--images", f"[{folder / 'one.png'}]", "--question", json.dumps(HOSTILE), "--methods", methods)
    visualize(settings(folder / "out", *line, "--budgets", "[4, 8]"), loaded)
    return folder / "out"


def test_text_from_elsewhere_stays_text(hostile):
    page = (hostile / "kept.html").read_text()
    assert page.count("<script>") == 1 and "<img" not in page and "{{ 7 * 7 }}" in page
    assert HOSTILE in "".join(ElementTree.parse(hostile / "kept_00.svg").getroot().find(f"{SVG}title").itertext())


def test_a_file_of_another_systems_letters_is_drawn_and_a_question_is_text(loaded, tmp_path):
    visual_world.gradient(40, 60).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b\udcff.png")
    config = settings(tmp_path / "out", "--images", f"[{tmp_path}]", "--question", "what ?", "--methods", "[fps]")
    visualize(config.model_copy(update={"formats": ["html", "svg"]}), loaded)
    assert "b?.png" in (tmp_path / "out" / "kept.html").read_text()
    for question, said in (("what <image> ?", "holds '<image>', which stands for an image"), ("\udcff ?", "not UTF-8")):
        asked = config.model_copy(update={"question": question, "output": str(tmp_path / "other")})
        with pytest.raises(DataError, match=said):
            visualize(asked, loaded)


def test_control_characters_of_an_answer_leave_the_figure_readable(tmp_path):
    text = to_svg([Words("a\x00b\x1b \ufffe<", 0, 10, 9)], 20, 20, "\x07 & more")
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}text").text == "a\ufffdb\ufffd \ufffd<" and root.find(f"{SVG}title").text == "\ufffd & more"


def test_arms_of_one_text_tower_share_it(loaded):
    methods = [{"pruner": name, "pruning": {"text_tower": str(TINY_VLM / "clip")}} for name in ("cdpruner", "trim")]
    arms = arms_of(rows_of(settings("x", *TASK, "--methods", json.dumps(methods))), loaded)
    assert arms[0].pruned.text is arms[1].pruned.text


def test_the_slider_shows_one_budget_by_keyboard(drawn, hostile, browser):
    from selenium.webdriver.common.keys import Keys

    browser.get((drawn / "kept.html").as_uri())
    shown = "return [...document.querySelectorAll('.cell')].filter(c => !c.hidden && c.dataset.column !== '-1')"
    columns = f"{shown}.map(c => c.dataset.column)"
    assert set(browser.execute_script(columns)) == {"0"}
    slider = browser.find_element("id", "budget")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert set(browser.execute_script(columns)) == {"1"} and browser.find_element("id", "told").text == "25 %"
    browser.find_element("id", "all").send_keys(Keys.SPACE)
    assert set(browser.execute_script(columns)) == {"0", "1", "2"}
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    drawings = "return [...document.querySelectorAll('.cell svg')].every(s => s.getBoundingClientRect().width > 50)"
    assert browser.execute_script(drawings)
    browser.get((hostile / "kept.html").as_uri())
    assert browser.execute_script("return window.attacked") is None
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A session, where a browser is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    yield session
    session.quit()
