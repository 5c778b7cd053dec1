"""What makes the start of a recipe fast must not show: the same samples, and a hash of their content alone."""

import os
import random
import time

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, LargeList, Value, concatenate_datasets

from prunetune.data_recipes import DataError, load_recipe, presence, store
from prunetune.data_recipes.content import column, content_hash
from prunetune.data_recipes.formats import LlavaJsonRecipe
from prunetune.data_recipes.images import FolderImages
from prunetune.data_recipes.recipe import _held_out, _thinned
from prunetune.data_recipes.videos import FolderVisuals
from prunetune.train.checkpoints import Mark

TEXT = Value("string")
FEATURES = {"id": TEXT, "image": TEXT, "turns": [{"question": TEXT, "answer": TEXT}]}


def rows(records, features=None):
    return Dataset.from_list(records, features=Features(features or FEATURES))


def record(n, question="what?", answer="yes"):
    image = None if n % 3 == 0 else f"vg/{n}.jpg"
    turns = [{"question": f"{question} {n}", "answer": answer}] * (1 + n % 2)
    return {"id": str(n), "image": image, "turns": turns}


RECORDS = [record(n) for n in range(40)]

# ---- content hash -------------------------------------------------------------------------------------------------


def test_the_hash_does_not_depend_on_how_rows_are_stored(monkeypatch):
    whole = rows(RECORDS)
    expected = content_hash(whole)
    assert expected.startswith("columns-1:") and len(expected) == 74
    order = np.random.default_rng(0).permutation(40)
    large = Features({"id": Value("large_string"), "image": Value("large_string"),
                      "turns": LargeList({"question": TEXT, "answer": TEXT})})  # fmt: skip
    same = [
        concatenate_datasets([rows(RECORDS[:7]), rows(RECORDS[7:31]), rows(RECORDS[31:])]),
        rows([RECORDS[number] for number in order]).select(np.argsort(order)),
        rows(RECORDS + RECORDS).select(range(40, 80)),
        whole.select_columns(["turns", "image", "id"]),
        rows(RECORDS, large),
    ]
    assert [content_hash(other) for other in same] == [expected] * 5
    monkeypatch.setattr("prunetune.data_recipes.content.BATCH", 7)
    assert content_hash(whole) == expected


@pytest.mark.parametrize("change", [
    lambda r: r.reverse(),
    lambda r: r.pop(),
    lambda r: r.__setitem__(5, record(5, answer="yes.")),
    lambda r: r.__setitem__(5, {**r[5], "image": None}),
    lambda r: r.__setitem__(3, {**r[3], "image": ""}),  # there was none
    lambda r: r.__setitem__(5, {**r[5], "turns": r[5]["turns"][:1]}),
    lambda r: r.__setitem__(4, {**r[4], "turns": [{"question": "what? 4y", "answer": "es"}]}),  # a letter moved
    lambda r: r.__setitem__(4, {**r[4], "turns": [{"question": "what? 4", "answer": None}]}),
    lambda r: (r[5]["turns"].append(r[4]["turns"][0]), r[4].__setitem__("turns", [])),  # a turn moved
])  # fmt: skip
def test_every_change_of_content_is_another_hash(change):
    import copy

    records = copy.deepcopy(RECORDS)
    change(records)
    assert content_hash(rows(records)) != content_hash(rows(RECORDS))


def test_a_hash_sees_types_and_columns():
    kinds = (pa.int32(), pa.int64(), pa.float32())
    numbers = [Dataset.from_dict({"a": pa.array([1, 2, None], kind)}) for kind in kinds]
    other = Dataset.from_dict({"b": pa.array([1, 2, None], pa.int32())})
    zero = Dataset.from_dict({"a": pa.array([1, 2, 0], pa.int32())})
    assert len({content_hash(dataset) for dataset in (*numbers, other, zero)}) == 5


