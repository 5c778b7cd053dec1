"""Tiny Gemma 3 and PaliGemma models from configurations, and batches of images with the token types they read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE, BEGIN, END = 5, 3, 4
WORDS = range(7, 64)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
    "vision_use_head": False,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def lively(model):
    """Return a model whose attention and projector do something, unlike the initialisation."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not parameter.any():  # Gemma 3's projection begins as zeros
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(3)
    return model.eval()


def tiny_gemma3(attention="sdpa", window=256, pairs=1):
    """Return a model of 8 x 8 patches an image, pooled 2 x 2; ``pairs`` times one layer of each kind."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {**TEXT, "sliding_window": window, "layer_types": ["sliding_attention", "full_attention"] * pairs}
    text["num_hidden_layers"] = 2 * pairs
    config = Gemma3Config(
        text_config={**text, "query_pre_attn_scalar": 8},
        vision_config={**VISION, "image_size": 32},
        mm_tokens_per_image=16,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    config._attn_implementation = attention
    return lively(Gemma3ForConditionalGeneration(config))


def tiny_paligemma(attention="sdpa", text="gemma"):
    """Return a model of 4 x 4 patches an image, one token each; with Gemma 2 for PaliGemma 2."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    torch.manual_seed(0)
    own = {"model_type": text, **TEXT}
    if text == "gemma2":
        own |= {"sliding_window": 256, "query_pre_attn_scalar": 8}
    config = PaliGemmaConfig(
        text_config=own,
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 16, "projection_dim": 32},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    config._attn_implementation = attention
    return lively(PaliGemmaForConditionalGeneration(config))


@dataclass(frozen=True)
class Row:
    """One sample: the seeds of its images, words before the answer, words of the answer, and a seed."""

    images: tuple[int, ...]
    words: int
    answer: int = 3
    seed: int = 0

    def ids(self, labels: bool, framed: bool) -> tuple[list[int], int]:
        """Return the ids, and how many of them are the prompt; answers are there for training."""
        generator = torch.Generator().manual_seed(100 + self.seed)
        words = torch.randint(WORDS.start, WORDS.stop, (self.words + self.answer,), generator=generator).tolist()
        ids = [] if not framed else [1]
        for _ in self.images:
            ids += [BEGIN, *[IMAGE] * 16, END, words[0]] if framed else [IMAGE] * 16
        ids += ([] if framed else [1]) + words[: self.words]
        return ids + (words[self.words :] if labels else []), len(ids)


ROWS = (
    Row((1,), 9, 3, 1),
    Row((), 12, 2, 2),
    Row((2, 3, 4), 5, 4, 3),
    Row((5, 6), 7, 3, 4),
)
"""One image; text alone; three images; two."""


def batch(rows, side: str, labels: bool, size: int, types: str) -> dict[str, Tensor]:
    """Return the inputs of a processor, padded on one side.

    Args:
        rows: samples.
        side: of the padding.
        labels: whether answers and labels are there.
        size: a side of an image, in pixels.
        types: what 1 means in ``token_type_ids``: an "image", or the "suffix".
    """
    found = [row.ids(labels, framed=types == "image") for row in rows]
    length = max(len(ids) for ids, _ in found)
    inputs = {name: [] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    for ids, prompt in found:
        pad = [0] * (length - len(ids))
        answer = len(ids) - prompt
        kinds = [int(own == IMAGE) for own in ids] if types == "image" else [0] * prompt + [1] * answer
        for name, values, fill in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("token_type_ids", kinds, 0),
            ("labels", [-100] * prompt + ids[prompt:], -100),
        ):
            padding = [fill] * len(pad)
            inputs[name].append(values + padding if side == "right" else padding + values)
    tensors = {name: torch.tensor(values) for name, values in inputs.items() if name != "labels" or labels}
    seeds = [seed for row in rows for seed in row.images]
    if seeds:
        tensors["pixel_values"] = torch.stack([picture(seed, size) for seed in seeds])
    return tensors


def picture(seed: int, size: int) -> Tensor:
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
