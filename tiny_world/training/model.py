"""What the tiny VLM is made of: configurations, tokenizer, processor and their saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from prunetune.tiny_world import IMAGE_PIXELS, PATCH_PIXELS, vocabulary

# CLIP's pooling reads an end-of-sequence id of 2 as "old checkpoint, take the largest id", so `</s>` is 3.
SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
PAD, BOS, UNK, EOS, IMAGE = range(5)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %} {% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)


def build_tokenizer(known: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: one id per word of the world (or of ``known``), one per digit."""
    words = [*SPECIAL_TOKENS, "USER", "ASSISTANT", ":", *(known or vocabulary())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_max_length=512,
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast, pixels: int = IMAGE_PIXELS, patch: int = PATCH_PIXELS
) -> LlavaProcessor:
    """Return the stock Llava processor for square pictures of so many pixels, in patches of so many."""
    size = {"height": pixels, "width": pixels}
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_resize=True, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def vision_config() -> CLIPVisionConfig:
    """Return the vision tower's configuration: 144 patches + [CLS], width 128, 5 layers of 4 heads."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        hidden_act="gelu_pytorch_tanh",
        projection_dim=64,
    )


def build_clip(vocabulary_size: int, vision: CLIPVisionConfig | None = None) -> CLIPModel:
    """Return a fresh CLIP whose vision tower starts with 2-D sin-cos positions and lively attention."""
    vision = vision or vision_config()
    text = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        projection_dim=64,
        hidden_act="gelu_pytorch_tanh",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))
    tower = clip.vision_model
    with torch.no_grad():
        kernel = tower.embeddings.patch_embedding.weight  # (C, 3, patch, patch)
        nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)
        positions = tower.embeddings.position_embedding.weight
        positions[0].zero_()
        positions[1:] = 0.5 * sincos_2d(math.isqrt(len(positions) - 1), positions.shape[1])
        for layer in tower.encoder.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                nn.init.normal_(linear.weight, std=1.5 * linear.in_features**-0.5)
    return clip


def build_llava(vocabulary_size: int) -> LlavaForConditionalGeneration:
    """Return a fresh Llava around the tiny tower; its tower weights are to be loaded from the trained CLIP."""
    text = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    options: dict[str, Any] = {
        "image_token_id": IMAGE,
        "image_seq_length": (IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision_config(), text_config=text, **options))


def sincos_2d(side: int, width: int) -> torch.Tensor:
    """Return 2-D sin-cos position codes (side * side, width), rows in the first half of the channels."""
    frequency = 1.0 / 50.0 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency[None, :]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = line[:, None, :].expand(side, side, -1)
    columns = line[None, :, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def save_tiny_vlm(folder: Path, llava: LlavaForConditionalGeneration, clip: CLIPModel) -> None:
    """Write Llava + processor to ``folder`` and CLIP + tokenizer to ``folder/clip``, weights in float16 safetensors."""
    tokenizer = build_tokenizer()
    llava.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    clip.half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
