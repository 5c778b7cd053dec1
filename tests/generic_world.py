"""Tiny models of several architectures from their configurations, and batches of them."""

from __future__ import annotations

import torch

IMAGE, WORDS, VOCABULARY = 5, 8, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma3():
    """Images of 16 tokens, each a mean of 2 by 2 patches; placeholders see one another both ways."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4}
    text = {**TEXT, "sliding_window": 512, "query_pre_attn_scalar": 8}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=IMAGE)
    )


def internvl():
    """Images of 16 tokens, each a block of 2 by 2 patches."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {**VISION, "image_size": [32, 32], "patch_size": [4, 4]}
    text = {**TEXT, "model_type": "qwen2"}
    return InternVLForConditionalGeneration(
        InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=16)
    )


def mistral3():
    """Images of any size; the projector joins 2 by 2 patches."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {**VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 4, "head_dim": 8}
    text = {**TEXT, "model_type": "mistral", "sliding_window": None}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, tie_word_embeddings=False)
    )


def glm4v():
    """Native resolution, and positions in three parts."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 32, "patch_size": 4, "out_hidden_size": 32,
              "intermediate_size": 48}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    marks = {"image_token_id": IMAGE, "video_token_id": 6, "image_start_token_id": 3, "image_end_token_id": 4}
    return Glm4vForConditionalGeneration(
        Glm4vConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **marks)
    )


def ovis2():
    """Reads more of its encoder's output than the features."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    vision = {**VISION, "image_size": 32, "patch_size": 4, "vocab_size": 40, "hidden_stride": 2}
    text = {**TEXT, "model_type": "qwen2"}
    size = {"hidden_size": 32, "vocab_size": VOCABULARY, "visual_indicator_token_ids": [50, 51, 52, 53, 54]}
    return Ovis2ForConditionalGeneration(
        Ovis2Config(text_config=text, vision_config=vision, image_token_id=IMAGE, **size)
    )


MAKERS = {maker.__name__: maker for maker in (gemma3, internvl, mistral3, glm4v, ovis2)}


def tiny(name):
    """Return a model of an architecture, the same weights in every call."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():  # livelier than the initialisation, so that answers differ between images
        for parameter in model.parameters():
            if not parameter.any():  # Gemma's projector begins at zero
                parameter.normal_(std=0.1)
            if parameter.ndim >= 2:
                parameter.mul_(3)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


ROWS = (((1,), 6), ((2, 3, 5), 4), ((), 9), ((4,), 3))
"""Each sample's images by their seeds, and its words."""


def batch(name, rows=ROWS, side="right", labels=True):
    """Return the inputs of a processor for an architecture, padded on one side."""
    ids, pixels, sizes = [], [], []
    for seeds, words in rows:
        row = [1]
        for seed in seeds:
            # Images of two sizes where the architecture has them.
            height, width = (8, 12) if name in ("mistral3", "glm4v") and seed % 2 else (8, 8)
            tokens = height * width // 4
            row += [3] + [IMAGE] * tokens + [4, 7]
            generator = torch.Generator().manual_seed(seed)
            pixels.append(torch.randn(3, 4 * height, 4 * width, generator=generator))
            sizes.append((height, width))
        ids.append(row + [WORDS + (word * 7 + len(seeds)) % (VOCABULARY - 20) for word in range(words)])
    length = max(map(len, ids))
    left = side == "left"
    padded = [[0] * (length - len(row)) * left + row + [0] * (length - len(row)) * (not left) for row in ids]
    input_ids = torch.tensor(padded)
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
    if name == "gemma3":
        inputs["token_type_ids"] = (input_ids == IMAGE).long()
    if pixels:
        inputs |= _pixels(name, pixels, sizes)
    if name == "glm4v":
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int()
    if labels:
        inputs["labels"] = torch.where(input_ids >= WORDS, input_ids, -100)
    return inputs


def _pixels(name, pixels, sizes):
    if name == "glm4v":
        values = []
        for image, (height, width) in zip(pixels, sizes, strict=True):
            generator = torch.Generator().manual_seed(int(image.sum().abs() * 1000))
            values.append(torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator))
        grids = torch.tensor([(1, *size) for size in sizes])
        return {"pixel_values": torch.cat(values), "image_grid_thw": grids}
    if name == "mistral3":
        widest = max(image.shape[2] for image in pixels)
        padded = [torch.nn.functional.pad(image, (0, widest - image.shape[2])) for image in pixels]
        return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes) * 4}
    return {"pixel_values": torch.stack(pixels)}
