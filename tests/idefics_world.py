"""Tiny Idefics3 and SmolVLM models from configurations, and batches of samples with several tiles each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from family_world import WITHOUT_CLS
from torch import Tensor

from prunetune.testing import FamilyIdentity

IMAGE, FAKE, PLACE, GLOBAL = 5, 3, 4, 6
WORDS = range(7, 64)
SIDE, PATCH, TOKENS = 32, 4, 16  # 8 x 8 patches a tile, shuffled 2 x 2 to 16 tokens
KEEP = 5
NAMES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


def tiny_idefics(kind, attention="sdpa"):
    import transformers

    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{NAMES[kind]}Config")(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=IMAGE, pad_token_id=0
    )
    config._attn_implementation = attention
    model = getattr(transformers, f"{NAMES[kind]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():  # livelier than the initialisation
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name:
                parameter.mul_(3)
    return model


@dataclass(frozen=True)
class Row:
    """One sample: its images by tiles and a seed, words, and a seed of these.

    An image of n > 1 tiles is cut up, its global view last; one of tile count 0 has a single tile with padding, and a
    negative count is a video of so many frames.
    """

    images: tuple[tuple[int, int], ...]
    words: int
    seed: int = 0

    def ids(self) -> list[int]:
        generator = torch.Generator().manual_seed(100 + self.seed)
        words = torch.randint(WORDS.start, WORDS.stop, (self.words,), generator=generator).tolist()
        ids = [1, *words[:2]]
        for count, _ in self.images:
            if count < 0:
                for frame in range(-count):
                    ids += [WORDS.start + frame, FAKE, GLOBAL, *[IMAGE] * TOKENS, FAKE]
                continue
            for _ in range(count - 1):
                ids += [FAKE, PLACE, *[IMAGE] * TOKENS]
            ids += [FAKE, GLOBAL, *[IMAGE] * TOKENS, FAKE, words[0]]
        return ids + words[2:]

    def tiles(self) -> list[tuple[Tensor, Tensor]]:
        """Return the pixels of each tile, and which of them are no padding."""
        found = []
        for count, seed in self.images:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(max(1, abs(count))):
                pixels = torch.randn(3, SIDE, SIDE, generator=generator)
                mask = torch.ones(SIDE, SIDE, dtype=torch.long)
                if count == 0:
                    mask[:, 20:] = 0  # three of eight patch columns
                    mask[26:] = 0  # cuts a patch row apart: what holds any of the picture counts
                found.append((pixels * mask, mask))
        return found


ROWS = (
    Row(((3, 1),), 9, 1),
    Row((), 12, 2),
    Row(((1, 2), (0, 3), (2, 4)), 5, 3),
)
"""An image of three tiles; text alone; three images, of one, of one with padding and of two tiles."""

MIXED = (
    Row(((1, 5), (-3, 6)), 7, 4),
    Row(((-2, 7),), 10, 5),
    Row((), 4, 6),
)
"""An image and a video of three frames in one sequence; a video of two; text alone."""


def batch(rows, side="right", labels=True):
    """Return the inputs of a processor, padded on one side; samples with fewer tiles are filled up with zeros."""
    ids = [row.ids() for row in rows]
    length = max(map(len, ids))
    padded, mask = [], []
    for own in ids:
        fill = [0] * (length - len(own))
        padded.append(own + fill if side == "right" else fill + own)
        mask.append([1] * len(own) + fill if side == "right" else fill + [1] * len(own))
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    tiles = [row.tiles() for row in rows]
    most = max(map(len, tiles))
    if most:
        inputs["pixel_values"] = torch.zeros(len(rows), most, 3, SIDE, SIDE)
        inputs["pixel_attention_mask"] = torch.zeros(len(rows), most, SIDE, SIDE, dtype=torch.long)
        for row, found in enumerate(tiles):
            for number, (pixels, seen) in enumerate(found):
                inputs["pixel_values"][row, number] = pixels
                inputs["pixel_attention_mask"][row, number] = seen
    if labels:
        text = (inputs["input_ids"] >= WORDS.start) & inputs["attention_mask"].bool()
        inputs["labels"] = torch.where(text, inputs["input_ids"], -100)
    return inputs


class Tiles(FamilyIdentity):
    """The suite of every family, for a ``kind`` of model and its ``samples``."""

    keep = KEEP
    options = WITHOUT_CLS
    suppressed = (2, IMAGE)

    def make_model(self):
        return tiny_idefics(self.kind)

    def rows(self):
        return list(self.samples)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)
