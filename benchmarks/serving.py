"""Requests a second of `prunetune serve`, dense beside pruned in every round: does pruning help under load?

    OMP_NUM_THREADS=1 python benchmarks/serving.py

Each arm is a server in a process of its own; one is asked at a time, by clients in this process that ask again when
they have their answer. Every round asks each arm once at each number of requests in flight, each arm first as often as
any other; the table has medians over rounds, and the median of the rounds' ratios to dense.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import httpx

from prunetune.tiny_world.images import SceneImages
from prunetune.tiny_world.task import read_items

ARMS = {
    "dense, 144 tokens": ("identity", "100%"),
    "fastervlm, 16": ("fastervlm", "16"),
    "divprune, 16": ("divprune", "16"),
    "divprune, 72": ("divprune", "72"),
}
DENSE = "dense, 144 tokens"
IN_FLIGHT = {1: 48, 16: 192, 64: 256}
"""Requests of a round by how many are in flight."""


@dataclass
class Measured:
    """What was measured of one arm at one number of requests in flight, a number a round."""

    rates: list[float] = field(default_factory=list)
    half: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)


def start(model: str, pruner: str, keep: str, most: int) -> tuple[subprocess.Popen[str], str]:
    """Start a server and return it with its address."""
    line = [
        sys.executable,
        "-m",
        "prunetune",
        "serve",
        "--model.path",
        model,
        "--model.dtype",
        "float32",
        "--port",
        "0",
    ]
    line += ["--pruning.pruner", pruner, "--pruning.keep", keep, "--name", "served", "--batching.max_batch", str(most)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for said in process.stdout:
        if found := re.search(r"(http://\S+)/v1", said):
            return process, found[1]
    raise SystemExit(f"{pruner} did not start")


def bodies(count: int, tokens: int) -> list[dict]:
    """Return requests about the toy world's test questions."""
    images, made = SceneImages(), []
    for item in read_items("test", count // 8 + 1)[:count]:
        file = io.BytesIO()
        images.open(str(item.image), item.id).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.question}]
        made.append({"model": "served", "messages": [{"role": "user", "content": content}], "max_tokens": tokens})
    return made


async def load(url: str, asked: list[dict], in_flight: int) -> tuple[float, list[float]]:
    """Ask everything with so many requests in flight; return seconds in all, and of each."""
    todo, waits = iter(asked), []
    limits = httpx.Limits(max_connections=in_flight)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def ask() -> None:
            for body in todo:
                began = time.perf_counter()
                reply = await client.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                waits.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(in_flight)))
        return time.perf_counter() - began, waits


def batches(url: str) -> tuple[float, float]:
    """Return how many batches there were, and how many requests in them."""
    text = httpx.get(f"{url}/metrics").text
    found = [re.search(rf"^prunetune_batch_size_{kind} (\S+)", text, re.M) for kind in ("count", "sum")]
    count, total = (float(one[1]) if one else 0.0 for one in found)
    return count, total


def measure(url: str, asked: list[dict], in_flight: int, into: Measured) -> None:
    """Measure one arm once."""
    before = batches(url)
    seconds, waits = asyncio.run(load(url, asked, in_flight))
    after = batches(url)
    ranked = sorted(waits)
    into.rates.append(len(asked) / seconds)
    into.half.append(statistics.median(ranked))
    into.most.append(ranked[int(0.95 * len(ranked))])
    into.batches.append((after[1] - before[1]) / (after[0] - before[0]))


def table(found: dict[tuple[str, int], Measured]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| arm | in flight | requests/s | x dense | p50 ms | p95 ms | batch |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for in_flight in IN_FLIGHT:
        dense = found[DENSE, in_flight]
        for arm in ARMS:
            own = found[arm, in_flight]
            ratio = statistics.median(a / b for a, b in zip(own.rates, dense.rates, strict=True))
            cells = [arm, str(in_flight), f"{statistics.median(own.rates):.0f}", f"{ratio:.2f}",
                     f"{1000 * statistics.median(own.half):.0f}", f"{1000 * statistics.median(own.most):.0f}",
                     f"{statistics.median(own.batches):.1f}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/tiny_vlm")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=6, help="longest answer")
    options = parser.parse_args()
    asked = bodies(max(IN_FLIGHT.values()), options.tokens)
    servers = {arm: start(options.model, *how, options.max_batch) for arm, how in ARMS.items()}
    try:
        found = {(arm, in_flight): Measured() for arm in ARMS for in_flight in IN_FLIGHT}
        for arm in ARMS:  # warm-up
            asyncio.run(load(servers[arm][1], asked[:64], 16))
        for number in range(options.rounds):
            order = [*list(ARMS)[number % len(ARMS) :], *list(ARMS)[: number % len(ARMS)]]
            for in_flight, count in IN_FLIGHT.items():
                for arm in order:
                    measure(servers[arm][1], asked[:count], in_flight, found[arm, in_flight])
        print(table(found))
    finally:
        for process, _ in servers.values():
            process.terminate()


if __name__ == "__main__":
    main()
