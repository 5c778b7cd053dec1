"""The LLM's frozen linear layers in float8 against bfloat16 and float32: the same loss, gradient, tokens, accuracy?

    python benchmarks/float8.py [--samples 256] [--seeds 0 1] [--steps 125]
    python benchmarks/float8.py --device cuda [--layers 32] [--tokens 8192 16384]

On a CPU: the bundled tiny VLM under DivPrune at 16 of 144 tokens, with float8 emulated (the rounded numbers multiplied
in float32), at its own projector and after training. On a GPU: LLaVA-1.5-7B's LLM with random weights, forward and
backward to its inputs, and the compiled kernel against the plain rounding. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_vlm import accuracy
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from prunetune.assets import TINY_VLM
from prunetune.configs import ModelConfig
from prunetune.data_recipes import RecipeData, load_recipe
from prunetune.models import Arm
from prunetune.models.adapter import projector_state
from prunetune.pruning import Pruned, PruningSpec
from prunetune.train import float8_triton
from prunetune.train.float8 import Float8Linear, round_rows, use_float8

SPEC = PruningSpec("divprune", 16)
BATCH = 128
PEAK = 989e12
"""FLOP/s of an H200 in dense bfloat16, by its data sheet; float8 has twice that."""
LENGTH = 420
"""Tokens of a mean sample of the paper's recipe at 64 visual tokens."""


def load(dtype: str) -> Arm:
    """Return the tiny VLM, its projector alone to train."""
    arm = Arm.load(ModelConfig(path=str(TINY_VLM), dtype=dtype), SPEC, device="cpu")  # type: ignore[arg-type]
    arm.model.requires_grad_(False)
    for parameter in projector_state(arm.model, keep_vars=True).values():
        parameter.requires_grad_(True)
    return arm


def arm_of(name: str) -> Arm:
    """Return the arm of a row: its dtype, and float8 where the name says so."""
    dtype, _, rounded = name.partition(" + ")
    arm = load(dtype)
    if rounded:
        print(use_float8(arm.model, emulated=True).line(), flush=True)
    return arm


@dataclass(frozen=True)
class Seen:
    """What the first samples gave, before anything was trained."""

    loss: float
    gradient: Tensor
    kept: list[Tensor]


def measure(arm: Arm, data: RecipeData, samples: int) -> Seen:
    """Return the mean loss over the first samples, the projector's gradient, and which tokens were kept."""
    formatter = arm.formatter(data.images)
    kept: list[Tensor] = []
    losses = []

    def note(pruned: Pruned) -> None:
        kept.append(pruned.keep)

    with arm.pruned.attach(note):
        for start in range(0, samples, BATCH):
            batch = arm.place(formatter.training_batch([data[start + i] for i in range(min(BATCH, samples - start))]))
            loss = arm.model(**batch).loss
            loss.backward()
            losses.append(loss.item())
    gradients = [tensor.grad for tensor in projector_state(arm.model, keep_vars=True).values()]
    return Seen(statistics.mean(losses), torch.cat([g.float().flatten() for g in gradients if g is not None]), kept)


