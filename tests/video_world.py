"""Drawn videos, and a processor of the tiny Qwen2.5-VL that needs no torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from qwen_world import tiny_qwen
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor

PATCH, MERGE, TIME = 4, 2, 2  # of the tiny model: pixels of a patch, patches of a token per side, frames of a token
SPECIAL = ["<pad>", "<s>", "</s>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
WORDS = ["USER", "ASSISTANT", ":", "what", "moves", "?", "a", "red", "square", "A", "B", "C", "D", "yes", "no", "left"]
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}USER : "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %} ASSISTANT :"
    "{% else %} {% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endgeneration %}{% endif %}{% endfor %}"
)


def draw(frames: int, size=(32, 24), seed=0) -> list[Image.Image]:
    """A square that moves over a ground of one colour, a step in every frame."""
    drawn = []
    for number in range(frames):
        image = Image.new("RGB", size, (40 + 20 * seed, 60, 90))
        at = (3 * number + seed) % (size[0] - 8)
        ImageDraw.Draw(image).rectangle((at, 4, at + 7, 11), fill=(220, 30, 30))
        drawn.append(image)
    return drawn


def write_folder(path: Path, frames: int, **options) -> Path:
    path.mkdir(parents=True)
    for number, image in enumerate(draw(frames, **options)):
        image.save(path / f"frame_{number}.png")
    return path


def write_gif(path: Path, frames: int, milliseconds=100, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = draw(frames, **options)
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return path


class VideoProcessor:
    """What a video processor returns for the tiny model, from frames of sizes that its tokens divide."""

    merge_size, temporal_patch_size = MERGE, TIME

    def __init__(self):
        self.seen = []

    def __call__(self, videos, video_metadata=None, do_sample_frames=None, return_metadata=False, **_):
        from transformers.video_utils import VideoMetadata, make_batched_videos

        assert do_sample_frames is False
        videos = make_batched_videos(videos)
        self.seen.append(video_metadata)
        patches, grids = [], []
        for video in videos:
            values = torch.from_numpy(np.asarray(video)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (F, 3, h, w)
            if len(values) % TIME:
                values = torch.cat([values, values[-1:]])
            frames, _, height, width = values.shape
            side = PATCH * MERGE
            assert height % side == width % side == 0, "the tiny processor does not resize"
            grid = (frames // TIME, height // PATCH, width // PATCH)
            parts = values.view(grid[0], TIME, 3, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
            parts = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # time, rows, columns, in a token, channel, frame, pixels
            patches.append(parts.reshape(-1, 3 * TIME * PATCH * PATCH))
            grids.append(grid)
        metadata = [VideoMetadata(**own) for own in video_metadata]
        return {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": metadata,
        }


class Processor(Qwen2_5_VLProcessor):
    """The stock processor with another video processor in it."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:7],
    )


def build_processor() -> Processor:
    images = Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TIME, min_pixels=64, max_pixels=4096
    )
    return Processor(images, build_tokenizer(), VideoProcessor(), chat_template=TEMPLATE)


def write_model(folder: Path) -> Path:
    """A stock checkpoint of the tiny model, without a processor's files: loading one needs torchvision."""
    tiny_qwen().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    return folder


CHOICES = ("A", "B", "C", "D")


def write_videos(folder, name):
    """A benchmark of four questions in its published layout, over two videos: an animation and a folder of frames."""
    kinds = {"mvbench": "video", "videomme": "data"}
    where = folder / kinds.get(name, "videos")
    write_gif(where / "v0.gif", 8, milliseconds=250)
    write_folder(where / "v1", 6, seed=1)
    if name == "mvbench":
        (folder / "json").mkdir()
        for task in ("moving_count", "action_antonym"):
            (folder / "json" / f"{task}.json").write_text(json.dumps([mvbench_row(n) for n in range(2)]))
    elif name == "videomme":
        videos = [
            {"video_id": "001", "duration": "short", "url": f"https://www.youtube.com/watch?v=v{n}",
             "questions": [{k: v for k, v in videomme_row(2 * n + q).items() if k not in ("duration", "videoID")}
                           for q in range(2)]}
            for n in range(2)
        ]  # fmt: skip
        videos[1]["duration"] = "long"
        (folder / "output_test_template.json").write_text(json.dumps(videos))
    else:
        questions = [{"video_name": f"v{n // 2}", "question_id": n, "question": "what moves ?"} for n in range(4)]
        answers = [{"question_id": n, "answer": "square", "type": 1} for n in range(4)]
        (folder / "test_q.json").write_text(json.dumps(questions))
        (folder / "test_a.json").write_text(json.dumps(answers))


def mvbench_row(n):
    row = {
        "video": ("v0.gif", "v1")[n],
        "question": "what moves ?",
        "candidates": ["square", "red", "left"],
        "answer": "red",
    }
    return row | ({"start": 0.5, "end": 1.5} if n == 0 else {})


def videomme_row(n):
    return {
        "question_id": f"00{n}",
        "task_type": "t",
        "question": "what moves ?",
        "answer": "B",
        "videoID": f"v{n // 2}",
        "options": [f"{letter}. square" for letter in CHOICES],
        "duration": ("short", "long")[n // 2],
    }
