"""The LLaVA reader, the tiny world and the formatting, on small files in the real formats."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import scene_sample
from PIL import Image

from prunetune.data_recipes import DataError, Formatter, Sample, Turn, load_recipe
from prunetune.data_recipes.chat_templates import template_file
from prunetune.data_recipes.images import FolderImages, pad_to_square
from prunetune.data_recipes.llava_json import read_llava
from prunetune.tiny_world import SPLITS, ask, render, sample_scene, vocabulary
from prunetune.tiny_world.recipe import SceneImages
from prunetune.tiny_world.scene import PLACES, patch_cover

# Records as llava_v1_5_mix665k.json has them: string and integer ids, multi-turn, the prefixes, a text-only one.
RECORDS = [
    {"id": "VG_100K_2/3", "image": "vg/VG_100K_2/3.jpg", "conversations": [
        {"from": "human", "value": "<image>\nwhere is the circle ?"}, {"from": "gpt", "value": "northwest"},
        {"from": "human", "value": "what number is shown ?"}, {"from": "gpt", "value": "4 7"}]},
    {"id": "2354786", "image": "gqa/images/2354786.jpg", "conversations": [
        {"from": "human", "value": "is there a ring ?\n<image>"}, {"from": "gpt", "value": "yes"}]},
    {"id": "0011e7c3", "image": "textvqa/train_images/0011e7c3.jpg", "conversations": [
        {"from": "human", "value": "<image>\nwhat is the first digit ?"}, {"from": "gpt", "value": "7"}]},
    {"id": "33471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\nwhat color is the ring ?"}, {"from": "gpt", "value": "red"}]},
    {"id": 7, "model": "", "conversations": [
        {"from": "human", "value": "how many shapes are there ?"}, {"from": "gpt", "value": "three"}]},
    {"id": "VG_100K_2/3", "image": "vg/VG_100K_2/3.jpg", "conversations": [
        {"from": "human", "value": "<image>\ndescribe the west ."}, {"from": "gpt", "value": "large red circle"}]},
]  # fmt: skip


@pytest.fixture
def mix(tmp_path):
    """A LLaVA-format file and its pictures; the COCO one is missing, as in real life."""
    (tmp_path / "mix.json").write_text(json.dumps(RECORDS))
    for number, record in enumerate(RECORDS):
        if "image" in record and not record["image"].startswith("coco"):
            path = tmp_path / "images" / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 255, (60, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path


def load(mix, **options):
    options = {"file": str(mix / "mix.json"), "image_root": str(mix / "images")} | options
    return load_recipe("vg_textvqa_gqa", **options)


def test_the_papers_subset_is_filtered_by_image_prefix_and_keeps_file_order(mix):
    data = load(mix)
    assert data.counts == {"gqa": 1, "textvqa": 1, "vg": 2}
    assert [data[i].id for i in range(len(data))] == ["VG_100K_2/3", "2354786", "0011e7c3", "VG_100K_2/3#2"]
    assert data[0].turns == (Turn("where is the circle ?", "northwest"), Turn("what number is shown ?", "4 7"))
    assert data[1].turns == (Turn("is there a ring ?", "yes"),)


def test_the_content_hash_follows_the_content(mix):
    first = load(mix)
    assert first.content_hash == load(mix).content_hash
    RECORDS[2]["conversations"][1]["value"] = "8"
    try:
        (mix / "mix.json").write_text(json.dumps(RECORDS))
        assert load(mix).content_hash != first.content_hash
    finally:
        RECORDS[2]["conversations"][1]["value"] = "7"


def test_a_subset_is_seeded(mix):
    ids = [[s.id for s in (load(mix, max_samples=2, seed=seed)[i] for i in range(2))] for seed in range(8)]
    assert ids[0] == [load(mix, max_samples=2, seed=0)[i].id for i in range(2)]
    assert len({tuple(pair) for pair in ids}) > 1


def test_missing_pictures_are_counted_and_too_many_stop(mix):
    (mix / "images" / "gqa/images/2354786.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 4 samples miss their image file \(gqa/images/2354786.jpg.*max_missing=1"
    ):
        load(mix)
    data = load(mix, max_missing=0.3)
    assert len(data) == 3 and data.missing == ["gqa/images/2354786.jpg"]


def test_missing_file_and_image_root_say_what_to_set(mix):
    with pytest.raises(DataError, match=r"nothing.json does not exist; set data.file"):
        load(mix, file=str(mix / "nothing.json"))
    with pytest.raises(DataError, match="reads a data file; set data.file"):
        load(mix, file=None)
    with pytest.raises(DataError, match="set data.image_root"):
        load(mix, image_root=None)
    with pytest.raises(DataError, match="is not a folder"):
        load(mix, image_root=str(mix / "no"))
    with pytest.raises(DataError, match="unknown recipe 'vg_gqa'; there are custom, gqa, .*vg_textvqa_gqa, or"):
        load_recipe("vg_gqa")


def test_a_corrupt_picture_names_the_sample(mix):
    (mix / "images" / "gqa/images/2354786.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    data = load(mix)
    with pytest.raises(DataError, match=r"sample '2354786'.*2354786.jpg can't be decoded"):
        data.images.open(data[1].image, data[1].id)


@pytest.mark.parametrize(("record", "message"), [
    ({"id": "a", "image": "vg/1.jpg", "conversations": [{"from": "human", "value": "hi"},
                                                        {"from": "gpt", "value": "x"}]},
     "record 0: 0 <image> placeholders, but 1 image"),
    ({"id": "a", "image": "vg/1.jpg", "conversations": [{"from": "human", "value": "<image> hi"}]}, "got 1 messages"),
    ({"id": "a", "image": "vg/1.jpg", "conversations": [{"from": "gpt", "value": "I see"},
                                                        {"from": "human", "value": "<image>"}]},
     "got 2 messages"),
    ({"id": "a", "image": "vg/1.jpg", "conversations": [{"from": "human", "value": "<image> hi"},
                                                        {"from": "human", "value": ""}]},
     "expected 'human' and 'gpt'"),
    ({"id": "a", "image": "flickr/1.jpg", "conversations": []}, "starts with none of"),
    ({"id": "a", "image": "vg/1.jpg"}, "list `conversations`"),
    ({"id": "a", "image": "vg/1.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt"}]},
     "record 0: message 1 has no text `value`"),
])  # fmt: skip
def test_malformed_records_are_named(tmp_path, record, message):
    (tmp_path / "mix.json").write_text(json.dumps([record]))
    with pytest.raises(DataError, match=message):
        for found in read_llava(tmp_path / "mix.json", ["vg", "gqa"]):
            raise found
    (tmp_path / "mix.json").write_text("[{")
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_llava(tmp_path / "mix.json", ["vg"]))


@pytest.mark.parametrize("template", ["model", "vicuna_v1"])
def test_supervised_text_is_exactly_the_answers(mix, processor, template):
    data = load(mix)
    formatter = Formatter(processor, data.images, template, square="pad")
    samples = [data[i] for i in range(len(data))]
    batch = formatter.training_batch(samples)
    for row, sample in enumerate(samples):
        supervised = batch["labels"][row][batch["labels"][row] != -100]
        expected = " ".join(f"{turn.answer} </s>" for turn in sample.turns)
        assert processor.tokenizer.decode(supervised) == expected
        assert (batch["input_ids"][row] == 4).sum() == 144
        assert (batch["labels"][row][batch["input_ids"][row] == 4] == -100).all()
    assert batch["pixel_values"].shape == (4, 3, 84, 84)


def test_vicuna_v1_renders_as_llava_does(processor):
    template = template_file("vicuna_v1").read_text()
    text = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    rendered = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert rendered == f"<s>{system}USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"


def test_prompts_end_where_the_answer_begins_and_leak_nothing(processor):
    formatter = Formatter(processor, SceneImages())
    sample = scene_sample(10_000_001)
    prompt = formatter.prompt_batch([Sample("a", "vg", sample.image, (Turn(sample.turns[0].question, None),))])
    training = formatter.training_batch([sample])
    length = prompt["input_ids"].shape[1]
    assert torch.equal(prompt["input_ids"], training["input_ids"][:, :length])
    assert (training["labels"][:, :length] == -100).all() and (training["labels"][:, length:] != -100).all()


def test_prompts_are_padded_left_and_training_rows_right(processor, samples):
    formatter = Formatter(processor, SceneImages())
    assert (formatter.prompt_batch(samples)["attention_mask"][:, -1] == 1).all()
    batch = formatter.training_batch(samples)
    assert (batch["attention_mask"][:, 0] == 1).all() and (batch["attention_mask"] == 0).any()


def test_truncation_never_cuts_a_picture_and_may_leave_nothing_supervised(processor):
    sample = scene_sample(10_000_001, question="what number is shown ? " * 10, answer="4 7")
    whole = Formatter(processor, SceneImages()).training_batch([sample])["input_ids"].shape[1]
    with pytest.raises(DataError, match="would cut its picture apart"):
        Formatter(processor, SceneImages(), max_length=100).training_batch([sample])
    batch = Formatter(processor, SceneImages(), max_length=whole - 1).training_batch([sample])
    assert batch["labels"][batch["labels"] != -100].shape == (2,)
    batch = Formatter(processor, SceneImages(), max_length=whole - 10).training_batch([sample])
    assert (batch["labels"] == -100).all()


_WRONG_PART = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: <image> {{ m['content'][1]['text'] }}"
    "{% else %}{% generation %} ASSISTANT: {{ m['content'][0]['text'] }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "no {% generation %} marks"),
    (lambda t: t.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"), "end token"),
    (lambda t: _WRONG_PART, "is not its answers"),
])  # fmt: skip
def test_a_template_that_supervises_the_wrong_text_is_refused(processor, change, message):
    wrong = copy.copy(processor)
    wrong.chat_template = change(processor.chat_template)
    with pytest.raises(DataError, match=message):
        Formatter(wrong, SceneImages()).training_batch([scene_sample(10_000_001)])


def test_a_marked_template_is_needed_for_training_only(processor):
    plain = copy.copy(processor)
    plain.chat_template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    prompt = Sample("a", "vg", "scene:10000001", (Turn("what number is shown ?", None),))
    ids = Formatter(plain, SceneImages()).prompt_batch([prompt])["input_ids"]
    assert torch.equal(ids, Formatter(processor, SceneImages()).prompt_batch([prompt])["input_ids"])


def test_pad_to_square_centres_the_picture():
    square = pad_to_square(Image.new("RGB", (4, 2), (9, 9, 9)), (1, 2, 3))
    assert square.size == (4, 4)
    assert np.asarray(square)[:, 0].tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 9], [1, 2, 3]]


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(DataError, match="sample 'x'.*a.png is missing"):
        FolderImages(tmp_path).open("a.png", "x")


# ---- the tiny world --------------------------------------------------------------------------------------------


def test_scenes_are_the_same_everywhere_and_splits_are_disjoint():
    assert sample_scene(5) == sample_scene(5) and sample_scene(5) != sample_scene(6)
    assert render(sample_scene(30_000_000)).sum() == render(sample_scene(30_000_000)).sum()
    ranges = sorted((r.start, r.stop) for r in SPLITS.values())
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))


def test_every_answer_is_true_of_its_scene_and_in_the_vocabulary():
    words = set(vocabulary())
    for seed in range(200):
        scene = sample_scene(seed)
        questions = ask(scene)
        assert len(questions) == 8
        for q in questions:
            assert set(q.text.split()) <= words and set(q.answer.split()) <= words
            named = [s for s in scene.shapes if s.shape in q.text.split() or f"{s.color} object" in q.text]
            if q.kind in ("color", "shape", "size", "where"):
                (shape,) = named  # the name belongs to one object alone
                truth = {"color": shape.color, "shape": shape.shape, "size": shape.size, "where": PLACES[shape.cell]}
                assert q.answer == truth[q.kind]
            elif q.kind == "exist":
                assert q.answer == ("yes" if named else "no")
            elif q.kind == "describe":
                (shape,) = [s for s in scene.shapes if PLACES[s.cell] == q.text.split()[2]]
                assert q.answer == f"{shape.size} {shape.color} {shape.shape}"
            elif q.kind == "count":
                assert q.answer == ("three", "four", "five")[len(scene.shapes) - 3]
            else:
                tens, ones = scene.number.digits
                truth = {"number": f"{tens} {ones}", "first": f"{tens}", "last": f"{ones}", "ink": scene.number.color}
                assert q.answer == truth[q.kind]


def test_colour_names_do_not_fit_the_number():
    """ "The red object" would be ambiguous beside a red number."""
    for seed in range(300):
        scene = sample_scene(seed)
        for q in ask(scene):
            if scene.number is not None and q.kind in ("shape", "where", "size"):
                assert f"{scene.number.color} object" not in q.text


def test_a_blind_guess_stays_below_a_quarter():
    """Majority answer per question text, learned on 2,000 scenes, scored on 500 others."""
    from collections import Counter, defaultdict

    votes = defaultdict(Counter)
    for seed in range(2000):
        for q in ask(sample_scene(seed)):
            votes[q.text][q.answer] += 1
    asked = [q for seed in range(2000, 2500) for q in ask(sample_scene(seed))]
    right = sum(bool(votes[q.text]) and votes[q.text].most_common(1)[0][0] == q.answer for q in asked)
    assert 0.10 < right / len(asked) <= 0.25


def test_patch_cover_says_where_things_are():
    scene = sample_scene(3)
    cover = patch_cover(scene).reshape(-1, 12, 12)
    for shape, grid in zip(scene.shapes, cover, strict=False):
        row, column = divmod(shape.cell, 3)
        inside = grid[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum()
        assert inside == pytest.approx(grid.sum()) and inside > 0


@pytest.fixture(scope="module")
def llama_like_processor(processor):
    """A processor whose tokenizer works as Llama's: byte-fallback BPE, a space in front, BOS by itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # a space only begins a token
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    corpus = ["A chat between USER: and ASSISTANT: the red circle is top left.", "Yes, 42 of them; déjà vu?"] * 3
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=specials[:5]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>", additional_special_tokens=["<image>"])  # fmt: skip
    return LlavaProcessor(processor.image_processor, fast, patch_size=7, vision_feature_select_strategy="default",
                          image_token="<image>", num_additional_image_tokens=1)  # fmt: skip


