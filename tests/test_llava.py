"""Llava: a tower with [CLS], one of SigLIP's kind without it, and equally many tokens for every image."""

import torch
from family_world import WITHOUT_CLS

from prunetune.testing import FamilyIdentity

IMAGE, SIDE = 5, 4
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def tiny_llava(tower="clip"):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    kind = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    vision = kind(num_hidden_layers=4, image_size=4 * SIDE, patch_size=4, **SHAPE)
    text = LlamaConfig(vocab_size=64, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **SHAPE)
    strategy = "default" if tower == "clip" else "full"
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2,
                         vision_feature_select_strategy=strategy)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # livelier than the initialisation, so that answers differ between images
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


ROWS = (((1,), 6), ((2, 3), 4), ((), 9), ((4, 5, 6), 3))
"""Each sample's images by their seeds, and its words."""


class TestLlava(FamilyIdentity):
    suppressed = (2, IMAGE)
    options = {"hiprune": {"object_layer": 2}}
    tower = "clip"

    def make_model(self):
        return tiny_llava(self.tower)

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        ids, pixels = [], []
        for seeds, words in rows:
            row = [1]
            for seed in seeds:
                row += [3] + [IMAGE] * SIDE * SIDE
                pixels.append(torch.randn(3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(seed)))
            ids.append(row + list(range(7, 7 + words)))
        length = max(map(len, ids))
        left = side == "left"
        padded = [[0] * (length - len(row)) * left + row + [0] * (length - len(row)) * (not left) for row in ids]
        input_ids = torch.tensor(padded)
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels)
        if labels:
            inputs["labels"] = torch.where(input_ids >= 7, input_ids, -100)
        return inputs


class TestSiglip(TestLlava):
    """No [CLS], and every token enters the projector."""

    tower = "siglip"
    options = WITHOUT_CLS
