"""The commands that README.md and the pages of docs/ show, as a shell would read them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^# needs: (.+)$", re.MULTILINE)
SHELLS = ("", "sh", "bash")


@dataclass(frozen=True)
class Shown:
    """One line of a block, whole: continued lines are one, and what stands behind ``#`` is left out.

    Attributes:
        page: where it is shown.
        line: as typed, with single spaces; a shipped configuration goes by its name.
        needs: what the block says in its first line that it needs, such as ``8 GPUs``; None runs anywhere.
    """

    page: str
    line: str
    needs: str | None

    @property
    def words(self) -> list[str]:
        """What the shell hands on, without variables that are set in front."""
        words = shlex.split(self.line)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
            del words[0]
        return words


def pages() -> list[Path]:
    """Return README.md, CONTRIBUTING.md and every page that people wrote or that a script generates."""
    found = [path for path in sorted((ROOT / "docs").rglob("*.md")) if ".pytest_cache" not in path.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *found]


def blocks(path: Path) -> list[str]:
    """Return a page's blocks that a shell would run."""
    found = []
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        indent, language, text = match.groups()
        if language in SHELLS:
            found.append("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return found


def lines(block: str) -> list[str]:
    """Return the commands of a block: ``a \\`` goes on in the next line, as an open quote or bracket does."""
    found: list[str] = []
    whole = ""
    for line in block.splitlines():
        line = re.sub(r"(^|\s+)#.*$", "", line)
        whole = f"{whole} {line.strip()}".strip()
        if whole.endswith("\\"):
            whole = whole[:-1].strip()
        elif whole and whole.count("'") % 2 == 0 and whole.count("(") == whole.count(")"):
            found.append(re.sub(r" +", " ", whole))
            whole = ""
    return found


def shown() -> list[Shown]:
    """Return all commands of all pages, with the variables that a page sets before."""
    found = []
    for path in pages():
        variables: dict[str, str] = {}
        for block in blocks(path):
            needs = NEEDS.search(block)
            for line in lines(block):
                for form, value in variables.items():
                    line = line.replace(form, value)
                line = re.sub(r"(?<=--config )configs/(\S+)\.yaml", r"\1", line)
                if assigned := re.fullmatch(r"([A-Z]+)=(.*)", line):
                    variables |= forms(*assigned.groups())
                else:
                    found.append(Shown(str(path.relative_to(ROOT)), line, needs[1] if needs else None))
    return found


def forms(name: str, value: str) -> dict[str, str]:
    """Return how a variable is written, and what the shell puts there."""
    if value.startswith("("):
        return {f'"${{{name}[@]}}"': value[1:-1]}
    plain = shlex.split(value)[0]
    return {f'"${name}"': shlex.quote(plain), f"${name}": plain}


def inline() -> list[tuple[str, str]]:
    """Return what pages say in passing between single backticks that begins with ``prunetune``, with the page."""
    found = []
    for path in pages():
        text = BLOCK.sub("", path.read_text(encoding="utf-8"))
        for line in re.findall(r"`(prunetune [a-z][^`]*)`", text):
            found.append((str(path.relative_to(ROOT)), re.sub(r"\s+", " ", line)))
    return found
