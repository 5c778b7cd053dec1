"""The page of errors quotes lines that the source can print, and says nothing of others."""

import ast
import re

from conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("configs", "data_recipes", "evaluation", "models", "pruning", "prunetune", "scripts", "serving", "train")


def messages() -> list[str]:
    """Return every text of the source; what is put in stands as NUL."""
    found = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted() -> list[str]:
    """Return the first column of the tables about our own errors."""
    own = PAGE.read_text().partition("## What other libraries say")[0]
    rows = re.findall(r"^\| `(.+?)` \|", own, re.MULTILINE)
    assert len(rows) > 60
    return rows


def pieces(line: str) -> list[str]:
    """Return what stands between the places that names and numbers are put in."""
    return [part for part in re.split(r"\.\.\.", line) if re.search(r"\w", part)]


def test_every_line_is_one_that_the_source_prints():
    known = messages()
    for line in quoted():
        pattern = re.compile(".*?\0.*?".join(map(re.escape, pieces(line))), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"nothing prints: {line}"


def test_a_line_that_is_not_printed_is_seen():
    assert not any("no such error is printed anywhere" in text for text in messages())
    assert pieces("keep=... is no budget; write ...") == ["keep=", " is no budget; write "]