def test_a_run_of_an_older_version_says_that_its_data_was_hashed_otherwise():
    older = Mark(1, {"data": "0" * 64, "ranks": 1}, {}, {})
    newer = {"data": content_hash(rows(RECORDS)), "ranks": 2}
    assert older.changed_settings(newer) == ["data (an older version of prunetune read and hashed it)", "ranks"]
    assert Mark(1, newer | {"data": "columns-1:0"}, {}, {}).changed_settings(newer) == ["data"]


# ---- draws --------------------------------------------------------------------------------------------------------


def plain_thinned(recipe, sources, seed):
    kept = []
    for source in dict.fromkeys(sources):
        of_source = [index for index, name in enumerate(sources) if name == source]
        number = min(max(round(recipe.weights.get(source, 1.0) * len(of_source)), 1), recipe.caps.get(source, 10**9))
        if number < len(of_source):
            of_source = random.Random(f"{source} {seed}").sample(of_source, number)
        kept += of_source
    return sorted(kept)


def plain_held(recipe, images, order, seed):
    groups = {}
    for index in order:
        groups.setdefault(images[index] or f"text {index}", []).append(index)
    names = list(groups)
    random.Random(f"held out {seed}").shuffle(names)
    held = set()
    while names and len(held) < recipe.held_out:
        held.update(groups[names.pop()])
    return held


@pytest.mark.parametrize("seed", range(4))
def test_draws_are_those_of_plain_loops(seed):
    chance = random.Random(seed)
    sources = [chance.choice(["vg", "gqa", "text"]) for _ in range(300)]
    images = [None if source == "text" else f"{source}/{chance.randrange(60)}.jpg" for source in sources]
    recipe = LlavaJsonRecipe(name="a", format="llava_json", weights={"vg": 0.37}, caps={"gqa": 50}, held_out=23)
    order = _thinned(recipe, pa.chunked_array([sources[:70], sources[70:]]), seed)
    assert order.tolist() == plain_thinned(recipe, sources, seed)
    held = _held_out(recipe, pa.chunked_array([pa.array(images[:9]), pa.array(images[9:])]), order, seed)
    assert set(order[held].tolist()) == plain_held(recipe, images, order.tolist(), seed)


