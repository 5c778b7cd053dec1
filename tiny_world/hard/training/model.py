"""What the hard VLM is made of: configurations, tokenizer and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from prunetune.tiny_world.hard.questions import hard_vocabulary
from prunetune.tiny_world.hard.scene import IMAGE_PIXELS, PATCH_PIXELS, PATCHES
from prunetune.tiny_world.training.model import BOS, EOS, IMAGE, PAD, build_clip, build_processor, build_tokenizer

WIDTH = 128
_WORD_LENGTH = 0.6
"""Length of a fresh word embedding; about what a normal draw with a deviation of 0.05 would have."""


def hard_vision_config() -> CLIPVisionConfig:
    """Return the vision tower's configuration: 144 patches + [CLS], width 128, 5 layers of 8 heads."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=8,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        hidden_act="gelu_pytorch_tanh",
        projection_dim=64,
    )


def hard_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the harder world."""
    return build_tokenizer(hard_vocabulary())


def hard_clip(words: int) -> CLIPModel:
    """Return a fresh CLIP for a vocabulary of so many words."""
    return build_clip(words, hard_vision_config())


def hard_llava(words: int) -> LlavaForConditionalGeneration:
    """Return a fresh Llava; its words start at right angles to one another, so that a sum of them can be read."""
    text = LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
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
        "image_seq_length": PATCHES,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config = LlavaConfig(vision_config=hard_vision_config(), text_config=text, **options)
    llava = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        embedding: Any = llava.get_input_embeddings()  # (V, D), V <= D
        nn.init.orthogonal_(embedding.weight, gain=_WORD_LENGTH)
    return llava


def save_hard_vlm(folder: Path, llava: LlavaForConditionalGeneration, clip: CLIPModel) -> None:
    """Write Llava + processor to ``folder`` and CLIP + tokenizer to ``folder/clip``, weights in float16 safetensors."""
    tokenizer = hard_tokenizer()
    llava.half().save_pretrained(folder)
    build_processor(tokenizer, IMAGE_PIXELS, PATCH_PIXELS).save_pretrained(folder)
    clip.half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