def train(arm: Arm, data: RecipeData, steps: int, seed: int) -> dict[str, Tensor]:
    """Return the projector in float32 after so many steps of 128 questions, the optimizer on float32 copies."""
    formatter = arm.formatter(data.images)
    own = projector_state(arm.model, keep_vars=True)
    masters = {name: tensor.detach().float().clone().requires_grad_(True) for name, tensor in own.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=5e-3, weight_decay=0.0)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    warm = max(1, round(0.03 * steps))
    arm.model.train()
    with arm.pruned.attach():
        for step in range(steps):
            share = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
            optimizer.param_groups[0]["lr"] = 5e-3 * share
            rows = [data[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
            loss = arm.model(**arm.place(formatter.training_batch(rows))).loss
            arm.model.zero_grad()
            loss.backward()
            for name, tensor in own.items():
                assert tensor.grad is not None
                masters[name].grad = tensor.grad.float()
            torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(masters[name])
            if (step + 1) % 25 == 0:
                print(f"  step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    return {name: tensor.detach() for name, tensor in masters.items()}


def evaluated(projector: dict[str, Tensor] | None, scenes: int) -> float:
    """Return the accuracy in percent of a projector on the base in float32, as every adapter is evaluated."""
    arm = load("float32")
    if projector is not None:
        arm.model.load_state_dict(projector, strict=False)
    arm.model.eval()
    with tempfile.TemporaryDirectory() as folder:
        return accuracy(Path(folder), arm, scenes)[0]


def parity(options: argparse.Namespace) -> None:
    """Print the table of a CPU."""
    data = load_recipe("tiny_world", max_samples=options.steps * BATCH)
    names = ["float32", "bfloat16", "float32 + float8", "bfloat16 + float8"]
    before = {name: measure(arm_of(name), data, options.samples) for name in names}
    exact = before["float32"]
    tuned: dict[str, list[float]] = {name: [] for name in names}
    for seed in options.seeds:
        for name in options.trained:
            print(f"training {name}, seed {seed}", flush=True)
            tuned[name].append(evaluated(train(arm_of(name), data, options.steps, seed), options.scenes))
    print(
        f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.samples} samples, ",
        end="",
    )
    print(f"{options.steps} steps of {BATCH}, {options.scenes} test scenes; training-free ", end="")
    print(f"{evaluated(None, options.scenes):.1f} %\n")
    print("| LLM's linear layers | loss | difference | gradient's relative error | cosine | kept tokens | tuned |")
    print("|---|---:|---:|---:|---:|---|---|")
    for name, seen in before.items():
        error = (seen.gradient - exact.gradient).norm() / exact.gradient.norm()
        cosine = torch.cosine_similarity(seen.gradient, exact.gradient, dim=0)
        same = [torch.equal(a, b) for a, b in zip(seen.kept, before[name.partition(" + ")[0]].kept, strict=True)]
        base = "" if " + " not in name else f" as in {name.partition(' + ')[0]}"
        told = f"identical{base}" if all(same) else f"DIFFER{base}"
        reached = ", ".join(f"{value:.1f}" for value in tuned[name]) or "-"
        cells = [name, f"{seen.loss:.5f}", f"{100 * (seen.loss / exact.loss - 1):+.2f} %", f"{100 * error:.2f} %"]
        print("| " + " | ".join([*cells, f"{cosine:.5f}", told, reached]) + " |")


def kernel_agrees() -> None:
    """Check on a GPU that the compiled rounding is the plain one's, to the bit."""
    torch.manual_seed(0)
    for width in (4096, 11008):
        for dtype in (torch.float32, torch.bfloat16):
            values = (torch.randn(64, width) * torch.logspace(-4, 3, 64)[:, None]).to(dtype)
            for factors in (None, torch.rand(width) + 0.1):
                plain, scales = round_rows(values, factors)
                there = None if factors is None else factors.cuda()
                codes, same = round_rows(values.cuda(), there)
                assert torch.equal(same.cpu(), scales), f"scales of width {width} in {dtype}"
                assert torch.equal(codes.cpu().view(torch.uint8), plain.view(torch.uint8)), f"codes, {width} in {dtype}"
    print(f"rounding on the GPU equals the CPU's; Triton {'used' if float8_triton.triton else 'absent'}", flush=True)


def llama(layers: int) -> LlamaModel:
    """Return Vicuna-7B's shape with random weights in bfloat16, made on the GPU."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, use_cache=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaModel(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def convert(model: LlamaModel, keep_transposed: bool) -> None:
    """Put every linear layer of a bare LLM into float8."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Float8Linear(module, keep_transposed=keep_transposed))


def step(model: LlamaModel, inputs: Tensor, direction: Tensor) -> Tensor:
    """Return the gradient of the inputs, of the outputs' product with a direction.

    Their squares would not do: after the last norm their mean is 1 whatever the inputs are.
    """
    inputs.grad = None
    model(inputs_embeds=inputs).last_hidden_state.backward(direction)
    assert inputs.grad is not None
    return inputs.grad


def timed(model: LlamaModel, inputs: Tensor, direction: Tensor, repeats: int = 7) -> tuple[float, float]:
    """Return median and spread of a step in seconds, after three that are not counted."""
    times = []
    for repeat in range(3 + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(model, inputs, direction)
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times), max(times) - min(times)


def speed(options: argparse.Namespace) -> None:
    """Print the tables of a GPU."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers of 4096 / 11008\n")
    kernel_agrees()
    exact: dict[int, Tensor] = {}
    reference: dict[int, float] = {}
    print("\n| linear layers | tokens | ms a step | spread | tokens/s | against bfloat16 | MFU (bfloat16 peak) "
          "| peak GiB | cosine of the inputs' gradient |\n|---|" + "---:|" * 8, flush=True)  # fmt: skip
    for name in ("bfloat16", "float8", "float8, transposed kept"):
        torch.manual_seed(0)
        model: Any = llama(options.layers)
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        if name != "bfloat16":
            convert(model, "transposed" in name)
            torch.cuda.empty_cache()
        for tokens in options.tokens:
            rows = max(1, tokens // LENGTH)
            generator = torch.Generator("cuda").manual_seed(1)
            shape = (rows, LENGTH, 4096)
            inputs = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            direction = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            inputs.requires_grad_(True)
            torch.cuda.reset_peak_memory_stats()
            try:
                gradient = step(model, inputs, direction).float().cpu()
                seconds, spread = timed(model, inputs, direction)
            except torch.OutOfMemoryError:
                print(f"| {name} | {rows * LENGTH} | out of memory |" + " |" * 6, flush=True)
                continue
            rate = rows * LENGTH / seconds
            reference.setdefault(tokens, rate)
            cosine = torch.cosine_similarity(gradient.flatten(), exact.setdefault(tokens, gradient).flatten(), dim=0)
            peak = torch.cuda.max_memory_allocated() / 2**30
            # Forward and backward to the inputs: two products of two FLOP a weight and token.
            mfu = 4 * weights * rate / PEAK
            cells = [name, f"{rows * LENGTH}", f"{1000 * seconds:.1f}", f"{1000 * spread:.1f}", f"{rate:,.0f}"]
            cells += [f"{rate / reference[tokens]:.2f}", f"{100 * mfu:.0f} %", f"{peak:.1f}", f"{cosine:.4f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
        del model
        torch.cuda.empty_cache()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--samples", type=int, default=256, help="for loss, gradient and kept tokens")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1), help="orders of the training samples")
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--scenes", type=int, default=200, help="of eight questions, for the accuracies")
    parser.add_argument("--trained", nargs="*", default=("float32", "float32 + float8"), help="rows that are trained")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=(8192, 16384))
    options = parser.parse_args()
    if options.device == "cuda":
        speed(options)
    else:
        parity(options)


if __name__ == "__main__":
    main()
