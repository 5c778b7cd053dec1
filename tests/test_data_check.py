"""`prunetune data check` reads everything once and finds all that is wrong; `data prepare` says what is missing."""

import json

import pytest
from conftest import TINY_VLM, scene_sample
from PIL import Image

from prunetune.cli import main
from prunetune.data_recipes import DataError, Formatter
from prunetune.data_recipes.check import check_data
from prunetune.data_recipes.images import FolderImages
from prunetune.data_recipes.sample import Sample
from prunetune.models.loading import load_processor


def said(question, answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def broken(tmp_path):
    """Ten samples, most of them with something wrong."""
    image = "<image>\nwhat color is the red ring ?"
    records = [
        {"id": "good", "image": "vg/good.png", "conversations": said(image)},
        {"id": "twice", "image": "vg/good.png", "conversations": said(image)},
        {"id": "twice", "image": "vg/good.png", "conversations": said(image)},
        {"id": "gone", "image": "gqa/gone.png", "conversations": said(image)},
        {"id": "torn", "image": "gqa/torn.png", "conversations": said(image)},
        {"id": "none", "image": "vg/good.png", "conversations": said("no placeholder")},
        {"id": "two", "image": "vg/good.png", "conversations": said("<image> <image>")},
        {"id": "half", "conversations": [{"from": "human", "value": "hello"}]},
        {"id": "long", "image": "vg/good.png", "conversations": said("<image>\n" + "red ring " * 200)},
        {"id": "text", "conversations": said("what is red ?")},
        {"id": "other", "image": "coco/left_out.png", "conversations": said(image)},
    ]
    for name in ("vg", "gqa"):
        (tmp_path / "images" / name).mkdir(parents=True)
    Image.new("RGB", (84, 84)).save(tmp_path / "images" / "vg" / "good.png")
    (tmp_path / "images" / "gqa" / "torn.png").write_bytes(b"no picture")
    (tmp_path / "mix.json").write_text(json.dumps(records))
    (tmp_path / "recipe.yaml").write_text("name: broken\nformat: llava_json\nsources: [vg, gqa, text]\n")
    return tmp_path


def run(folder, capsys, *more):
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "--recipe", str(folder / "recipe.yaml"), "--file", str(folder / "mix.json"),
              "--image-root", str(folder / "images"), *more])  # fmt: skip
    return stop.value.code, capsys.readouterr().out


def test_everything_that_is_wrong_is_found(broken, capsys):
    report = check_data(
        str(broken / "recipe.yaml"), str(broken / "mix.json"), str(broken / "images"), load_processor(str(TINY_VLM)),
        max_length=300,
    )  # fmt: skip
    assert report.counts == {"vg": 4, "gqa": 2, "text": 1, "(unreadable)": 3} and report.text_only == 1
    found = {kind: [what.split(":")[0].split()[-1] for what in problems] for kind, problems in report.problems.items()}
    assert (
        found["missing image"] == ["gone"] and found["duplicate id"] == ["twice"] and found["over-length"] == ["long"]
    )
    assert [len(report.problems[kind]) for kind in ("corrupt image", "placeholder mismatch", "malformed")] == [1, 2, 1]
    assert "torn.png can't be decoded" in report.problems["corrupt image"][0]
    assert "record 5: 0 <image> placeholders, but 1 image" in report.problems["placeholder mismatch"][0]
    assert report.lengths[100] > 500 > 170 > report.lengths[50]

    code, printed = run(broken, capsys)
    assert code == 1 and "2 of 10 images can't be used, more than max_missing=1.00%" in printed
    assert "FAILED: 3 of 10 records are no conversation, more than max_broken=1.00%" in printed
    assert "not measured: give --model" in printed


def test_lengths_are_those_that_training_sees(broken):
    processor = load_processor(str(TINY_VLM))
    report = check_data(
        str(broken / "recipe.yaml"), str(broken / "mix.json"), str(broken / "images"), processor, max_length=9999
    )
    formatter = Formatter(processor, FolderImages(broken / "images"))
    sample = Sample("long", "vg", "vg/good.png", scene_sample(1, ("red ring " * 200).strip(), "red").turns)
    assert formatter.training_batch([sample])["input_ids"].shape[1] == report.lengths[100]


def test_data_within_the_thresholds_passes(broken, capsys):
    records = [r for r in json.loads((broken / "mix.json").read_text()) if r["id"] in ("good", "twice", "text", "gone")]
    (broken / "mix.json").write_text(json.dumps(records))
    assert run(broken, capsys, "--max-missing", "0.2")[0] == 0
    code, printed = run(broken, capsys, "--max-missing", "0.1", "--num-proc", "2")
    assert code == 1 and "missing image                 1\n    gone: gqa/gone.png" in printed


def test_the_file_may_stand_in_the_recipe_or_with_the_pictures(broken, capsys):
    records = [r for r in json.loads((broken / "mix.json").read_text()) if r["id"] == "good"]
    (broken / "own.json").write_text(json.dumps(records))
    (broken / "own.yaml").write_text("name: own\nformat: llava_json\nfile: own.json\n")
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "--recipe", str(broken / "own.yaml"), "--image-root", str(broken / "images")])
    assert stop.value.code == 0 and "recipe own: 1 samples" in capsys.readouterr().out
    (broken / "images" / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "--recipe", "vg", "--image-root", str(broken / "images")])
    assert stop.value.code == 0
    with pytest.raises(DataError, match="set data.file"):
        check_data("vg", None, str(broken))


def test_a_recipe_without_a_file_says_so():
    with pytest.raises(DataError, match="draws its samples"):
        check_data("tiny_world", None, None)


def test_prepare_names_every_download_and_what_is_there(tmp_path, capsys):
    folder = tmp_path / "images" / "vg" / "VG_100K"
    folder.mkdir(parents=True)
    (folder / "1.jpg").touch()
    line = ["data", "prepare", "--recipe", "vg_textvqa_gqa", "--image-root", str(tmp_path / "images"),
            "--file", str(tmp_path / "llava_v1_5_mix665k.json")]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(line)
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and printed.count("[missing]") == 4 and printed.count("[there]") == 1
    assert "VG_100K_2/images2.zip" in printed and "train_val_images.zip" in printed and "coco" not in printed
    for name in ("vg/VG_100K_2", "gqa/images", "textvqa/train_images"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").touch()
    (tmp_path / "llava_v1_5_mix665k.json").touch()
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 0 and "all there" in capsys.readouterr().out
