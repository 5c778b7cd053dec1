"""What each saving of the engine brings: samples a second, memory and loss of one update, every way in one run.

    OMP_NUM_THREADS=2 python benchmarks/recalibration.py [--shape tiny|170m|7b] [--keep 64] [--samples 8]
        [--device cpu|cuda] [--dtype float32|bfloat16] [--float8] [--budget 4096] [--passes 2] [--output FILE.md]

Samples, pictures and tokenizer are those of data_path.py: the shape of PrismPrune's mix, 576 visual tokens a picture.
Weights are random; the tower is in proportion to the LLM as CLIP's is to a 7B one. Ways, of which each adds to the
one before it from the third on:

* stock: the model as it is, all visual tokens, 16 samples at once, padded, the chat template and the processor;
* earlier: pruned, and otherwise what the shipped configurations asked for before there was an engine: activations
  recomputed, samples padded, the chat template and the processor;
* then without recomputing, with the new data path, packed by token budget, and so on.

Every way sees the same samples in the same order, and the pruned ways must have the same loss over all their
supervised tokens. Ways take turns and the best pass counts. "rest" is the share of a step that is neither tower nor
projector nor LLM: data, selection, bookkeeping, optimizer.

Bars, at 64 of 576 tokens and 170 M: 4 x stock, 2 x earlier, rest at most 5 %.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import resource
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from data_path import Files, earlier, jpegs, processor_of, samples_of, tokenizer_of, words_of
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from prunetune.configs import EngineConfig
from prunetune.data_recipes import Formatter, Sample
from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.layout import by_budget
from prunetune.train.engine.prefix import common_prefix
from prunetune.train.float8 import use_float8
from prunetune.train.flops import Work, flops_of, image, sequences
from prunetune.train.measured import device_peak
from prunetune.train.shape import ModelShape, shape_of

# hidden size, layers and heads of LLM and tower, and the LLM's inner width
SHAPES = {
    "tiny": ((128, 3, 4, 320), (64, 4, 4, 192)),
    "170m": ((768, 18, 12, 2048), (256, 8, 4, 1024)),
    "7b": ((4096, 32, 32, 11008), (1024, 24, 16, 4096)),
}
OFF = EngineConfig(packing=False, supervised_logits=False, shared_prefix=False, project_kept=False, stop_tower=False)
AT_ONCE = 16
"""Samples that a device takes at once where no budget says it."""
RECIPES = {"vg_textvqa_gqa": 180_510, "quick": 20_000}


@dataclass(frozen=True)
class Way:
    """One way to compute an update.

    Attributes:
        name: for the table.
        engine: the switches; None is the stock model without a pruner.
        recomputes: whether the LLM's activations are recomputed.
        new_data: whether batches are built the new way.
        float8: whether the LLM's frozen linear layers are in float8.
    """

    name: str
    engine: EngineConfig | None
    recomputes: bool = False
    new_data: bool = True
    float8: bool = False


@dataclass
class Took:
    """Seconds of one update by part, its loss and the tokens that ran through the LLM."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("data", "optimizer"), 0.0))
    whole: float = 0.0
    loss: float = 0.0
    tokens: int = 0
    supervised: int = 0
    memory: int = 0

    @property
    def rest(self) -> float:
        """Share of what is neither tower nor projector nor LLM."""
        model = sum(self.seconds.get(name, 0.0) for name in ("tower", "projector", "llm", "head", "backward"))
        return 1 - model / self.whole


def ways(budget: int, float8: bool) -> list[Way]:
    """Return all ways, the engine's switches one after another."""
    found = [
        Way("stock, all visual tokens", None, new_data=False),
        Way("earlier: pruned, padded, recomputed", OFF, recomputes=True, new_data=False),
        Way("without recomputing", OFF, new_data=False),
        Way("+ data path", OFF),
    ]
    values: dict[str, Any] = OFF.model_dump()
    steps = (
        ("token budget and packing", {"packing": True, "token_budget": budget}),
        ("logits at supervised positions", {"supervised_logits": True}),
        ("shared prefix", {"shared_prefix": True}),
        ("tower stopped", {"stop_tower": True}),
        ("projector on kept tokens", {"project_kept": True}),
    )
    for name, switches in steps:
        values |= switches
        found.append(Way(f"+ {name}", EngineConfig(**values)))
    if float8:
        found.append(Way("+ float8", EngineConfig(**values), float8=True))
    return found