def test_masks_are_right_with_a_tokenizer_like_llamas(llama_like_processor):
    """Words of several tokens, punctuation glued to answers, two turns: the supervised text is the answers and ends."""
    answers = ["Yes, the red circle.", "42"]
    turns = (Turn("is it top left?", answers[0]), Turn("how many of them?", answers[1]))
    samples = [Sample("a", "vg", "scene:10000001", turns), Sample("t", "text", None, turns[1:])]
    tokenizer = llama_like_processor.tokenizer
    batch = Formatter(llama_like_processor, SceneImages(), "vicuna_v1").training_batch(samples)
    for row, expected in enumerate((answers, answers[1:])):
        labels = batch["labels"][row]
        supervised = labels[labels != -100]
        ends = (supervised == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        spans = [supervised[a:b] for a, b in zip([0, *[e + 1 for e in ends]], ends, strict=False)]
        assert [tokenizer.decode(span).strip() for span in spans] == expected
        assert all(tokenizer.convert_ids_to_tokens(int(span[0])).startswith("▁") for span in spans)  # the space, too
        assert ends[-1] == len(supervised) - 1
        assert (batch["input_ids"][row] == tokenizer.bos_token_id).sum() == 1


# ---- recipes: files, weights, caps, slices -----------------------------------------------------------------------


def many(tmp_path, suffix=".json"):
    """120 conversations of three sources and text, in one of the file kinds."""
    records = []
    for n in range(120):
        source = ("vg/VG_100K", "gqa/images", "textvqa/train_images", None)[n % 4]
        record = {"id": f"{n}", "conversations": [{"from": "human", "value": f"question {n} ?"},
                                                   {"from": "gpt", "value": f"answer {n}"}]}  # fmt: skip
        if source:
            record["image"] = f"{source}/{n}.jpg"
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]
            path = tmp_path / "images" / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        records.append(record)
    file = tmp_path / f"many{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(records))
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        from datasets import Dataset

        Dataset.from_list(records).to_parquet(file)
    return {"file": str(file), "image_root": str(tmp_path / "images")}


