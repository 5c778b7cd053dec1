"""Tiny models that cut pictures into tiles, as folders with the stock processors that go with them."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from family_world import lively
from idefics_world import tiny_idefics
from PIL import Image
from test_processors import TEMPLATE, idefics3, tokenizer

from prunetune.tiny_world.training.model import CHAT_TEMPLATE, IMAGE, build_llava, build_tokenizer, vision_config

PINPOINTS = [[84, 168], [168, 84], [168, 168]]


def llava_next():
    """A base view of 84 x 84 pixels in 12 x 12 patches, and tiles of as many."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    words = build_tokenizer()
    text = build_llava(len(words)).config.text_config
    config = transformers.LlavaNextConfig(
        vision_config=vision_config(), text_config=text, image_grid_pinpoints=PINPOINTS, image_token_id=IMAGE,
        vision_feature_layer=-2, tie_word_embeddings=True,
    )  # fmt: skip
    model = lively(lambda: transformers.LlavaNextForConditionalGeneration(config))
    size = {"height": 84, "width": 84}
    images = LlavaNextImageProcessorPil(
        size=size, crop_size=size, image_grid_pinpoints=PINPOINTS, do_center_crop=False, do_resize=True,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    processor = transformers.LlavaNextProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


def internvl():
    """Tiles of 24 x 24 pixels in 3 x 3 tokens, and a thumbnail behind several."""
    from test_internvl import tiny

    class ImagesAlone(transformers.InternVLProcessor):
        """The stock one asks for a video processor, and that for torchvision; a subclass without one does images."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, image_seq_length=9, chat_template=chat_template)

    size = {"height": 24, "width": 24}
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(
        size=size, crop_to_patches=True, min_patches=1, max_patches=6, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    words = tokenizer(
        ["<pad>", "<s>", "</s>", "<img>", "</img>", "<image>", "<video>"],
        start_image_token="<img>", end_image_token="</img>", context_image_token="<image>", video_token="<video>",
    )  # fmt: skip
    return tiny(), ImagesAlone(images, words, TEMPLATE.replace("IMAGE", "<image>"))


def idefics():
    """Tiles of 32 x 32 pixels in 4 x 4 tokens, and the whole picture behind them."""
    processor, _ = idefics3()
    return tiny_idefics("idefics3"), processor


MADE = {"llava_next": llava_next, "internvl": internvl, "idefics3": idefics}


def gradient(height, width):
    """A picture of which every place has its own colour: red grows to the right, green downwards."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, axis=0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, axis=1)
    pixels = np.stack([red, green, np.full((height, width), 90.0)], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def write(kind, folder):
    """Write a model to a folder, and return its processor, which the loader is to be given."""
    torch.manual_seed(0)
    model, processor = MADE[kind]()
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return processor
