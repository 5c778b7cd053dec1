"""The moving tiny world: its clips say what its answers say, and the video model starts as the tiny VLM."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_VLM
from transformers import LlavaForConditionalGeneration, LlavaNextVideoForConditionalGeneration

from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.tiny_world.moving import FRAMES, ask_clip, render_clip, sample_clip
from prunetune.tiny_world.moving.model import build_video_model, build_video_tokenizer
from prunetune.tiny_world.moving.training import TEST, TRAINING, VALIDATION, train_video_vlm
from prunetune.tiny_world.scene import CELL_PIXELS, PALETTE, PLACES

ASKED = {"way", "moves", "start", "end", "appears", "color"}


def ink(frame, color):
    """Where a frame shows a colour: rows and columns of its pixels."""
    apart = np.abs(frame.astype(int) - np.array(PALETTE[color])).max(axis=-1)
    return np.argwhere(apart <= 12)


def place(points):
    row, column = points.mean(axis=0) // CELL_PIXELS
    return PLACES[int(3 * row + column)]


@pytest.mark.parametrize("seed", range(30))
def test_pixels_say_what_the_answers_say(seed):
    frames, clip = render_clip(sample_clip(seed)), sample_clip(seed)
    answers = {question.kind: question.answer for question in ask_clip(clip)}
    assert set(answers) == ASKED and frames.shape == (FRAMES, 84, 84, 3)
    color = answers["moves"].split()[0]
    first, last = ink(frames[0], color), ink(frames[-1], color)
    assert (place(first), place(last)) == (answers["start"], answers["end"])
    down, right = last.mean(axis=0) - first.mean(axis=0)
    ways = {"north": -down, "south": down, "west": -right, "east": right}
    assert max(ways, key=ways.get) == answers["way"]
    new = answers["appears"].split()[0]
    assert not len(ink(frames[0], new)) and len(ink(frames[-1], new)) > 20


def test_clips_follow_from_their_seed_and_splits_do_not_meet():
    assert np.array_equal(render_clip(sample_clip(7)), render_clip(sample_clip(7)))
    assert not np.array_equal(render_clip(sample_clip(7)), render_clip(sample_clip(8)))
    ways = [sample_clip(seed).way for seed in range(400)]
    assert all(70 < ways.count(way) < 130 for way in set(ways)) and len(set(ways)) == 4
    assert TRAINING < VALIDATION < TEST and VALIDATION - TRAINING > 1_000_000


def test_the_video_model_starts_as_the_tiny_vlm():
    tokenizer = build_video_tokenizer()
    model, image_model = build_video_model(TINY_VLM, tokenizer), LlavaForConditionalGeneration.from_pretrained(TINY_VLM)
    own, known = model.state_dict(), image_model.float().state_dict()
    for name, tensor in known.items():
        assert torch.equal(own[name][: len(tensor)], tensor), name
    texts = ["describe the northwest .", "which way goes the ring ?"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert tokenizer.unk_token_id not in ids[0] + ids[1] and max(ids[0]) < len(known["lm_head.weight"]) < max(ids[1])


def test_a_few_steps_of_training_are_saved_and_can_be_pruned(tmp_path):
    train_video_vlm(TINY_VLM, tmp_path, clips=32, steps=30, validation=10)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[1]["step"] == 30 and rows[1]["loss"] < 1.5  # 3 at the beginning
    kept = {row["validation_keep"]: row["all"] for row in rows[2:]}
    assert set(kept) == {1.0, 0.5, 0.25}
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    pixels = torch.from_numpy(render_clip(sample_clip(TEST))).permute(0, 3, 1, 2)[None] / 127.5 - 1
    ids = torch.tensor([[1, *[model.config.video_token_id] * 36 * FRAMES, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    pruned = PrunedModel(model, PruningSpec("divprune", 16, scope="image")).prepare(inputs)
    assert pruned.kept == {"video": [16]} and sum(pruned.kept_per_frame[0]) == 16