def recipe(tmp_path, **fields):
    path = tmp_path / f"recipe{len(list(tmp_path.glob('recipe*')))}.yaml"
    path.write_text(json.dumps({"name": "mine", "format": "llava_json", **fields}))
    return str(path)


def test_json_jsonl_and_parquet_hold_the_same_samples(tmp_path):
    loaded = [load_recipe("custom", **many(tmp_path, suffix)) for suffix in (".json", ".jsonl", ".parquet")]
    assert {data.content_hash for data in loaded} == {loaded[0].content_hash} and len(loaded[0]) == 120
    assert loaded[0].counts == {"gqa": 30, "text": 30, "textvqa": 30, "vg": 30}
    assert [loaded[0][n].id for n in range(120)] == [str(n) for n in range(120)]


def test_pictures_may_lie_in_the_file_itself(tmp_path):
    from datasets import Dataset
    from datasets import Image as ImageColumn

    pictures = [Image.new("RGB", (8, 6), (10 * n, 0, 0)) for n in range(3)]
    rows = Dataset.from_list([
        {"id": str(n), "image": picture, "conversations": [{"from": "human", "value": "<image>\nq ?"},
                                                            {"from": "gpt", "value": "a"}]}
        for n, picture in enumerate(pictures)
    ]).cast_column("image", ImageColumn())  # fmt: skip
    rows.to_parquet(tmp_path / "own.parquet")
    rows.save_to_disk(tmp_path / "saved")
    saved = load_recipe("custom", file=str(tmp_path / "saved"))
    assert saved.images.open("row:1", "1").getpixel((0, 0)) == (10, 0, 0)
    data = load_recipe("custom", file=str(tmp_path / "own.parquet"))
    assert saved.content_hash == data.content_hash
    assert [data[n].image for n in range(3)] == ["row:0", "row:1", "row:2"]
    assert data.images.open("row:2", "2").getpixel((0, 0)) == (20, 0, 0)
    with pytest.raises(DataError, match="row:9"):
        data.images.open("row:9", "9")


