"""The documentation names what exists: every method with every option, every page in the navigation."""

import re
from dataclasses import fields

import pytest
from conftest import ROOT

from prunetune.pruning import registered_methods, registered_stages

PAGES = {path: path.read_text() for path in sorted((ROOT / "docs" / "pruners").glob("*.md"))}


@pytest.mark.parametrize("name", registered_methods())
def test_every_method_has_a_section_with_all_its_options(name):
    sections = [
        section
        for text in PAGES.values()
        for section in re.split(r"^## ", text, flags=re.MULTILINE)
        if section.split("\n")[0] == name
    ]
    assert len(sections) == 1, f"docs/pruners/ has {len(sections)} sections called {name}"
    method = registered_methods()[name]
    for option in fields(method.pruner):
        assert f"`{option.name}`" in sections[0], f"the section of {name} does not name its option {option.name}"
    assert ("Golden-checked" in sections[0]) == method.golden
    assert ("reconstruction" in sections[0]) == (not method.exact)


@pytest.mark.parametrize("name", registered_stages())
def test_every_stage_has_a_section_with_all_its_options(name):
    text = PAGES[ROOT / "docs" / "pruners" / "stages.md"]
    (section,) = [part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.split("\n")[0] == name]
    for option in fields(registered_stages()[name].stage):
        assert f"`{option.name}`" in section
    assert "Differs from the published code" in section


def test_links_and_navigation_lead_somewhere():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [path for path in (ROOT / "docs").rglob("*.md") if ".pytest_cache" not in path.parts]
    for path in pages:
        assert str(path.relative_to(ROOT / "docs")) in navigation
    for path in [*pages, ROOT / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.name} links to {link}, which is not there"


def test_readme_names_every_method():
    text = (ROOT / "README.md").read_text()
    assert [name for name in registered_methods() if f"`{name}`" not in text] == []


def test_the_code_of_the_plugin_page_is_that_of_the_examples():
    """Which are run by tests/test_plugins.py."""
    page = (ROOT / "docs" / "adding.md").read_text()
    for file in ("my_pruning/norm.py", "my_pruning/colours.py", "tests/test_norm.py"):
        assert f"```python\n{(ROOT / 'docs' / 'examples' / file).read_text()}```" in page, file
