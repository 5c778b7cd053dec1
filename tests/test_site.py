"""The site: it builds without a warning, asks nobody for anything, and describes every public name."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

PACKAGES = ("pruning", "models", "data_recipes", "configs", "testing")


class Page(HTMLParser):
    """A page's text, and the addresses that a browser loads by itself."""

    def __init__(self, text):
        super().__init__()
        self.text, self.loads, self.ids = "", [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.ids.add(own.get("id"))
        if tag in ("script", "img", "iframe") and own.get("src"):
            self.loads.append(own["src"])
        if tag == "link" and own.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.loads.append(own["href"])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_is_built_without_a_warning(site):
    for page in (ROOT / "docs").rglob("*.md"):
        if ".pytest_cache" not in page.parts:
            place = page.relative_to(ROOT / "docs").with_suffix("")
            place = place.parent if place.name in ("index", "README") else place
            assert (site / place / "index.html").exists(), page
    assert (site / "beside" / "CHANGELOG" / "index.html").exists() and not (site / "hooks.py").exists()


def test_no_page_asks_another_site_for_anything(site):
    loads = {load for page in site.rglob("*.html") for load in Page(page.read_text()).loads}
    assert loads and not [load for load in loads if re.match(r"\w+:|//", load) and not load.startswith("data:")]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_described(site, package):
    """With its docstring, which is read and not imported: a name that moved would be a warning above."""
    page = Page((site / "api" / package / "index.html").read_text())
    names = importlib.import_module(f"prunetune.{package}").__dict__.get("__all__") or vars(
        importlib.import_module(f"prunetune.{package}")
    ).get("_HOMES")
    assert names
    missing = [name for name in names if f"prunetune.{package}.{name}" not in page.ids]
    assert not missing, f"docs/api/{package}.md has no line '::: prunetune.{package}.NAME' for {missing}"


def test_the_root_lists_its_names():
    import prunetune

    text = (ROOT / "docs" / "api" / "prunetune.md").read_text()
    assert [name for name in prunetune.__all__ if f"[`{name}`]" not in text] == []


def test_shapes_and_errors_are_on_the_page(site):
    text = Page((site / "api" / "pruning" / "index.html").read_text()).text
    assert "(B, K)" in text and "(B, L)" in text
    assert "PruningError" in text and "Raises" in text


def test_building_imports_nothing_of_ours():
    code = "import sys; sys.argv = ['mkdocs']; sys.path.insert(0, 'docs'); import hooks; "
    code += "print([name for name in sys.modules if name.split('.')[0] in ('prunetune', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
