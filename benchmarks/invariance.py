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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model = build(options.device, dtype)
    family = family_of(model)
    plugs = {}
    for name in registered_methods():
        sources = {signal_of(need).source for need in registered_methods()[name].needs}
        if name != "identity" and "text" not in sources:
            plugs[name] = PrunedModel(model, PruningSpec(name, KEEP))
    needs = frozenset(need for plug in plugs.values() for need in plug.pruner.needs)
    images = smooth_images(options.images).to(options.device, dtype)

    def kept(first: int, size: int) -> tuple[Vision, dict[str, Tensor]]:
        pixels = images[first : first + size]
        vision = family.encode(model, {"pixel_values": pixels}, "image", needs)
        ids = torch.full((len(pixels), 576), IMAGE, device=options.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return vision, {name: plug.prepare(inputs, vision={"image": vision}).keep for name, plug in plugs.items()}

    with torch.inference_mode():
        alone = [kept(image, 1) for image in range(options.images)]
        rows = []
        for size in (2, options.images):
            same = dict.fromkeys(plugs, 0)
            differences = dict.fromkeys(("features", "projected", "cls_attention"), 0.0)
            for first in range(0, options.images, size):
                vision, together = kept(first, size)
                for place in range(len(vision.groups[0].features)):
                    single, own = alone[first + place]
                    for name in plugs:
                        same[name] += bool(torch.equal(together[name][place], own[name][0]))
                    for name in differences:
                        one, other = (v.groups[0].require(name)[i].float() for v, i in ((vision, place), (single, 0)))
                        scale = other.abs().max()
                        differences[name] = max(differences[name], float((one - other).abs().max() / scale))
            rows.append((size, same, differences))
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {platform.machine()}"
    lines = [f"{where}, torch {torch.__version__}, {options.dtype}, {options.images} images, K = {KEEP} of 576", ""]
    lines += ["| | " + " | ".join(f"alone = in a batch of {size}" for size, _, _ in rows) + " |"]
    lines += ["|---|" + "---:|" * len(rows)]
    for name in plugs:
        cells = [f"{same[name]} of {options.images}" for _, same, _ in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in rows[0][2]:
        cells = [f"{differences[name]:.1e}" for _, _, differences in rows]
        lines.append(f"| *largest relative difference of {name}* | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