def test_weights_caps_and_slices_are_seeded_and_disjoint(tmp_path):
    files = many(tmp_path)
    plain = load_recipe(recipe(tmp_path, weights={"vg": 0.5}, caps={"gqa": 7}, held_out=10), **files)
    assert (
        plain.counts["text"] + plain.counts["textvqa"] + sum(plain.counts[s] for s in ("vg", "gqa")) == 15 + 7 + 60 - 10
    )
    assert len(plain.held_out) == 10 and plain.counts["vg"] <= 15 and plain.counts["gqa"] <= 7
    ids = [plain[n].id for n in range(len(plain))]
    assert ids == sorted(ids, key=int) and not set(ids) & set(plain.held_out["id"])
    again = load_recipe(recipe(tmp_path, weights={"vg": 0.5}, caps={"gqa": 7}, held_out=10), **files)
    other = load_recipe(recipe(tmp_path, weights={"vg": 0.5}, caps={"gqa": 7}, held_out=10, seed=1), **files)
    assert again.content_hash == plain.content_hash != other.content_hash
    few = load_recipe(recipe(tmp_path, held_out=10, max_samples=20), **files)
    assert len(few) == 20 and not set(few.rows["id"]) & set(few.held_out["id"])


def test_recipes_that_ask_for_what_is_not_there_say_so(tmp_path):
    files = many(tmp_path)
    with pytest.raises(DataError, match=r"weighs or caps \['coco'\], which the data does not have"):
        load_recipe(recipe(tmp_path, caps={"coco": 3}), **files)
    for wrong in ({"weights": {"vg": 2}}, {"weights": {"vg": 0}}, {"caps": {"vg": -1}}, {"caps": {"vg": 0}}):
        with pytest.raises(DataError, match="recipe .*vg: Input should be"):
            load_recipe(recipe(tmp_path, **wrong), **files)
    with pytest.raises(DataError, match="holds out 120 of only 120"):
        load_recipe(recipe(tmp_path, held_out=120), **files)
    with pytest.raises(DataError, match=r"expected .json, .jsonl or .parquet, got '.csv'"):
        (tmp_path / "x.csv").touch()
        load_recipe("custom", file=str(tmp_path / "x.csv"), image_root=str(tmp_path))


