"""A small LLaVA-NeXT-Video that starts from the bundled tiny VLM: its tower, projector and LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from prunetune.tiny_world.moving.questions import WORDS
from prunetune.tiny_world.scene import IMAGE_PIXELS
from prunetune.tiny_world.training.model import IMAGE, build_tokenizer

VIDEO_TOKEN = "<video>"


def build_video_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny VLM's tokenizer with the words of clips behind its own, so that old ids stay what they are."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([VIDEO_TOKEN], special_tokens=True)
    tokenizer.add_tokens(list(WORDS))
    return tokenizer


def build_video_model(base: Path, tokenizer: PreTrainedTokenizerFast) -> LlavaNextVideoForConditionalGeneration:
    """Return the video model with the weights of the tiny VLM in ``base``; new words start as the mean of the others.

    A frame of 12 x 12 patches is pooled to 6 x 6 tokens in front of the projector, as the family does it.
    """
    image_model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config: Any = image_model.config
    video_config = LlavaNextVideoConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=IMAGE,
        video_token_index=tokenizer.get_vocab()[VIDEO_TOKEN],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_grid_pinpoints=[[IMAGE_PIXELS, IMAGE_PIXELS]],
        spatial_pool_mode="average",
        spatial_pool_stride=2,
        tie_word_embeddings=True,
    )
    model = LlavaNextVideoForConditionalGeneration(video_config)
    missing, unexpected = model.load_state_dict(image_model.state_dict(), strict=False)
    # What an image model has no use for: the mark at the end of an image's rows.
    if unexpected or set(missing) != {"model.image_newline"}:
        raise ValueError(f"{base} is no tiny VLM: {missing} are missing, {unexpected} are too many")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings()
        weight = embedding.weight
        known = config.text_config.vocab_size
        weight[known:] = weight[:known].mean(dim=0) + 0.02 * torch.randn_like(weight[known:])
    return model.eval()
