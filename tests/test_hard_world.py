"""The harder tiny world: its answers are true, its splits apart, and the bundled hard VLM sees it."""

import dataclasses
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

from prunetune.configs import EvaluateConfig, ModelConfig
from prunetune.data_recipes.recipe import read_recipe
from prunetune.evaluation.records import read_results
from prunetune.evaluation.run.evaluate import evaluate
from prunetune.pruning import PruningSpec
from prunetune.tiny_world import SPLITS, split_seeds
from prunetune.tiny_world.hard import ask_hard, drill_hard, render_hard, sample_hard_scene
from prunetune.tiny_world.hard.questions import KINDS
from prunetune.tiny_world.hard.scene import patches_of
from prunetune.tiny_world.hard.task import read_hard_items
from prunetune.tiny_world.hard.training import run
from prunetune.tiny_world.hard.training.batches import HardWords, hard_batch, question_tensors
from prunetune.tiny_world.hard.training.llama import read_questions
from prunetune.tiny_world.hard.training.losses import answer_loss, tower_features
from prunetune.tiny_world.hard.training.model import hard_clip, hard_llava, hard_tokenizer
from prunetune.tiny_world.hard.training.stages import STAGES
from prunetune.tiny_world.training import losses

HARD_VLM = ROOT / "assets" / "hard_vlm"
DENSE = 94.5
"""Accuracy that the card states, in percent."""
SCENES = [sample_hard_scene(seed) for seed in range(150)]
ROWS, COLUMNS = ["top", "upper", "lower", "bottom"], ["west", "midwest", "mideast", "east"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def table(scene):
    """The scene as rows of words, which every answer is worked out from here."""
    rows = []
    for shape in scene.shapes:
        x, y = int(shape.center[1] // 24), int(shape.center[0] // 24)
        rows.append({"size": shape.size, "color": shape.color, "shape": shape.shape, "x": x, "y": y})
    return rows


def matching(rows, name):
    """Rows that fit every word of a name, "object" aside."""
    words = [word for word in name.split() if word != "object"]
    return [row for row in rows if all(word in (row["size"], row["color"], row["shape"]) for word in words)]


def place(row):
    return f"{ROWS[row['y']]} {COLUMNS[row['x']]}"


def only(rows):
    assert len(rows) == 1, rows
    return rows[0]


def answered(scene, text):
    """Answer a question by its words and the scene's table alone."""
    rows = table(scene)
    if found := re.fullmatch(r"describe the (\w+ \w+) \.", text):
        row = only([row for row in rows if place(row) == found[1]])
        return f"{row['size']} {row['color']} {row['shape']}"
    if text == "what color is the number ?":
        return scene.number.color
    if found := re.fullmatch(r"what (color|shape) is the (.+) \?", text):
        return only(matching(rows, found[2]))[found[1]]
    if found := re.fullmatch(r"where is the (.+) \?", text):
        return place(only(matching(rows, found[1])))
    if found := re.fullmatch(r"is the (.+) large or small \?", text):
        return only(matching(rows, found[1]))["size"]
    if found := re.fullmatch(r"is there a (.+) \?", text):
        return "yes" if matching(rows, found[1]) else "no"
    if text == "how many objects are there ?":
        return NUMBERS[len(rows)]
    if found := re.fullmatch(r"how many objects (?:are|have the shape) (\w+) \?", text):
        return NUMBERS[len(matching(rows, found[1]))]
    if found := re.fullmatch(r"is the (.+) (left of|above) the (.+) \?", text):
        axis = "x" if found[2] == "left of" else "y"
        return "yes" if only(matching(rows, found[1]))[axis] < only(matching(rows, found[3]))[axis] else "no"
    if found := re.fullmatch(r"what is (left of|right of|above|below) the (\w+ \w+) \?", text):
        dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[found[1]]
        named = only(matching(rows, found[2]))
        beside = only([row for row in rows if (row["x"], row["y"]) == (named["x"] + dx, named["y"] + dy)])
        return f"{beside['color']} {beside['shape']}"
    first, last = scene.number.digits
    return {
        "what number is shown ?": f"{first} {last}",
        "what is the first digit ?": f"{first}",
        "what is the last digit ?": f"{last}",
    }[text]


def test_every_answer_is_true_of_the_scene():
    kinds = set()
    for scene in SCENES:
        rng = np.random.default_rng(scene.seed)
        for question in [*ask_hard(scene), *drill_hard(scene, 20, {}, rng)]:
            kinds.add(question.kind)
            assert answered(scene, question.text) == question.answer, (scene, question)
            assert len(question.read) == len(question.answer.split())
    assert kinds == set(KINDS)


def test_a_name_has_no_word_too_many():
    """What takes two or three words to name cannot be named by fewer."""
    seen = 0
    for scene in SCENES:
        for question in drill_hard(scene, 20, {}, np.random.default_rng(scene.seed)):
            if question.kind in ("size2", "where2", "color2", "shape2", "where3"):
                name = re.search(r"the (.+?)(?: large or small)? \?", question.text)[1].split()
                words = [word for word in name if word != "object"]
                assert len(words) == int(question.kind[-1])
                for left_out in words:
                    rest = " ".join(word for word in words if word != left_out)
                    assert len(matching(table(scene), rest)) > 1
                seen += 1
    assert seen > 200


def test_scenes_are_what_was_promised():
    for scene in SCENES:
        assert 6 <= len(scene.shapes) <= 9
        assert len({(s.size, s.color, s.shape) for s in scene.shapes}) == len(scene.shapes)
        assert len({s.color for s in scene.shapes}) <= 5 and len({s.shape for s in scene.shapes}) <= 4
        cells = [s.cell for s in scene.shapes] + ([scene.number.cell] if scene.number else [])
        assert len(set(cells)) == len(cells)
        assert scene.number is None or scene.number.color not in {s.color for s in scene.shapes}
        picture = render_hard(scene)
        assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, render_hard(sample_hard_scene(scene.seed)))
        patches = patches_of(scene)
        assert patches.owned.any(1).all() and patches.owned.sum(0).max() == 1
        assert patches.owned[np.arange(len(scene.shapes)), patches.anchors].all()


def test_splits_are_apart():
    ranges = list(SPLITS.values())
    for number, one in enumerate(ranges):
        for other in ranges[number + 1 :]:
            assert one.stop <= other.start or other.stop <= one.start
    test = {item.image for item in read_hard_items("test", 20)}
    assert not test & {item.image for item in read_hard_items("validation", 20)}
    for stage, following in zip(STAGES, [*STAGES[1:], None], strict=True):
        end = stage.seeds_from + stage.batch * stage.steps
        assert end <= (following.seeds_from if following else len(SPLITS["pretrain"])), stage.name


def test_no_answer_is_the_better_guess():
    """Yes or no, large or small are even; the most frequent answer to every question text is right on one in six."""
    votes, by_kind, items = defaultdict(Counter), defaultdict(Counter), []
    for seed in split_seeds("pretrain", 600):
        for question in ask_hard(sample_hard_scene(seed)):
            votes[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1
    for seed in split_seeds("validation", 100):
        items += ask_hard(sample_hard_scene(seed))
    for kind in ("exist2", "rel", "size2"):
        one, other = by_kind[kind].values()
        assert 0.42 < one / (one + other) < 0.58, kind
    right = sum(bool(votes[i.text]) and votes[i.text].most_common(1)[0][0] == i.answer for i in items)
    assert 0.1 < right / len(items) < 0.25


def test_the_recipe_has_ten_questions_a_scene():
    recipe = read_recipe("hard_world")
    assert (recipe.name, recipe.split, recipe.scenes) == ("hard_world", "recalibration", 2400)
    few = recipe.model_copy(update={"scenes": 2})
    rows, images = few.open_rows(None, None)
    assert len(rows) == 20 and images.open("hard_scene:20000000", "x").size == (96, 96)


def test_questions_beside_one_another_are_what_the_stock_model_reads_alone():
    """The training's own arithmetic is the stock Llama's."""
    torch.manual_seed(0)
    llama = hard_llava(96).model.language_model.eval()
    prefix, questions = torch.randn(2, 9, 128), torch.randn(2, 3, 5, 128)
    with torch.no_grad():
        states, seen = read_questions(llama, prefix, questions, (2,))
        for row in range(2):
            for question in range(3):
                alone = torch.cat([prefix[row], questions[row, question]])[None]
                expected = llama(inputs_embeds=alone).last_hidden_state[0, 9:]
                torch.testing.assert_close(states[row, question], expected, atol=2e-5, rtol=2e-5)
    assert seen[2].shape == (2, 4, 3, 5, 9)
    pixels = torch.randn(2, 3, 96, 96)
    tower = hard_clip(96).vision_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(tower_features(tower, pixels), losses.tower_features(tower, pixels))


def test_reading_is_supervised_where_the_answer_stands():
    """The places told to a question's readers are those of the objects that it is about."""
    words = HardWords(hard_tokenizer().get_vocab())
    batch = hard_batch(range(3), words, pixels=False)
    posed = [drill_hard(scene, 8, {}, np.random.default_rng(1)) for scene in batch.scenes]
    asked = question_tensors(batch, posed, words)
    for (scene, number, position), sets in zip(asked.places.tolist(), asked.sets.unbind(1), strict=True):
        question = posed[scene][number]
        assert asked.labels[scene, number, position + 1] in words.encode(question.answer)
        things = set(question.named) | {thing for word in question.read for thing in word}
        owned = batch.patches[scene].owned[sorted(things)].any(0) if things else np.zeros(144, dtype=bool)
        assert not (sets[:, 1:].numpy().any(0) & ~owned).any(), question
        assert sets[:2].sum() > 0
    # Tokens that were dropped leave their readers alone, and the loss stays finite.
    llava = hard_llava(len(words.ids))
    kept = torch.arange(0, 144, 7).expand(3, -1)
    *_, reading, mass = answer_loss(llava, torch.randn(3, 144, 128), kept, words.prefix, asked)
    assert torch.isfinite(reading) and 0 <= mass <= 1


def test_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    def weights(folder):
        return (folder / "model" / "model.safetensors").read_bytes()

    short = ("tower", "words", "keep_rate")
    few = [
        dataclasses.replace(stage, batch=2, questions=2) for stage in STAGES if stage.name in short
    ]  # one of each sort
    monkeypatch.setattr(run, "STAGES", few)

    run.train_hard_vlm(tmp_path / "a" / "model", tmp_path / "a", scale=0.001)
    run.train_hard_vlm(tmp_path / "b" / "model", tmp_path / "b", scale=0.001, only=["words"])
    for _ in range(3):
        run.train_hard_vlm(tmp_path / "b" / "model", tmp_path / "b", scale=0.001, stop_after=3)
    run.train_hard_vlm(tmp_path / "b" / "model", tmp_path / "b", scale=0.001)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    (tmp_path / "b" / "keep_rate.pt").unlink()
    with pytest.raises(ValueError, match="was written with seed=0, this run has 1"):
        run.train_hard_vlm(tmp_path / "b" / "model", tmp_path / "b", seed=1, scale=0.001)
    with pytest.raises(ValueError, match="unknown stage 'polish'; there are tower, words"):
        run.train_hard_vlm(tmp_path / "b" / "model", tmp_path / "b", only=["polish"])


def test_it_is_a_stock_checkpoint_of_at_most_6_mb():
    files = list(HARD_VLM.rglob("*.safetensors"))
    assert len(files) == 2 and sum(f.stat().st_size for f in files) <= 6_000_000
    assert (HARD_VLM / "model.safetensors").stat().st_size < 4_000_000
    model = AutoModelForImageTextToText.from_pretrained(HARD_VLM)
    assert model.config.model_type == "llava" and model.dtype == torch.float16
    clip = CLIPModel.from_pretrained(HARD_VLM / "clip")
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, clip.vision_model.state_dict()[name].to(tensor.dtype)), name
    assert AutoProcessor.from_pretrained(HARD_VLM).tokenizer.get_vocab() == hard_tokenizer().get_vocab()


@pytest.mark.parametrize(("spec", "low", "high"), [
    (PruningSpec(), DENSE - 5, 98),
    (PruningSpec("random", 16), 40, 70),
])  # fmt: skip
def test_it_sees_and_pruning_hurts(tmp_path, spec, low, high):
    """200 questions of untouched scenes, answered by the stock model's own greedy generation."""
    config = EvaluateConfig(
        model=ModelConfig(path=str(HARD_VLM), dtype="float32"),
        pruning=spec,
        tasks=["hard_world"],
        limit=200,
        batch_size=100,
        max_new_tokens=6,
        output=str(tmp_path / "arm"),
    )
    rows = read_results(evaluate(config))
    assert low <= 100 * np.mean([row.score for row in rows]) <= high


def test_the_card_says_what_the_log_says():
    card = (HARD_VLM / "README.md").read_text()
    log = [json.loads(line) for line in (HARD_VLM / "training_log.jsonl").read_text().splitlines()]
    for stage in STAGES:
        assert f"| {stage.name} | {stage.steps} |" in card
        steps = [row["step"] for row in log if row["stage"] == stage.name and "step" in row]
        assert {*range(20, stage.steps, 20), stage.steps} <= set(steps), stage.name
    for stage in ("words", "places", "connect", "keep_rate"):
        judged = [row for row in log if row["stage"] == stage and "validation_keep" in row]
        for row in judged:
            assert f"{row['all']}" in card, row
    assert f"Dense **{DENSE}**" in card
    for word in ("keep-rate augmentation", "scripts/train_hard_vlm.py", "seed 0", "blind", "supervised reading"):
        assert word in card.lower(), word
