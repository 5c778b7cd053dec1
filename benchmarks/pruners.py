"""Median milliseconds of every pruner beside two yardsticks measured in the same run.

    OMP_NUM_THREADS=1 python benchmarks/pruners.py [--device cuda] [--methods divprune fps ...] [--output FILE.md]

The yardsticks are the N x N similarity product at the width that a method compares (on a CPU the floor of every
similarity method) and one CLIP-L encoder layer. Ratios are to the product; bars are the project's own. On CUDA the
Triton kernels are first compared with the plain loops.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from prunetune.pruning import VisualTokens, build_pruner, registered_methods
from prunetune.pruning.ops import greedy, greedy_triton
from prunetune.pruning.registry import method_of

WIDTH, LLM_WIDTH, EMBEDS, HEADS = 1024, 4096, 768, 16
SIZES = {"N=576 K=64 B=1": (576, 64, 1), "N=576 K=64 B=8": (576, 64, 8), "N=2880 K=160 B=1": (2880, 160, 1)}
PROJECTED = (
    *("adaptive", "cdpruner", "crisprune", "divprune", "divprune_aligned", "fps", "trimtokenator"),
    *("holov", "promprune", "vscan", "dycoke", "evs", "fastvid", "vidcom2"),
)
ATTENTION_ONLY = ("fastervlm", "hiprune")
BARS = dict.fromkeys(("divprune", "cdpruner", "crisprune", "trimtokenator", "fps", "prismprune", "vispruner"), 1.5)
FRAMES = 4
"""Methods for videos are given the same tokens as clips of so many frames."""


def make_tokens(count: int, batch: int, device: str) -> VisualTokens:
    """Tokens like a vision tower's: smooth low-rank fields, a common direction, noise, and a few attention sinks."""
    g = torch.Generator().manual_seed(count + batch)

    def field(width: int) -> Tensor:
        smooth = torch.randn(batch, count, 48, generator=g).cumsum(dim=1) / count**0.5
        basis = torch.randn(batch, 48, width, generator=g)
        common = torch.randn(batch, 1, width, generator=g)
        return (smooth @ basis + common + 0.7 * torch.randn(batch, count, width, generator=g)).to(device)

    def attention(*shape: int) -> Tensor:
        logits = torch.randn(batch, *shape, count, generator=g)
        logits[..., :: count // 7] += 3
        return logits.softmax(dim=-1).to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g).to(device)

    return VisualTokens(
        features=field(WIDTH),
        projected=field(LLM_WIDTH),
        signals={
            "cls_attention": attention(HEADS),
            "received_attention": attention(HEADS),
            "object_attention": attention(HEADS),
            "keys": field(64),
            "cls_feature": normal(WIDTH),
            "reader_attention": attention(),
            "reader_keys": field(WIDTH),
            "image_embeds": field(EMBEDS),
            "text_embeds": normal(1, EMBEDS),
            "general_embeds": normal(3, EMBEDS),
            "text_token_embeds": normal(20, LLM_WIDTH),
            "general_token_embeds": normal(3, LLM_WIDTH),
            "image_key": torch.arange(batch, device=device),
            "shallow_attention": attention(HEADS),
        },
        grid=(24, count // 24),
    )


def milliseconds(function: Callable[[], object], device: str, seconds: float) -> float:
    """Median time of a call, after two to warm up; calls repeat for about ``seconds``, at least five times."""
    function(), function()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds * 1000:
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def yardsticks(tokens: VisualTokens, device: str, seconds: float) -> dict[str, float]:
    """Return milliseconds of the similarity products and of a CLIP-L layer, on tokens of this size."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, activation="gelu", batch_first=True, norm_first=True, device=device
    ).eval()
    projected, features = tokens.projected, tokens.features
    assert projected is not None
    return {
        "product 1024": milliseconds(lambda: features @ features.transpose(1, 2), device, seconds),
        "product 4096": milliseconds(lambda: projected @ projected.transpose(1, 2), device, seconds),
        "CLIP-L layer": milliseconds(lambda: layer(features), device, seconds),
    }


def check_kernels(device: str) -> None:
    """Compare the compiled Triton kernels with the plain loops."""
    tokens = make_tokens(576, 4, device)
    assert tokens.projected is not None
    similarity = torch.nn.functional.normalize(tokens.projected, dim=-1)
    similarity = similarity @ similarity.transpose(1, 2)
    quality = tokens.signals["cls_attention"].mean(1)
    usable = greedy_triton.usable

    def picks() -> list[Tensor]:
        apart = 1 - similarity
        return [greedy.pick_spread(apart, quality, 64, update) for update in ("minimum", "add")] + [
            greedy.pick_determinantal(similarity, quality, 64)
        ]

    compiled = picks()
    greedy_triton.usable = lambda matrix: False
    plain = picks()
    greedy_triton.usable = usable
    same = all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
    print(f"Triton kernels {'equal' if same else 'DIFFER from'} the plain loops\n")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=[name for name in registered_methods() if name != "identity"])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each number is measured")
    parser.add_argument("--output", type=Path, help="write the table there too")
    options = parser.parse_args()
    if options.device != "cpu":
        check_kernels(options.device)
    times: dict[str, dict[str, float]] = {}
    for size, (count, keep, batch) in SIZES.items():
        tokens = make_tokens(count, batch, options.device)
        clips = replace(tokens, frames=FRAMES, grid=(12, count // FRAMES // 12))
        rulers = yardsticks(tokens, options.device, options.seconds)
        for ruler, value in rulers.items():
            times.setdefault(f"*{ruler}*", {})[size] = value
        for name in options.methods:
            pruner = build_pruner(name)
            product = "product 4096" if name in PROJECTED else "product 1024"
            row = times.setdefault(name, {})
            given = clips if method_of(name).video else tokens
            row[size] = milliseconds(partial(pruner, given, keep), options.device, options.seconds)
            row[f"x {size}"] = row[size] / rulers[product]
    table = to_markdown(times, options.device)
    print(table)
    if options.output:
        options.output.write_text(table + "\n")


def to_markdown(times: dict[str, dict[str, float]], device: str) -> str:
    """Return the table; a ratio column follows each time."""
    hardware = torch.cuda.get_device_name() if device != "cpu" else f"{platform.processor() or platform.machine()}"
    head = ["ms", *[column for size in SIZES for column in (size, "x product")], "B=8 / B=1", "bar"]
    lines = [f"{hardware}, {torch.get_num_threads()} thread(s), torch {torch.__version__}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    one, eight, _ = SIZES
    for name, row in times.items():
        cells = [name]
        for size in SIZES:
            ratio = row.get(f"x {size}")
            cells += [f"{row[size]:.2f}", "" if ratio is None else f"{ratio:.2f}"]
        cells += [f"{row[eight] / row[one]:.1f}", _bar(name, row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bar(name: str, row: dict[str, float]) -> str:
    one, eight, _ = SIZES
    said = []
    if name in BARS:
        worst = max(row[f"x {size}"] for size in SIZES)
        said.append(f"{BARS[name]}x: {'yes' if worst <= BARS[name] else 'NO'}")
    if name in ATTENTION_ONLY:
        said.append(f"1 ms: {'yes' if row[one] < 1 else 'NO'}")
    if name in BARS:
        said.append(f"8.5x: {'yes' if row[eight] <= 8.5 * row[one] else 'NO'}")
    return ", ".join(said)


if __name__ == "__main__":
    main()
