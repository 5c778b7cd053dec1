"""Pictures in two passes: the processor's own bytes, or the processor."""

import numpy as np
import pytest
import torch
from llama_tokenizers import clip_images, llava, tokenizer, trained
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, SiglipImageProcessorPil

from prunetune.data_recipes import Formatter, Sample, Turn
from prunetune.data_recipes.images import pad_to_square
from prunetune.data_recipes.pixels import Pictures, fast_pictures, look_up, mean_color

SIZES = [(500, 375), (375, 500), (336, 336), (1, 90), (90, 1), (1, 1), (57, 56), (56, 57), (113, 40), (640, 20)]


def noise(width, height):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Drawn:
    def open(self, name, sample):
        return noise(*map(int, name.split("x")))


@pytest.fixture(scope="module")
def words():
    return tokenizer(trained())


@pytest.mark.parametrize("side", [56, 336])
def test_every_size_gives_the_processors_own_numbers(words, side):
    processor = llava(words, side)
    fast = fast_pictures(processor)
    for size in SIZES:
        image = noise(*size)
        padded = pad_to_square(image, mean_color(processor))
        expected = processor(images=[padded], return_tensors="np")["pixel_values"][0]
        pixels = fast.pixels(image)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        assert np.array_equal(fast.floats(pixels), expected), size


def test_processors_that_do_something_else_stay_in_use(words):
    assert fast_pictures(llava(words, images=clip_images(56, crop_size={"height": 42, "width": 42}))) is None
    assert fast_pictures(llava(words, images=clip_images(56, do_normalize=False))) is None
    assert fast_pictures(llava(words, images=clip_images(56, size={"height": 56, "width": 42}))) is None
    siglip = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    assert fast_pictures(llava(words, images=siglip)) is not None

    class Sharpened(type(clip_images(56))):
        def resize(self, image, *arguments, **options):
            return super().resize(image, *arguments, **options).clip(1)  # one grey level at most

    sharpened = Sharpened(**{k: v for k, v in clip_images(56).to_dict().items() if k in ("size", "crop_size")})
    assert fast_pictures(llava(words, images=sharpened)) is None
    pictures = Pictures(llava(words, images=sharpened), "pad", by_segments=True)
    made, places = pictures.inputs([noise(80, 50)], raw=True)
    assert pictures.plain and made["pixel_values"].dtype == torch.float32 and places == [16]


def test_pictures_in_tiles_go_by_the_processor_and_text_by_segments(words):
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112], [112, 112]]
    )
    processor = LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    formatter = Formatter(processor, Drawn(), "vicuna_v1")
    batch = formatter.training_batch(SAMPLES)
    assert formatter.pictures.fast is None and formatter.pictures.plain and "image_sizes" in batch
    formatter.__dict__["segments"] = None  # the template and the processor alone
    formatter.__dict__["pictures"] = Pictures(processor, "processor", by_segments=False)
    other = formatter.training_batch(SAMPLES)
    assert set(batch) == set(other)
    for name, values in other.items():
        assert name == "sample_ids" or torch.equal(batch[name], values), name


SAMPLES = [
    Sample("wide", "vg", "90x50", (Turn("where is it?", "top left"),)),
    Sample("text", "text", None, (Turn("a dog?", "yes"),)),
    Sample("high", "vg", "41x77", (Turn("is it red?", "yes"), Turn("sure?", "yes"))),
]


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_onevision"])
def test_raw_pixels_are_finished_to_the_very_same_batch(words, template):
    processor = llava(words)
    if template == "llava_onevision":
        words_with_end = tokenizer(trained())
        words_with_end.add_special_tokens({"eos_token": "<|im_end|>"})
        processor = llava(words_with_end)
    plain = Formatter(processor, Drawn(), template, "pad")
    raw = Formatter(processor, Drawn(), template, "pad", raw_pixels=True)
    for made in ("training_batch", "prompt_batch"):
        expected, batch = getattr(plain, made)(SAMPLES), getattr(raw, made)(SAMPLES)
        assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].shape == (2, 3, 56, 56)
        finished = raw.finish(batch)
        assert set(finished) == set(expected) and batch["pixel_values"].dtype == torch.uint8
        for name, values in expected.items():
            assert name == "sample_ids" or torch.equal(finished[name], values), name
        assert plain.finish(expected) is expected
        text = getattr(raw, made)(SAMPLES[1:2])
        assert raw.finish(text) is text and "pixel_values" not in text


def test_pixels_stay_floats_where_the_fast_way_is_not_exact(words):
    batch = Formatter(llava(words), Drawn(), "vicuna_v1", "processor", raw_pixels=True).training_batch(SAMPLES)
    assert batch["pixel_values"].dtype == torch.float32


def test_the_table_is_looked_up_by_colour():
    table = torch.arange(768, dtype=torch.float32).view(3, 256)
    pixels = torch.tensor([0, 255, 7], dtype=torch.uint8).view(1, 3, 1, 1)
    assert look_up(table, pixels).flatten().tolist() == [0.0, 511.0, 519.0]
