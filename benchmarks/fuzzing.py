"""Good files with a few bytes or values changed at random, as commands read them: for ``benchmarks/reliability.py``."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bad_inputs import KINDS, Kind, Outcome, World, try_case
from bad_inputs import Case as BadCase

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    10**30,
    "",
    "x" * 300,
    "\0",
    "\ud800",
    "..",
    [],
    {},
    [[]],
    {"a": 1},
]
"""Values that a field may turn into."""
SPICE = [
    b"\x00",
    b"\xff",
    b"{",
    b"]",
    b'"',
    b"\n",
    b"\t",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!",
    b"1e999",
    b"\\ud800",
    b"<image>",
]


def mutated(content: bytes, generator: random.Random) -> bytes:
    """Return content with one to three random changes of its bytes."""
    data = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        position = generator.randrange(len(data) + 1)
        way = generator.randrange(5)
        if way == 0 and data:  # a bit
            data[min(position, len(data) - 1)] ^= 1 << generator.randrange(8)
        elif way == 1:  # cut short
            del data[position:]
        elif way == 2:  # a piece is lost
            del data[position : position + generator.randint(1, 40)]
        elif way == 3:  # a piece is there twice
            data[position:position] = data[position : position + generator.randint(1, 40)]
        else:
            data[position:position] = generator.choice(SPICE)
    return bytes(data)


def retyped(value: Any, generator: random.Random) -> Any:
    """Return JSON content with one value of another type, or one key lost."""
    nodes = list(_nodes(value))
    if not nodes:
        return generator.choice(ODD)
    parent, key = generator.choice(nodes)
    if generator.random() < 0.2:
        del parent[key]
    else:
        parent[key] = generator.choice(ODD)
    return value


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with the key or index of each of its values."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _nodes(inner)


def changed(file: Path, generator: random.Random) -> None:
    """Change a file: its values where it holds JSON or YAML, in every second case, else its bytes."""
    content = file.read_bytes()
    if file.suffix in (".json", ".jsonl", ".yaml") and generator.random() < 0.5:
        file.write_text(_with_other_values(content.decode(), file.suffix, generator))
    else:
        file.write_bytes(mutated(content, generator))


def _with_other_values(text: str, suffix: str, generator: random.Random) -> str:
    import yaml

    if suffix == ".yaml":
        return json.dumps(retyped(yaml.safe_load(text), generator))  # JSON is YAML
    if suffix == ".json":
        return json.dumps(retyped(json.loads(text), generator))
    lines = text.splitlines()
    number = generator.randrange(len(lines))
    lines[number] = json.dumps(retyped(json.loads(lines[number]), generator))
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Configurations that are still good after a change start no run, and write nowhere."""
    with (
        mock.patch("prunetune.scripts.launch.launch", lambda *_: 0),
        mock.patch("prunetune.scripts.tracked.tracked_evaluate", lambda config, arm=None: Path(config.output)),
        mock.patch("prunetune.cli.commands.evaluate.libraries_in", lambda file: contextlib.nullcontext()),
    ):
        yield


def fuzz_one(world: World, kind: Kind, folder: Path, seed: int) -> Outcome:
    """Change one file of a kind by a seed, and run its command."""

    def make(own: Path) -> list[str]:
        file, line = kind.copied(world, own)
        changed(file, random.Random(f"{kind.name} {seed}"))
        return line

    with nothing_runs():
        outcome = try_case(BadCase(kind.name, make), folder)
    if outcome.verdict != "TRACEBACK":  # what broke is kept, to be looked at
        shutil.rmtree(folder)
    return outcome


def fuzz(world: World, folder: Path, number: int, seed: int) -> list[str]:
    """Run ``number`` changed files, kind by kind in turn, and return the lines of the report."""
    found: dict[str, Counter[str]] = {kind.name: Counter() for kind in KINDS}
    for index in range(number):
        kind = KINDS[index % len(KINDS)]
        outcome = fuzz_one(world, kind, folder / f"fuzz{index}", seed + index)
        found[kind.name][outcome.verdict] += 1
        if outcome.verdict == "TRACEBACK":
            print(f"TRACEBACK: {kind.name}, seed {seed + index}\n{outcome.text}")
    lines = []
    for name, verdicts in found.items():
        # Accepted: the change left a file that is as good as before, such as another word in a question.
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())).replace(
            "accepted", "fine"
        )
        lines.append(f"| fuzzed: {name} | {sum(verdicts.values())} | {told} |")
    return lines
