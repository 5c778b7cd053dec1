"""Does what is kept of an image depend on its batch? Every method on a CLIP-L tower and LLaVA-1.5's projector.

    python benchmarks/invariance.py [--device cuda] [--dtype bfloat16] [--images 8] [--output FILE.md]

Random weights, random smooth images. Each image is encoded alone and in batches of 2 and of all; the table says for how
many images each method keeps the same tokens as alone, and by how much features and signals differ. On a CPU all agree
to the bit. On CUDA matrix products of another size may round otherwise in the tower itself: then features differ, and
this says how often that reaches a selection.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from prunetune.pruning import PrunedModel, PruningSpec, Vision, registered_methods
from prunetune.pruning.families import family_of
from prunetune.pruning.signals import signal_of

IMAGE, KEEP = 5, 64


def build(device: str, dtype: torch.dtype) -> Any:
    """Return LLaVA-1.5-7B's vision side before an LLM of one layer."""
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14)  # fmt: skip
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, vocab_size=64
    )
    torch.manual_seed(0)
    with torch.device(device):
        parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE}
        model: Any = LlavaForConditionalGeneration(LlavaConfig(**parts))
    return model.to(dtype).eval()


def smooth_images(count: int) -> Tensor:
    """Return images (count, 3, 336, 336) with large and small structures."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for side in (4, 24, 112):
        noise = torch.randn(count, 3, side, side, generator=generator)
        parts.append(torch.nn.functional.interpolate(noise, (336, 336), mode="bilinear"))
    return sum(parts, torch.zeros(()))


@dataclass(frozen=True)
class Row:
    """What batches of one size do: images with the same tokens by method, and the largest relative differences."""

    size: int
    same: dict[str, int]
    differences: dict[str, float]


class Subject:
    """A model, the methods that read nothing of the text, and images to encode in batches of any size."""

    def __init__(self, device: str, dtype: torch.dtype, count: int) -> None:
        self.model = build(device, dtype)
        self.images = smooth_images(count).to(device, dtype)
        self.plugs = {}
        for name, method in registered_methods().items():
            sources = {signal_of(need).source for need in method.needs}
            if name != "identity" and "text" not in sources and not method.video:
                self.plugs[name] = PrunedModel(self.model, PruningSpec(name, KEEP))
        self.needs = frozenset(need for plug in self.plugs.values() for need in plug.pruner.needs)

    def kept(self, first: int, size: int) -> tuple[Vision, dict[str, Tensor]]:
        """Return a batch of images encoded, and what every method keeps of it."""
        pixels = self.images[first : first + size]
        vision = family_of(self.model).encode(self.model, {"pixel_values": pixels}, "image", self.needs)
        ids = torch.full((len(pixels), 576), IMAGE, device=pixels.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kept = {}
        for name, plug in self.plugs.items():
            kept[name] = plug.prepare(inputs, vision={"image": vision}).keep
        return vision, kept

    def compare(self, size: int, alone: list[tuple[Vision, dict[str, Tensor]]]) -> Row:
        """Compare batches of ``size`` with every image alone."""
        row = Row(size, dict.fromkeys(self.plugs, 0), dict.fromkeys(("features", "projected", "cls_attention"), 0.0))
        for first in range(0, len(self.images), size):
            vision, together = self.kept(first, size)
            for index in range(len(vision.groups[0].features)):
                single, own = alone[first + index]
                for name in self.plugs:
                    row.same[name] += bool(torch.equal(together[name][index], own[name][0]))
                for name, before in row.differences.items():
                    row.differences[name] = max(before, relative_difference(name, vision, index, single))
        return row


def relative_difference(name: str, vision: Vision, index: int, single: Vision) -> float:
    """Return how much a signal of an image in a batch differs from the image's alone, relative to its largest value."""
    here = vision.groups[0].require(name)[index].float()
    alone = single.groups[0].require(name)[0].float()
    return float((here - alone).abs().max() / alone.abs().max())


def table(rows: list[Row], count: int) -> list[str]:
    """Return the rows as a Markdown table, one column per batch size."""
    heads = [f"alone = in a batch of {row.size}" for row in rows]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(rows)]
    for name in rows[0].same:
        cells = [f"{row.same[name]} of {count}" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in rows[0].differences:
        cells = [f"{row.differences[name]:.1e}" for row in rows]
        lines.append(f"| *largest relative difference of {name}* | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    subject = Subject(options.device, getattr(torch, options.dtype), options.images)
    with torch.inference_mode():
        alone = [subject.kept(image, 1) for image in range(options.images)]
        rows = [subject.compare(size, alone) for size in (2, options.images)]
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {platform.machine()}"
    lines = [f"{where}, torch {torch.__version__}, {options.dtype}, {options.images} images, K = {KEEP} of 576", ""]
    lines += table(rows, options.images)
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