def test_an_edited_file_is_read_again(tmp_path):
    files = many(tmp_path)
    before = load_recipe("custom", **files)
    records = json.loads((tmp_path / "many.json").read_text())
    records[0]["conversations"][1]["value"] = "another"
    (tmp_path / "many.json").write_text(json.dumps(records))
    assert load_recipe("custom", **files).content_hash != before.content_hash


def test_pictures_are_held_out_whole(tmp_path):
    """Several conversations about one picture go to the same side."""
    files = many(tmp_path)
    records = json.loads((tmp_path / "many.json").read_text())
    (tmp_path / "many.json").write_text(json.dumps([{**r, "id": f"{r['id']}{c}"} for r in records for c in "abc"]))
    data = load_recipe(recipe(tmp_path, held_out=30, sources=["vg", "gqa"]), **files)
    assert len(data.held_out) == 30 and not set(data.rows["image"]) & set(data.held_out["image"])


def test_what_is_asked_for_comes_before_the_recipe(tmp_path):
    files = many(tmp_path)
    (tmp_path / "images" / "vg" / "VG_100K" / "0.jpg").unlink()
    strict = recipe(tmp_path, max_missing=0.0, seed=3, max_samples=20)
    with pytest.raises(DataError, match="max_missing=0.00%"):
        load_recipe(strict, **files)
    loose = load_recipe(strict, **files, max_missing=0.5)
    assert load_recipe(strict, **files, max_missing=0.5, seed=0).content_hash != loose.content_hash
