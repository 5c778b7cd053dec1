"""Tiny Qwen-VL models from configurations, and batches of images and videos of different sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from family_world import WITHOUT_CLS
from torch import Tensor

from prunetune.testing import FamilyIdentity

IMAGE, VIDEO = 5, 6
WORDS = range(7, 64)


VISION = {"depth": 3, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
WIDE = {**VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
TOWERS = {
    "qwen2_vl": {**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},  # hidden_size is the LLM's here
    "qwen2_5_vl": {**WIDE, "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {**WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


def tiny_qwen(dtype=torch.float32, attention="sdpa", kind="qwen2_5_vl", layers=None):
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    if kind == "qwen3_vl":
        rope["mrope_interleaved"] = True
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers or (3 if kind == "qwen3_vl" else 2),  # its first two take the deepstack levels
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": rope,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        text_config=text, vision_config=TOWERS[kind], bos_token_id=1, eos_token_id=2, **marks
    )
    config._attn_implementation = attention
    model = getattr(transformers, f"{CLASSES[kind]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():  # livelier than the initialisation
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.to(dtype)


@dataclass(frozen=True)
class Row:
    """One sample: for each visual its kind, its grid in patches and a seed, words around them, and a name."""

    visuals: tuple[tuple[str, tuple[int, int, int], int], ...]
    words: int
    seed: int = 0

    def ids(self, frames_apart: bool = False) -> list[int]:
        generator = torch.Generator().manual_seed(100 + self.seed)
        words = torch.randint(WORDS.start, WORDS.stop, (self.words,), generator=generator).tolist()
        ids = [1, *words[:2]]
        for kind, (frames, rows, columns), _ in self.visuals:
            mark, runs = (IMAGE, 1) if kind == "image" else (VIDEO, frames if frames_apart else 1)
            for run in range(runs):
                timestamp = [WORDS.start + run] if runs > 1 else []
                ids += [*timestamp, 3] + [mark] * (frames * rows * columns // 4 // runs) + [4]
            ids.append(words[0])
        return ids + words[2:]

    def pixels(self, kind: str) -> list[tuple[tuple[int, int, int], Tensor]]:
        found = []
        for own, grid, seed in self.visuals:
            if own == kind:
                generator = torch.Generator().manual_seed(seed)
                found.append((grid, torch.randn(grid[0] * grid[1] * grid[2], 96, generator=generator)))
        return found


def batch(rows, side="right", labels=True, dtype=torch.float32, frames_apart=False, timed=True):
    """Return the inputs of a processor, padded on one side.

    With ``frames_apart`` every frame has a run of its own, as Qwen3-VL has them; only Qwen2.5-VL's are ``timed``.
    """
    ids = [row.ids(frames_apart) for row in rows]
    length = max(map(len, ids))
    pad = [[0] * (length - len(own)) for own in ids]
    padded = torch.tensor([own + more if side == "right" else more + own for own, more in zip(ids, pad, strict=True)])
    mask = torch.tensor([[1] * len(own) + more if side == "right" else more + [1] * len(own)
                         for own, more in zip(ids, pad, strict=True)])  # fmt: skip
    inputs = {
        "input_ids": padded,
        "attention_mask": mask,
        "mm_token_type_ids": (padded == IMAGE).int() + 2 * (padded == VIDEO).int(),
    }
    for kind, name, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        found = [visual for row in rows for visual in row.pixels(kind)]
        if found:
            inputs[name] = torch.cat([pixels for _, pixels in found]).to(dtype)
            inputs[grids] = torch.tensor([grid for grid, _ in found])
    if timed and any(kind == "video" for row in rows for kind, _, _ in row.visuals):
        inputs["second_per_grid_ts"] = torch.ones(len(inputs["video_grid_thw"]))
    if labels:
        text = (padded >= WORDS.start) & mask.bool()
        inputs["labels"] = torch.where(text, padded, -100)
    return inputs


ROWS = (
    Row((("image", (1, 8, 12), 1),), 9, 1),
    Row((), 12, 2),
    Row((("image", (1, 12, 8), 2), ("image", (1, 8, 8), 3)), 5, 3),
)
"""A wide image; text alone; a high image and a square one."""

MANY = (*ROWS, Row((("image", (1, 8, 8), 8), ("image", (1, 12, 8), 9), ("image", (1, 8, 8), 10)), 4, 10))
"""The same, and a row of three images."""

TEXTS = (Row((), 12, 2), Row((), 7, 8), Row((), 9, 9))
"""Three samples without an image."""

MIXED = (
    Row((("image", (1, 8, 12), 4), ("video", (3, 8, 8), 5)), 7, 4),
    Row((("video", (2, 8, 12), 6),), 10, 5),
    Row((("image", (1, 8, 8), 7),), 4, 6),
)
"""An image and a video in one sequence; a video; an image."""

MANY_MIXED = (
    *MIXED,
    ROWS[1],
    Row((("video", (2, 8, 8), 8), ("image", (1, 8, 8), 9), ("video", (1, 8, 12), 10)), 6, 7),
)
"""The same, text alone, and a row of three."""

KEEP = 5


class QwenImages(FamilyIdentity):
    """The suite of every family, on images of different sizes."""

    kind = "qwen2_5_vl"
    keep = KEEP
    options = WITHOUT_CLS
    suppressed = (2, IMAGE, VIDEO)
    visuals = MANY

    def make_model(self):
        return tiny_qwen(kind=self.kind)

    def rows(self):
        return list(self.visuals)

    def batch(self, rows, side, labels):
        return batch(rows, side, labels)

    def grown(self, inputs, ids):
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
