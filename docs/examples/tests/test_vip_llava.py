"""The identity suite of every family, on a small model built from its configuration."""

import my_pruning.vip_llava  # noqa: F401  registers the family
import torch

from prunetune.testing import FamilyIdentity

IMAGE, SIDE = 5, 4


class TestVipLlava(FamilyIdentity):
    suppressed = (2, IMAGE)

    def make_model(self):
        from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        vision = CLIPVisionConfig(num_hidden_layers=4, image_size=4 * SIDE, patch_size=4, **shape)
        text = LlamaConfig(vocab_size=64, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **shape)
        config = VipLlavaConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=[-2, -3, 1]
        )
        torch.manual_seed(0)
        model = VipLlavaForConditionalGeneration(config)
        with torch.no_grad():  # livelier than the initialisation, so that answers differ between images
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
        return model.eval()

    def rows(self):
        """Each row is its images' seeds and its number of words."""
        return [((1,), 6), ((2, 3, 4), 4), ((), 9)]

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
