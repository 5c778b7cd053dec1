"""Papers of the methods, and the file that says how this project is cited."""

import re
import tomllib

import pytest
import yaml
from conftest import ROOT

from prunetune.pruning import registered_methods, registered_stages
from prunetune.scripts import citations

KNOWN = citations.entries(citations.BIBLIOGRAPHY.read_text())
METHODS = {name: method.paper for name, method in (registered_methods() | registered_stages()).items()}


def test_the_page_is_the_one_of_these_methods():
    """Written by ``python -m prunetune.scripts.citations``."""
    assert citations.PAGE.read_text() == citations.page(citations.BIBLIOGRAPHY.read_text())


@pytest.mark.parametrize("name", sorted(set(METHODS) - citations.OURS))
def test_the_entry_is_of_the_paper_that_the_method_names(name):
    entry = KNOWN[citations.SAME.get(name, name)]
    assert citations.field(entry, "title")
    numbers = re.findall(r"\d{4}\.\d{5}", METHODS[name])
    assert set(numbers) <= set(re.findall(r"\d{4}\.\d{5}", entry)), f"{name} is of {numbers}, its entry is another's"


def test_entries_are_whole():
    text = citations.BIBLIOGRAPHY.read_text()
    assert len(KNOWN) == text.count("\n@")
    for name, entry in KNOWN.items():
        assert entry.count("{") == entry.count("}") and entry.endswith("}"), name
    assert set(KNOWN) <= set(METHODS), set(KNOWN) - set(METHODS)


def test_the_citation_file_says_what_the_project_says():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["title"], cited["version"], cited["license"]) == ("prunetune", project["version"], project["license"])
    assert cited["cff-version"] == "1.2.0" and cited["authors"] and cited["message"]
