"""The page ``docs/citations.md``: which paper each method is of, from ``docs/citations.bib`` and the registry.

``python -m prunetune.scripts.citations`` writes it.
"""

from __future__ import annotations

import re
from pathlib import Path

from prunetune.pruning import registered_methods, registered_stages

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, BIBLIOGRAPHY = DOCS / "citations.md", DOCS / "citations.bib"

SAME = {"prumerge_plus": "prumerge", "divprune_aligned": "trimtokenator", "fps": "adaptive"}
"""Methods that a paper brings beside the one it is named for."""

OURS = {"identity", "random"}
"""What no paper brings."""

HEAD = """# Papers

Generated from the methods and [citations.bib](citations.bib) by `python -m prunetune.scripts.citations`. If you use a
method, cite its paper; "reconstruction" says that paper or code leave something open, and the method's section says
where it guesses. To cite prunetune itself: `CITATION.cff` at the top of the repository.
"""


def entries(text: str) -> dict[str, str]:
    """Return the BibTeX entries by key, as they stand in the file, a line each."""
    return {match[1]: line for line in text.splitlines() if (match := re.match(r"@\w+\{(\w+),", line))}


def field(entry: str, name: str) -> str:
    """Return a field of an entry without braces; empty where there is none."""
    match = re.search(rf"\b{name} = \{{(.*?)\}}(?:, \w+ = |\}}$)", entry)
    return re.sub(r"[{}]", "", match[1]).replace("``", '"').replace("''", '"') if match else ""


def pretty(entry: str) -> str:
    """Return an entry with a line for each field."""
    return re.sub(r", (?=(?:title|author|journal|booktitle|year|note) = \{)", ",\n  ", entry[:-1]) + ",\n}"


def page(bibliography: str) -> str:
    """Return the page: a row for each method, then the entries."""
    known = entries(bibliography)
    lines = [HEAD, "| method | paper | arXiv | |", "| --- | --- | --- | --- |"]
    exact = {name: method.exact for name, method in registered_methods().items()}
    exact |= dict.fromkeys(registered_stages(), True)
    for name, is_exact in exact.items():
        if name in OURS:
            continue
        entry = known[SAME.get(name, name)]
        number = re.search(r"arXiv:([\d.]+(?:v\d)?)", entry)
        link = f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else ""
        lines.append(f"| `{name}` | {field(entry, 'title')} | {link} | {'' if is_exact else 'reconstruction'} |")
    lines += ["", "```bibtex", "\n\n".join(pretty(known[name]) for name in sorted(known)), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(BIBLIOGRAPHY.read_text(encoding="utf-8")), encoding="utf-8")