def model_of(shape: str, words: int, place: int, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Return a model with random weights; all but the projector are frozen."""
    (width, layers, heads, inner), (tower, tower_layers, tower_heads, tower_inner) = SHAPES[shape]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower, num_hidden_layers=tower_layers, num_attention_heads=tower_heads,
            intermediate_size=tower_inner, image_size=336, patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            intermediate_size=inner, vocab_size=words, max_position_embeddings=4096,
        ),
        image_token_index=place, vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a 7B model in float32 first would not fit
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(before)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


class Clock:
    """Times the parts of a model by hooks; a GPU is waited for around each part only while parts are timed."""

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.handles = []
        parts = {
            "tower": model.model.vision_tower,
            "projector": model.model.multi_modal_projector,
            "llm": model.model.language_model,
        }
        for name, module in parts.items():
            self.handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._begin(name)),
                module.register_forward_hook(lambda *_, name=name: self._end(name)),
            ]
        self.began: dict[str, float] = {}

    def now(self) -> float:
        """Return the time, when the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _begin(self, name: str) -> None:
        self.began[name] = self.now()

    def _end(self, name: str) -> None:
        self.ended = self.now()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.ended - self.began[name]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


def parts_of(way: Way, samples: Sequence[Sample], lengths: Sequence[int]) -> list[list[Sample]]:
    """Return the update's micro-batches: by budget, or in the order of the data."""
    budget = None if way.engine is None else way.engine.token_budget
    if budget is None:
        return [list(samples[first : first + AT_ONCE]) for first in range(0, len(samples), AT_ONCE)]
    (batches,) = by_budget(range(len(samples)), lengths, max(budget, *lengths), 1, padded=False)
    return [[samples[index] for index in batch.indices] for batch in batches]


def update(  # noqa: PLR0915 - what is timed stands in one place
    way: Way, model: Any, pruned: PrunedModel, formatter: Formatter, parts: list[list[Sample]], prefix: Any, device: str
) -> Took:
    """Run one update and return what it took."""
    took = Took()
    model.zero_grad()
    if way.recomputes:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.model.language_model.activation_checkpointing_disable()
    model.train()
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=0.0)
    engine = None if way.engine is None else Engine(pruned, way.engine, prefix)
    head = None if way.engine is None else head_of(pruned, way.engine, partitioned=False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(model, device)
    supervised, summed = 0, torch.zeros(())
    with ExitStack() as stack:
        if engine is not None:
            stack.enter_context(engine.attached())
            stack.enter_context(engine.own_head(head))
        begun = clock.now()
        for part in parts:
            start = clock.now()
            built = formatter.training_batch(part) if way.new_data else earlier(formatter, part)
            batch = {}
            for name, value in built.items():
                batch[name] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            batch = formatter.finish(batch)
            batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
            count = int((built["labels"][:, 1:] != -100).sum())
            took.seconds["data"] += clock.now() - start
            if engine is None:
                loss = model(**_known(batch), use_cache=False).loss * count
                took.tokens += batch["input_ids"].numel()
            else:
                loss = engine.summed_loss(model, batch)
                took.tokens += engine.rows.tokens  # type: ignore[union-attr] # set by the call
            headed = clock.now()
            clock.seconds["head"] = clock.seconds.get("head", 0.0) + headed - clock.ended
            (loss / 1000).backward()
            clock.seconds["backward"] = clock.seconds.get("backward", 0.0) + clock.now() - headed
            supervised, summed = supervised + count, summed + loss.detach().double().cpu()
        start = clock.now()
        optimizer.step()
        took.seconds["optimizer"] = clock.now() - start
        took.whole = clock.now() - begun
    clock.close()
    took.seconds |= clock.seconds
    took.loss, took.supervised = float(summed) / supervised, supervised
    took.memory = torch.cuda.max_memory_allocated() if device == "cuda" else _resident()
    return took


def _known(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if torch.is_tensor(value)}


def _resident() -> int:
    """Return the bytes of this process that are in memory now, not the most there ever were."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Saved:
    """Bytes that the graph of a step holds on to for its backward pass: what a device's peak grows by."""

    def __init__(self, model: nn.Module) -> None:
        # Weights are there in any case, also where a view of one is kept.
        self.bytes, self.seen = 0, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def main() -> None:  # noqa: PLR0915
    """Measure, print the table and say which bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="170m")
    parser.add_argument("--pruner", default="prismprune")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--only", nargs="*", type=int, help="numbers of the ways to run, from 0")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    words = words_of(random.Random(0))
    tokenizer = tokenizer_of(words)
    processor = processor_of(tokenizer)
    samples = samples_of(options.samples, words)
    formatter = Formatter(processor, Files(jpegs(options.samples)), "vicuna_v1", "pad", raw_pixels=True)
    plain = Formatter(processor, formatter.images, "vicuna_v1", "pad")
    dtype = getattr(torch, options.dtype)
    place: int = tokenizer.convert_tokens_to_ids("<image>")  # type: ignore[assignment] # one word has one id
    model = model_of(options.shape, len(tokenizer), place, options.device, dtype)
    pruned = PrunedModel(model, PruningSpec(options.pruner, options.keep), tokenizer)
    batch = formatter.training_batch(samples)
    prefix = common_prefix(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), [place])
    lengths = (batch["attention_mask"].sum(dim=1) - 576 + options.keep).tolist()

    shape = shape_of(model)  # before float8 replaces layers
    chosen = ways(options.budget, options.float8)
    if options.only:
        chosen = [chosen[number] for number in options.only]
    best: dict[str, Took] = {}
    saved: dict[str, int] = {}

    def run(way: Way, part: list[list[Sample]]) -> Took:
        return update(way, model, pruned, formatter if way.new_data else plain, part, prefix, options.device)

    mean = sum(lengths) / len(lengths)

    def measure(some: Sequence[Way]) -> list[str]:
        for way in some:
            with Saved(model) as held:
                run(way, [parts_of(way, samples, lengths)[0]])  # warms up, and counts what one micro-batch holds
            saved[way.name] = held.bytes
        for _ in range(options.passes):
            for way in some:
                gc.collect()
                took = run(way, parts_of(way, samples, lengths))
                if way.name not in best or took.whole < best[way.name].whole:
                    best[way.name] = took
        return table(options, [way for way in chosen if way.name in best], best, saved, mean, shape)

    lines = measure([way for way in chosen if not way.float8])
    if options.float8:
        print("\n".join(lines), flush=True)  # before anything can go wrong with the layers that are replaced now
        use_float8(model, emulated=options.device == "cpu")
        lines = measure([way for way in chosen if way.float8])
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def _on_gpu(options: Any, took: Took, shape: ModelShape, mean: float) -> str:
    """Return MFU, tokens a second and what whole recipes would take on this GPU."""
    work = sequences([mean] * options.samples)
    work += Work(projected=options.samples * options.keep, logits=took.supervised)
    work += image(577, options.samples)
    peak = device_peak(torch.device("cuda"))
    mfu = "unknown" if peak is None else f"{flops_of(shape, work).model / took.whole / peak:.1%}"
    minutes = {name: number * took.whole / options.samples / 60 for name, number in RECIPES.items()}
    projected = ", ".join(f"{name} ({number:,} samples) {minutes[name]:.1f} min" for name, number in RECIPES.items())
    memory = f"{took.memory / 2**30:.1f} GiB at most"
    return (
        f"MFU {mfu} of the bfloat16 peak, {took.tokens / took.whole:,.0f} tokens/s, {memory}. Projected: {projected}."
    )


def _times(yardstick: Took | None, took: Took) -> str:
    """Return how many times as fast something is as a yardstick; nothing if that was not run."""
    return "" if yardstick is None else f"{yardstick.whole / took.whole:.2f}"


def table(
    options: Any, chosen: Sequence[Way], best: dict[str, Took], saved: dict[str, int], mean: float, shape: ModelShape
) -> list[str]:
    """Return the results as a Markdown table with the bars below it."""
    device = platform.processor() or platform.machine()
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    lines = [
        f"{options.shape}, {options.dtype}, {options.pruner} {options.keep} of 576, {options.samples} samples an "
        f"update, {mean:.0f} tokens a sample after pruning; {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}",
        "",
        "| way | s an update | samples/s | x stock | x earlier | LLM tokens | graph, MiB | rest | loss |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    yardsticks = [best.get(way.name) for way in ways(options.budget, options.float8)[:2]]
    for way in chosen:
        took = best[way.name]
        faster = " | ".join(_times(yardstick, took) for yardstick in yardsticks)
        lines.append(
            f"| {way.name} | {took.whole:.2f} | {options.samples / took.whole:.3f} | {faster} | {took.tokens} | "
            f"{saved[way.name] / 2**20:.0f} | {took.rest:.1%} | {took.loss:.6f} |"
        )
    last = best[chosen[-1].name]
    if options.device == "cuda":
        lines += ["", _on_gpu(options, last, shape, mean)]
    parts = ", ".join(f"{name} {took / last.whole:.1%}" for name, took in last.seconds.items())
    losses = [best[way.name].loss for way in chosen if way.engine is not None and not way.float8]
    spread = (max(losses) - min(losses)) / max(losses)
    lines += [
        "",
        f"Of the last way: {parts}. The losses of the pruned ways differ by {spread:.1e} of them.",
        f"Bars: 4 x stock {_times(yardsticks[0], last)}, 2 x earlier {_times(yardsticks[1], last)}, rest at most 5 % "
        f"{last.rest:.1%}.",
    ]
    return lines


if __name__ == "__main__":
    main()
