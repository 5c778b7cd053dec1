"""Mean and variance of [CLS] attention over heads: how far the two halves of PrismPrune tell tokens apart.

    python benchmarks/heads.py [--model assets/hard_vlm] [--scenes 96]

Printed for each layer: the rank correlation over tokens of mean and variance, of mean and standard deviation / mean,
and how much the 16 tokens of highest mean and of highest variance have in common.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from prunetune import Arm, ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.tiny_world import split_seeds
from prunetune.tiny_world.hard.images import KIND, hard_images

TOP = 16


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each token of each image, (B, N)."""
    return values.argsort(dim=1).argsort(dim=1).double()


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's rank correlation over tokens, the mean over images."""
    pair = [ranks(values) - (values.shape[1] - 1) / 2 for values in (one, other)]
    return float(((pair[0] * pair[1]).sum(dim=1) / pair[0].square().sum(dim=1)).mean())


def overlap(one: Tensor, other: Tensor) -> float:
    """Return which share of the highest tokens two scores have in common, the mean over images."""
    tops = [torch.zeros_like(values).scatter_(1, values.topk(TOP, dim=1).indices, 1) for values in (one, other)]
    return float((tops[0] * tops[1]).sum(dim=1).mean()) / TOP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/hard_vlm")
    parser.add_argument("--scenes", type=int, default=96)
    options = parser.parse_args()
    arm = Arm.load(ModelConfig(path=options.model, dtype="float32"), device="cpu")
    formatter = arm.formatter(hard_images())
    samples = [Sample(str(seed), "", f"{KIND}:{seed}", (Turn("how many objects are there ?", None),))
               for seed in split_seeds("validation", options.scenes)]  # fmt: skip
    layers = int(arm.model.config.vision_config.num_hidden_layers)
    inputs = arm.place(formatter.prompt_batch(samples))
    print("| layer | rank correlation of mean and variance | of mean and std / mean | top 16 in common |")
    print("| --- | ---: | ---: | ---: |")
    for layer in range(1, layers + 1):
        with torch.inference_mode():
            tokens = arm.pruned.encode(inputs, frozenset({f"cls_attention@{layer}"}))["image"].groups[0]
        attention = tokens.require("cls_attention").double()  # (B, H, N)
        mean, deviation = attention.mean(dim=1), attention.std(dim=1, correction=0)
        cells = [correlation(mean, deviation**2), correlation(mean, deviation / mean), overlap(mean, deviation**2)]
        print(
            f"| {layer} of {layers}, {attention.shape[1]} heads | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"
        )


if __name__ == "__main__":
    main()
