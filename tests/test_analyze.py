"""``prunetune analyze``: what it writes of images and of finished evaluations, against other ways of computing it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qwen_world
import test_llava_next
import torch
from benchmark_files import FILES
from conftest import ROOT, TINY_VLM
from PIL import Image
from synthetic_arms import write_arm

from prunetune.cli import main
from prunetune.cli.commands.analyze import runs_as_list
from prunetune.configs import AnalyzeConfig, ConfigError, ModelConfig, load_config
from prunetune.data_recipes.sample import DataError
from prunetune.evaluation.analysis import look
from prunetune.evaluation.analysis.analyze import analyze
from prunetune.evaluation.analysis.complexity import entropy
from prunetune.evaluation.analysis.figures import drawn, legend_below, named
from prunetune.evaluation.analysis.images import datasets_of
from prunetune.evaluation.analysis.look import Eye
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.files import file_hash
from prunetune.evaluation.run.features import sample_of
from prunetune.evaluation.run.visualize import kept_view
from prunetune.evaluation.tasks import get_task
from prunetune.evaluation.tasks.base import UNSET
from prunetune.models import Arm
from prunetune.models.seal import why_unsealed
from prunetune.outputs import OutputError
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.scripts.verify import verify

MODEL = ModelConfig(path=str(TINY_VLM), dtype="float32")
METHODS = ["fastervlm", {"pruner": "divprune", "keep": 24}, "visionzip", {"pruner": "trim", "name": "text"}]
IMAGES = 5


def settings(output, **fields):
    values = {"model": MODEL.model_dump(), "methods": METHODS, "keep": 16, "tasks": ["tiny_world"], "limit": IMAGES,
              "batch_size": 3, "text_tower": str(TINY_VLM / "clip"), "output": str(output)}  # fmt: skip
    return AnalyzeConfig.model_validate({**values, **fields})


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dense():
    return Arm.load(MODEL)


@pytest.fixture(scope="module")
def items():
    first = {}
    for item in get_task("tiny_world").open(UNSET).items:
        first.setdefault(item.image, item)
    return list(first.values())[:IMAGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, dense):
    output = tmp_path_factory.mktemp("analysis") / "out"
    everything = ["complexity", "diversity", "concentration", "positions", "overlap"]
    corruption = {"names": ["contrast", "pixelate"], "severities": [1, 5], "questions": 3}
    try:
        import imagecorruptions  # noqa: F401
    except ImportError:
        pass
    else:
        everything.append("corruption")
    analyze(settings(output, analyses=everything, corruption=corruption), dense, bar=False)
    return output


@pytest.fixture(scope="module")
def alone(dense, items):
    """What each method keeps of each image by itself: indices by label, and projected tokens."""
    images = get_task("tiny_world").open(UNSET).open_images()
    tower = str(TINY_VLM / "clip")
    specs = {"fastervlm": ("fastervlm", 16), "divprune": ("divprune", 24), "visionzip": ("visionzip", 16),
             "text": ("trim", 16)}  # fmt: skip
    kept = {label: [] for label in specs}
    for label, spec in specs.items():
        arm = dense.with_pruning(PruningSpec(*spec, text_tower=tower))
        for item in items:
            kept[label].append(set(kept_view(arm, images, sample_of(item))[0].tolist()))
    tokens = []
    for item in items:
        pixels = dense.processor.image_processor(images.open(item.image, "x"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = dense.model.get_image_features(pixel_values=pixels)
        tokens.append(torch.as_tensor(features.pooler_output[0]).numpy())
    return kept, tokens


def test_erank_and_entropy_are_those_of_the_stock_model(folder, items, alone, dense):
    from transformers import CLIPVisionModel

    found = rows(folder / "complexity_images.csv")
    assert [(own["dataset"], own["image"], own["tokens"]) for own in found] == [
        ("tiny_world", item.image, "144") for item in items
    ]
    layer = dense.model.config.vision_feature_layer
    tower = CLIPVisionModel(dense.model.config.vision_config)
    tower.load_state_dict(dense.model.model.vision_tower.state_dict())
    tower.eval().set_attn_implementation("eager")
    images = get_task("tiny_world").open(UNSET).open_images()
    for own, item, tokens in zip(found, items, alone[1], strict=True):
        values = np.linalg.svd(tokens.astype(np.float64), compute_uv=False)
        shares = values / values.sum()
        assert float(own["erank"]) == pytest.approx(np.exp(entropy(shares)), rel=1e-3)
        pixels = dense.processor.image_processor(images.open(item.image, "x"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            attention = tower(pixels, output_attentions=True).attentions[layer][0].mean(dim=0)[0, 1:].double()
        weights = (attention / attention.sum()).numpy()
        assert float(own["entropy"]) == pytest.approx(float(-(weights * np.log(weights)).sum()), rel=1e-4)


def test_the_overlap_is_that_of_the_sets_that_each_method_keeps_alone(folder, alone):
    kept, _ = alone
    found = {(own["method"], own["other"]): own for own in rows(folder / "overlap.csv")}
    assert len(found) == 6
    for (one, other), own in found.items():
        values = [len(a & b) / len(a | b) for a, b in zip(kept[one], kept[other], strict=True)]
        assert float(own["jaccard"]) == pytest.approx(np.mean(values), rel=1e-4) and own["n"] == str(IMAGES)
    by_chance = float(found["fastervlm", "divprune"]["by_chance"])
    assert by_chance == pytest.approx(16 * 24 / 144 / (40 - 16 * 24 / 144), abs=0.005)


def test_maps_count_where_tokens_are_kept(folder, alone):
    kept, _ = alone
    cells = rows(folder / "positions_cells.csv")
    for label, sets in kept.items():
        own = {(int(cell["row"]), int(cell["column"])): cell for cell in cells if cell["method"] == label}
        assert len(own) == 144
        for (row, column), cell in own.items():
            assert float(cell["kept"]) == pytest.approx(np.mean([row * 12 + column in one for one in sets]))
        assert np.mean([float(cell["of_even"]) for cell in own.values()]) == pytest.approx(1, abs=1e-4)


def test_diversity_is_that_of_the_features_which_reach_the_llm(folder, alone):
    kept, tokens = alone
    found = {(own["image"], own["method"]): own for own in rows(folder / "diversity_images.csv")}
    images = list(dict.fromkeys(image for image, _ in found))
    for place, image in enumerate(images):
        assert found[image, "dense"]["kept"] == "144"
        for label in ("fastervlm", "divprune"):
            own = tokens[place][sorted(kept[label][place])].astype(np.float64)
            values = np.linalg.svd(own, compute_uv=False)
            assert float(found[image, label]["erank"]) == pytest.approx(
                np.exp(entropy(values / values.sum())), rel=1e-3
            )
            units = own / np.linalg.norm(own, axis=1, keepdims=True)
            cosines = (units @ units.T)[np.triu_indices(len(own), 1)]
            assert float(found[image, label]["distance"]) == pytest.approx(1 - cosines.mean(), rel=1e-3)
        # Merged tokens are others than any of the image: what visionzip hands on is not what stands in those places.
        own = tokens[place][sorted(kept["visionzip"][place])].astype(np.float64)
        values = np.linalg.svd(own, compute_uv=False)
        assert abs(float(found[image, "visionzip"]["erank"]) - np.exp(entropy(values / values.sum()))) > 1e-3


def test_the_method_that_sorts_by_attention_keeps_the_most_of_it(folder):
    found = rows(folder / "concentration_images.csv")
    for own in found:
        assert float(own["mass"]) <= float(own["most"]) + 1e-6 <= 1 + 2e-6
        if own["method"] == "fastervlm":
            assert float(own["mass"]) == pytest.approx(float(own["most"]), rel=1e-5)
    shares = {own["method"]: float(own["kept_share"]) for own in rows(folder / "concentration_kept.csv")}
    assert shares["divprune"] == pytest.approx(24 / 144, rel=1e-4)


def test_corrupted_images_are_asked_about_and_compared_with_clean_ones(folder, dense, items):
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    found = {(own["corruption"], own["severity"], own["method"]): own for own in rows(folder / "corruption.csv")}
    labels = ("dense", "fastervlm", "divprune", "visionzip", "text")
    assert len(found) == 5 * len(labels)  # clean, and two of two severities
    images = get_task("tiny_world").open(UNSET).open_images()
    answers = dense.answer(dense.formatter(images), [sample_of(item) for item in items[:3]], 16)
    right = [get_task("tiny_world").score(own.text, item).score for own, item in zip(answers, items, strict=False)]
    assert float(found["clean", "0", "dense"]["accuracy"]) == pytest.approx(100 * np.mean(right), abs=1e-3)
    for label in labels:
        assert found["clean", "0", label]["jaccard"] == "" and found["contrast", "5", "dense"]["jaccard"] == ""
        change = float(found["contrast", "5", label]["change"])
        clean = float(found["clean", "0", label]["accuracy"])
        assert change == pytest.approx(float(found["contrast", "5", label]["accuracy"]) - clean, abs=1e-3)
    mild, strong = (float(found["contrast", severity, "fastervlm"]["jaccard"]) for severity in "15")
    assert 1 > mild > strong
    eranks = rows(folder / "corruption_erank.csv")
    assert [(own["corruption"], own["severity"]) for own in eranks] == [
        ("contrast", "1"), ("contrast", "5"), ("pixelate", "1"), ("pixelate", "5")
    ]  # fmt: skip
    clean = [float(own["erank"]) for own in rows(folder / "complexity_images.csv")[:3]]
    assert float(eranks[0]["clean"]) == pytest.approx(np.mean(clean), rel=1e-4)
    of_mean = float(eranks[1]["difference"]) / float(eranks[1]["clean"])
    assert float(eranks[1]["of_clean_mean"]) == pytest.approx(of_mean, rel=1e-4)


def test_the_page_shows_every_figure_and_the_record_seals_every_file(folder, dense):
    page = (folder / "index.md").read_text()
    figures = sorted(path.stem for path in folder.glob("*.png"))
    assert len(figures) >= 7
    for name in figures:
        assert f"({name}.png)" in page and (folder / f"{name}.svg").read_text().startswith("<?xml")
        assert min(Image.open(folder / f"{name}.png").size) > 200
    for path in folder.glob("*.csv"):
        assert f"[{path.name}]({path.name})" in page
    record = json.loads((folder / "analysis.json").read_text())
    assert why_unsealed(record) is None and record["frozen_hash"] == dense.base.frozen_hash
    assert record["attention"] == "cls_attention" and record["datasets"]["tiny_world"]["images"] == IMAGES
    for name, digest in record["files"].items():
        assert file_hash(folder / name) == digest
    written = {path.name for path in folder.iterdir()} - {".prunetune.json", "analysis.json"}
    assert set(record["files"]) == written
    again = load_config(AnalyzeConfig, folder / "config.yaml")
    assert again.methods == settings(folder).methods and again.limit == IMAGES


def test_equal_analyses_are_equal_files_and_replace_one_another(folder, dense, tmp_path):
    output, twice = tmp_path / "out", tmp_path / "twice"
    for one in (output, twice):
        analyze(settings(one, analyses=["complexity", "concentration"]), dense, bar=False)
    own = {path.name: path.read_bytes() for path in output.iterdir() if path.suffix in (".csv", ".png", ".svg")}
    assert own and not any(name.startswith(("corruption", "overlap")) for name in own)
    for name, content in own.items():
        assert (twice / name).read_bytes() == content, name
    (output / "mine.txt").write_text("mine")
    analyze(settings(output, analyses=["overlap"], batch_size=1), dense, bar=False)
    assert {path.name for path in output.glob("*.csv")} == {"overlap.csv"}  # of the earlier one nothing is left
    assert rows(output / "overlap.csv") == rows(folder / "overlap.csv")  # an image's choice is not its batch's
    assert (output / "mine.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs").write_text("x")
    with pytest.raises(OutputError, match="is not empty and holds no analysis of prunetune"):
        analyze(settings(other), dense, bar=False)


def test_a_folder_of_images_is_looked_at_like_a_benchmark(dense, tmp_path, items):
    images = get_task("tiny_world").open(UNSET).open_images()
    (tmp_path / "mine" / "below").mkdir(parents=True)
    for number, item in enumerate(items[:2]):
        name = "below/1.gif" if number else "0.png"
        images.open(item.image, "x").save(tmp_path / "mine" / name)
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    config = settings(tmp_path / "out", tasks=[], images=str(tmp_path / "mine"), analyses=["complexity", "overlap"])
    analyze(config, dense, bar=False)
    found = rows(tmp_path / "out" / "complexity_images.csv")
    assert [own["image"] for own in found] == ["0.png", "below/1.gif"]
    page = (tmp_path / "out" / "index.md").read_text()
    assert "Of " in page and "Pearson not defined (fewer than three images, or all alike)" in page


def test_names_are_no_formulas_and_a_question_is_text(dense, tmp_path):
    (tmp_path / "of $\\x$ 1").mkdir()
    Image.new("RGB", (84, 84), "red").save(tmp_path / "of $\\x$ 1" / 'a, "b".png')
    fields = {"tasks": [], "images": str(tmp_path / "of $\\x$ 1"), "analyses": ["concentration"]}
    methods = [{"pruner": "divprune", "name": "$\\frac$"}]
    analyze(settings(tmp_path / "out", methods=methods, **fields), dense, bar=False)
    assert rows(tmp_path / "out" / "concentration_images.csv")[0]["image"] == 'a, "b".png'
    assert "$\\frac$" in (tmp_path / "out" / "index.md").read_text()
    with drawn(tmp_path, "named", "_a", (2, 2)) as axes:  # the legend names what begins with an underscore as well
        axes[0][0].plot([0, 1], label=named("_b"))
        legend_below(axes)
        (legend,) = axes[0][0].figure.legends
        assert [text.get_text().strip() for text in legend.get_texts()] == ["_b"]
    with pytest.raises(DataError, match="^the question holds '<image>', which stands for an image; leave it out$"):
        analyze(settings(tmp_path / "other", question="what <image> ?", **fields), dense, bar=False)
    (tmp_path / "of $\\x$ 1" / "b\udcff.png").write_bytes(b"")  # of another system's letters
    with pytest.raises(TaskError, match=r"^the name of the file 'b\\udcff.png' in .* is not UTF-8; rename it$"):
        analyze(settings(tmp_path / "other", **fields), dense, bar=False)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_crops_and_native_resolution_are_looked_at_token_by_token(family):
    """Images of several crops, some cut by padding, and images of different sizes: by what a prompt's slots hold."""
    if family == "llava_next":
        world = test_llava_next.TestLlavaNext()
        model = world.make_model()
        inputs = world.batch([(((16, 30),), 6), (((32, 13),), 3), (((20, 32),), 4)], "right", False)
        names = ("fastervlm", "divprune")
    else:
        model = qwen_world.tiny_qwen()
        grids = [(1, 8, 8), (1, 4, 12), (1, 8, 8)]
        samples = [qwen_world.Row((("image", grid, seed),), 5, seed) for seed, grid in enumerate(grids)]
        inputs = qwen_world.batch(samples, labels=False)
        names = ("divprune", "random")
    keep = 3
    pruned = {name: PrunedModel(model, PruningSpec(name, keep)) for name in names}
    signal = "cls_attention" if family == "llava_next" else "received_attention"
    needs = frozenset({signal}).union(*(one.needs for one in pruned.values()))
    with torch.no_grad():
        vision = pruned[names[0]].encode(inputs, needs)
        made = {name: one.prepare(inputs, vision=vision) for name, one in pruned.items()}
        looked = list(look.looked_at(vision["image"], made, signal))
        stock = model.model.get_image_features(
            **{key: inputs[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs}
        ).pooler_output
    assert len(looked) == 3
    for row, own in enumerate(looked):
        np.testing.assert_allclose(own.tokens.numpy(), stock[row].numpy(), atol=1e-5)
        assert all(shares.sum() == pytest.approx(1) for shares in own.attention)
        newlines = int((vision["image"].origin[row] < 0).sum())
        assert own.count == len(stock[row]) - newlines
        for name in names:
            chosen = set(made[name].chosen["image"].kept_tokens().nonzero()[:, 0].tolist())
            reached = chosen & set(vision["image"].origin[row].tolist())
            assert int(own.kept_of_all(name).sum()) == sum(int(mask.sum()) for mask in own.kept[name]) == len(reached)
            assert len(own.features[name]) == made[name].kept["image"][row] >= int(own.kept_of_all(name).sum())
        # No token is kept that the model cuts away, and of each crop no more than the budget.
        assert all(mask.sum() <= keep and not (mask & ~there).any()
                   for mask, there in zip(own.kept[names[1]], own.there, strict=True))  # fmt: skip
    assert [own.grid for own in looked] == ([(4, 4)] * 3 if family == "llava_next" else [(4, 4), (2, 6), (4, 4)])


@pytest.mark.parametrize("name", ["tiny", "llava15_7b_adaptive_study"])
def test_shipped_analyses_load_and_name_real_things(name):
    config = load_config(AnalyzeConfig, f"analyze/{name}")
    assert [spec.build() for spec in config.specs.values()] and [get_task(task) for task in config.tasks]
    header = (ROOT / "configs" / "analyze" / f"{name}.yaml").read_text().split("model:")[0]
    assert f"--config analyze/{name}" in header and "Hardware:" in header and "Cost:" in header


def test_verify_checks_every_file_and_the_base(folder, tmp_path, pope_items):
    shutil.copytree(folder, tmp_path / "copy")
    found = {check.link: check.holds for check in verify(tmp_path / "copy")}
    assert set(found.values()) == {True} and {"seal", "index.md", "frozen_hash"} <= set(found)
    (tmp_path / "copy" / "overlap.csv").write_text("edited")
    found = {check.link: check.holds for check in verify(tmp_path / "copy")}
    assert [link for link, holds in found.items() if holds is False] == ["overlap.csv"]
    record = tmp_path / "copy" / "analysis.json"
    record.write_text(record.read_text().replace('"images": 5', '"images": 6'))
    assert [(check.link, check.holds) for check in verify(tmp_path / "copy")] == [("seal", False)]
    write_arm(tmp_path / "run", {"pope": (pope_items, ["Yes"] * 12)}, ("divprune", 16))
    analyze(settings(tmp_path / "out", tasks=[], runs=[str(tmp_path / "run")]), bar=False)
    own = {check.link: check.holds for check in verify(tmp_path / "out")}
    assert own[f"run {tmp_path / 'run'}"] is True and "frozen_hash" not in own
    shutil.rmtree(tmp_path / "run")
    assert {check.link: check.holds for check in verify(tmp_path / "out")}[f"run {tmp_path / 'run'}"] is None


def test_methods_that_read_the_question_get_it_and_images_are_encoded_once(dense, tmp_path, monkeypatch):
    dataset = datasets_of(settings(tmp_path))[0]
    arms = {label: dense.with_pruning(spec) for label, spec in settings(tmp_path).specs.items()}
    calls = []
    encode = type(dense.pruned.family).encode
    monkeypatch.setattr(type(dense.pruned.family), "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    eye = Eye(dense, arms)
    first = eye.batch(dataset.images, dataset.samples(dataset.items[:2])).looked()
    assert len(calls) == 1 and list(first[0].kept) == ["fastervlm", "divprune", "visionzip", "text"]
    asked = [replace(item, question="what colour is the large circle ?") for item in dataset.items[:2]]
    second = eye.batch(dataset.images, dataset.samples(asked)).looked()
    assert any((a.kept_of_all("text") != b.kept_of_all("text")).any() for a, b in zip(first, second, strict=True))
    assert all(
        (a.kept_of_all("divprune") == b.kept_of_all("divprune")).all() for a, b in zip(first, second, strict=True)
    )
    assert [int(first[0].kept_of_all(label).sum()) for label in arms] == [16, 24, 16, 16]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["tiny_word"]}, "did you mean 'tiny_world'"),
        ({"tasks": ["videomme"], "data": "."}, "videomme asks about videos, and single images are analysed"),
        ({"tasks": [], "images": "nowhere"}, "images 'nowhere' is no folder"),
        ({"analyses": ["corruption"], "corruption": {"names": ["snwo"]}}, "did you mean 'snow'"),
        ({"runs": ["nowhere"]}, "nowhere is no evaluated arm"),
    ],
)
def test_what_can_not_be_analysed_is_one_line_before_the_model_is_loaded(fields, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Arm, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(TaskError, match=message):
        analyze(settings(tmp_path / "out", **fields), bar=False)
    assert not (tmp_path / "out").exists()


def test_folders_behind_runs_are_a_list():
    assert runs_as_list(["--keep", "8", "--runs", "a", "it's", "--output", "o", "--runs", "b"]) == [
        "--runs", "['a', 'it''s', 'b']", "--keep", "8", "--output", "o"
    ]  # fmt: skip
    assert runs_as_list(["--runs", "[a, b]"]) == ["--runs", "[a, b]"] and runs_as_list(["--keep", "8"]) == [
        "--keep",
        "8",
    ]


def test_wrong_settings_are_told(tmp_path, capsys):
    for arguments, message in (
        ([], "there is nothing to look at"),
        (["--tasks", "[tiny_world]", "--methods", "[divprune, divprune]"], "two methods are called divprune"),
        (["--tasks", "[tiny_world]", "--corruption.severities", "[6]"], "severities from 1 to 5"),
        (["--tasks", "[tiny_world]", "--analyses", "[complexty]"], "complexity"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(AnalyzeConfig, None, arguments)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match="holds no image; expected files that end in"):
        main(["analyze", "--images", str(empty), "--output", str(tmp_path / "out")])


# ---- finished evaluations ---------------------------------------------------------------------------------------


@pytest.fixture
def pope_items(tmp_path):
    FILES["pope"](tmp_path / "pope")
    return get_task("pope").open(tmp_path / "pope").items


def test_pope_rates_are_counted_by_hand_with_paired_differences(pope_items, tmp_path, capsys):
    """Twelve questions on four pictures, every other one with the answer yes."""
    labels = [item.answer for item in pope_items]
    always = ["Yes"] * 12
    flipped = ["No" if n == 0 else label.capitalize() for n, label in enumerate(labels)]
    half = ["Yes" if label == "yes" or n % 4 == 1 else "No" for n, label in enumerate(labels)]
    for name, pruning, said in (
        ("dense", ("identity", "100%"), [label.capitalize() for label in labels]),
        ("attention", ("fastervlm", 16), flipped),
        ("diversity", ("divprune", 16), always),
        ("mixed", ("adaptive", 16), half),
    ):
        write_arm(tmp_path / name, {"pope": (pope_items, said)}, pruning)
    runs = [str(tmp_path / name) for name in ("dense", "attention", "diversity", "mixed")]
    main(["analyze", "--runs", *runs, "--output", str(tmp_path / "out")])
    assert "index.md" in capsys.readouterr().out
    found = {
        (own["kind"], own["rate"]): float(own["value"]) for own in rows(tmp_path / "out" / "hallucination_pope.csv")
    }
    yes, no = labels.count("yes"), labels.count("no")
    assert (yes, no) == (6, 6)
    for kind, said in (("attention", flipped), ("diversity", always), ("other", half), ("dense", None)):
        told = labels if said is None else [text.lower() for text in said]
        wrong_yes = sum(a == "yes" and b == "no" for a, b in zip(told, labels, strict=True))
        assert found[kind, "yes_ratio"] == pytest.approx(100 * told.count("yes") / 12, rel=1e-4)
        assert found[kind, "false_positives"] == pytest.approx(100 * wrong_yes / no, rel=1e-4)
        right = sum(a == b for a, b in zip(told, labels, strict=True))
        assert found[kind, "accuracy"] == pytest.approx(100 * right / 12, rel=1e-4)
    differences = rows(tmp_path / "out" / "hallucination_pope_differences.csv")
    groups = {own["rate"]: own for own in differences if own["first"].startswith("diversity (mean)")}
    assert float(groups["false_positives"]["difference"]) == pytest.approx(100)
    assert float(groups["yes_ratio"]["difference"]) == pytest.approx(100 * 7 / 12, rel=1e-4)
    low, high = float(groups["yes_ratio"]["low"]), float(groups["yes_ratio"]["high"])
    # Pictures are drawn: a picture has yes three times, one of them missed, or no three times.
    assert 0 <= low < 100 * 7 / 12 < high <= 100
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [own["folder"] for own in record["runs"]] == runs and "frozen_hash" not in record
    assert "at 16: diversity-based less attention-based methods +100.0" in (tmp_path / "out" / "index.md").read_text()


def test_chair_is_the_benchmarks_own_and_kinds_can_be_told(tmp_path):
    FILES["chair"](tmp_path / "chair")
    items = get_task("chair").open(tmp_path / "chair").items
    calm, inventive = ["A man."] * 12, ["A man and a puppy at the bus."] * 12
    write_arm(tmp_path / "one", {"chair": (items, calm)}, ("fastervlm", 16))
    write_arm(tmp_path / "two", {"chair": (items, inventive)}, ("random", 16))
    fields = {"tasks": [], "runs": [str(tmp_path / "one"), str(tmp_path / "two")], "kinds": {"random": "diversity"}}
    analyze(settings(tmp_path / "out", **fields), bar=False)
    found = {
        (own["kind"], own["rate"]): float(own["value"]) for own in rows(tmp_path / "out" / "hallucination_chair.csv")
    }
    for kind, said in (("attention", calm), ("diversity", inventive)):
        task = get_task("chair")
        expected = task.scorer.summarise([task.score(text, item) for text, item in zip(said, items, strict=True)])
        for rate in ("C_S", "C_I", "recall"):
            assert found[kind, rate] == pytest.approx(expected[rate], rel=1e-4)
        assert found[kind, "length"] == pytest.approx(expected["length"], rel=1e-4)
    assert (tmp_path / "out" / "hallucination_chair.svg").is_file()


def test_runs_that_do_not_belong_together_are_refused(pope_items, tmp_path):
    said = ["Yes"] * 12
    write_arm(tmp_path / "one", {"pope": (pope_items, said)}, ("fastervlm", 16))
    write_arm(tmp_path / "two", {"pope": (pope_items, said)}, ("divprune", 16), model="other/model")
    with pytest.raises(TaskError, match="differ in frozen_hash"):
        analyze(settings(tmp_path / "out", tasks=[], runs=[str(tmp_path / "one"), str(tmp_path / "two")]), bar=False)
    shutil.copytree(tmp_path / "one", tmp_path / "edited")
    file = tmp_path / "edited" / "results.jsonl"
    file.write_text(file.read_text().replace('"Yes"', '"No"', 1))
    with pytest.raises(TaskError):
        analyze(settings(tmp_path / "out", tasks=[], runs=[str(tmp_path / "edited")]), bar=False)
    items = get_task("tiny_world").open(UNSET).items[:4]
    write_arm(tmp_path / "toy", {"tiny_world": (items, ["x"] * 4)}, ("divprune", 16))
    with pytest.raises(
        TaskError, match="the runs are on tiny_world, and invented objects are counted on chair and pope"
    ):
        analyze(settings(tmp_path / "out", tasks=[], runs=[str(tmp_path / "toy")]), bar=False)
