"""What mkdocs does beside its configuration: shows the API reader our folders, and follows links out of ``docs/``.

Everything is imported from one root, ``prunetune``, whose folders lie beside one another at the top of the repository.
The reader of docstrings (griffe) reads files and imports nothing, so it is given a folder of links under that one root,
as ``make types`` gives one to mypy.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "assets/tiny_vlm/README.md", "assets/hard_vlm/README.md")
"""Pages of the site that lie outside ``docs/``, since readers of a checkout look for them there."""

_links: tempfile.TemporaryDirectory[str] | None = None


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give the API reader a folder of links to ours."""
    global _links
    _links = tempfile.TemporaryDirectory(prefix="prunetune-api-")
    package = Path(_links.name) / "prunetune"
    package.mkdir()
    for path in _parts():
        (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_links.name]
    return config


def _parts() -> list[Path]:
    """Return what stands below the one root: the files and folders of ``prunetune/``, and our other packages."""
    own = [path for path in (ROOT / "prunetune").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    folders = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "prunetune"]
    return own + folders


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside ``docs/``."""
    for name in BESIDE:
        files.append(
            File.generated(config, f"beside/{name}", content=_moved((ROOT / name).read_text(encoding="utf-8")))
        )
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Lead links such as ``../CONTRIBUTING.md`` to those pages."""
    up = "../" * page.file.src_uri.count("/")  # type: ignore[attr-defined]
    for name in BESIDE:
        markdown = re.sub(rf"\]\(\.\./{re.escape(up)}{re.escape(name)}", f"]({up}beside/{name}", markdown)
    return markdown


def _moved(text: str) -> str:
    """Return a page of the repository's top with its links to ``docs/`` as they are from ``beside/``."""
    return re.sub(r"\]\(docs/", "](../", text)


def on_post_build(config: MkDocsConfig) -> None:
    """Take the links away."""
    if _links is not None:
        _links.cleanup()