# ---- presence of images -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images at several depths, links, and what only looks like an image; old enough to be kept."""
    monkeypatch.setattr(store, "stored_file", lambda name: tmp_path / "cache" / name)
    root = tmp_path / "images"
    for path in ("top.jpg", "vg/1.jpg", "vg/2.jpg", "gqa/a/b/1.jpg", "elsewhere/real.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    (root / "vg/folder.jpg").mkdir()
    (root / "vg/link.jpg").symlink_to(root / "elsewhere/real.jpg")
    (root / "vg/dangling.jpg").symlink_to(root / "nothing.jpg")
    (root / "linked").symlink_to(root / "gqa")
    (root / "vg/to_folder.jpg").symlink_to(root / "elsewhere")
    settle(root)
    return root


def settle(root):
    hour = time.time() - 3600
    for path, _, _ in os.walk(root):
        os.utime(path, (hour, hour))


THERE = ["top.jpg", "vg/1.jpg", "vg/2.jpg", "gqa/a/b/1.jpg", "vg/link.jpg", "linked/a/b/1.jpg", "vg//1.jpg",
         "./top.jpg"]  # fmt: skip
NOT_THERE = ["vg/3.jpg", "vg/folder.jpg", "vg/dangling.jpg", "vg/to_folder.jpg", "no/1.jpg", "vg", "vg/", "top.jpg/x",
             "../images/top.jpg", "/etc/passwd", "vg/1.jpg/../2.jpg"]  # fmt: skip


def test_listings_say_what_asking_for_each_would(folder):
    images = FolderImages(folder)
    for _ in range(2):  # the second time from the kept result
        assert images.missing([*THERE, *NOT_THERE]) == set(NOT_THERE)
    assert [images.exists(path) for path in (*THERE, *NOT_THERE)] == [True] * len(THERE) + [False] * len(NOT_THERE)
    assert len(list((folder.parent / "cache").iterdir())) == 1


def test_a_kept_result_lists_nothing_until_a_folder_changes(folder, monkeypatch):
    images, listed = FolderImages(folder), []
    scandir = os.scandir
    monkeypatch.setattr(presence.os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    references = ["vg/1.jpg", "vg/link.jpg", "gqa/a/b/1.jpg", "no/1.jpg", "vg/3.jpg"]
    assert images.missing(references) == {"no/1.jpg", "vg/3.jpg"} and len(listed) == 2
    assert images.missing(references) == {"no/1.jpg", "vg/3.jpg"} and len(listed) == 2
    (folder / "elsewhere/real.jpg").unlink()  # what a link leads to
    assert images.missing(references) == {"no/1.jpg", "vg/3.jpg", "vg/link.jpg"} and len(listed) == 2
    (folder / "no").mkdir()
    (folder / "no/1.jpg").touch()
    assert images.missing(references) == {"vg/3.jpg", "vg/link.jpg"} and len(listed) == 5
    (folder / "gqa/a/b/1.jpg").unlink()
    assert images.missing(references) == {"vg/3.jpg", "vg/link.jpg", "gqa/a/b/1.jpg"}


def test_a_folder_that_was_just_written_is_listed_again(folder, monkeypatch):
    images = FolderImages(folder)
    (folder / "vg/3.jpg").touch()
    assert images.missing(["vg/3.jpg", "vg/4.jpg"]) == {"vg/4.jpg"}
    state = (folder / "vg").stat()
    (folder / "vg/4.jpg").touch()
    os.utime(folder / "vg", ns=(state.st_atime_ns, state.st_mtime_ns))  # within one tick of the clock
    assert images.missing(["vg/3.jpg", "vg/4.jpg"]) == set()


def test_a_broken_result_is_made_anew(folder):
    images = FolderImages(folder)
    for content in (b"", b"{}", b"[]", b'{"folders": {}, "missing": 3, "links": []}'):
        images.missing(["vg/1.jpg", "vg/3.jpg"])
        (file,) = (folder.parent / "cache").iterdir()
        file.write_bytes(content)
        assert images.missing(["vg/1.jpg", "vg/3.jpg"]) == {"vg/3.jpg"}


def test_a_name_that_no_file_can_have_is_an_error_as_before(folder):
    for path in ("vg/" + "x" * 300 + ".jpg", "x" * 300 + "/1.jpg"):
        with pytest.raises(DataError, match="can't be looked up: File name too long"):
            FolderImages(folder).missing([path])


def test_videos_may_be_files_or_folders_of_frames(folder):
    references = ["video:vg/1.jpg", "video:vg/folder.jpg", "video:vg/to_folder.jpg", "video:vg/no", "vg/folder.jpg"]
    assert FolderVisuals(folder).missing(references) == {"video:vg/no", "vg/folder.jpg"}


def test_quick_is_twenty_thousand_samples_of_gqa(tmp_path):
    import json

    records = []
    for n in range(50):
        source = "gqa/images" if n % 2 else "vg/VG_100K"
        (tmp_path / source).mkdir(parents=True, exist_ok=True)
        (tmp_path / source / f"{n}.jpg").touch()
        records.append({"id": str(n), "image": f"{source}/{n}.jpg", "conversations": [
            {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]})  # fmt: skip
    (tmp_path / "mix.json").write_text(json.dumps(records))
    data = load_recipe("quick", file=str(tmp_path / "mix.json"), image_root=str(tmp_path))
    assert data.counts == {"gqa": 25} and len(data) == 25
    few = load_recipe("quick", file=str(tmp_path / "mix.json"), image_root=str(tmp_path), max_samples=5)
    assert len(few) == 5 and column(few.rows, "source").to_pylist() == ["gqa"] * 5
