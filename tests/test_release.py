"""What a release rests on: one version, a section of the changelog, and workflows that name what there is."""

import re

import pytest
import yaml
from conftest import ROOT

from prunetune.scripts import release

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def repository(tmp_path):
    """Return a folder with the three files, of which one may be other."""
    said = {"pyproject.toml": '[project]\nversion = "1.2.0"\n', "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.0\n",
            "CHANGELOG.md": "## [Unreleased]\n\n- later\n\n## [1.2.0] - 2026-12-01\n\n### Added\n\n- a thing\n\n"
                            "## [1.1.0] - 2026-11-01\n\n- before\n"}  # fmt: skip

    def write(**changed):
        for file, text in said.items():
            (tmp_path / file).write_text(changed.get(file.split(".")[0], text))
        return tmp_path

    return write


def test_the_notes_are_the_section_of_the_version(repository):
    assert release.main("1.2.0", repository()) == "### Added\n\n- a thing"
    assert release.notes("## [1.2.0] - 2026-12-01\n\n- last\n", "1.2.0") == "- last"


@pytest.mark.parametrize(("version", "changed", "message"), [
    ("1.3.0", {}, "the tag says 1.3.0, pyproject.toml says 1.2.0"),
    ("1.2.0", {"CITATION": "cff-version: 1.2.0\nversion: 1.1.0\n"}, "CITATION.cff says 1.1.0"),
    ("1.2.0", {"CHANGELOG": "## [Unreleased]\n\n- a thing\n"}, r"no section '## \[1.2.0\] - YYYY-MM-DD'"),
    ("1.2.0", {"CHANGELOG": "## [1.2.0] - 2026-12-01\n\n## [1.1.0] - 2026-11-01\n\n- before\n"}, "no section"),
    ("1.2.0", {"CHANGELOG": "## [1.2.0]\n\n- a thing\n"}, "no section"),
])  # fmt: skip
def test_what_does_not_fit_stops_the_release(repository, version, changed, message):
    with pytest.raises(SystemExit, match=message):
        release.main(version, repository(**changed))


def test_the_files_of_today_say_one_version():
    assert len(set(release.versions(ROOT).values())) == 1
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_there_is(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"} and workflow["jobs"]  # more only for the job that needs it
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"run: make ([a-z ]+)", text):
        assert set(line.split()) <= targets
    for script in re.findall(r"python3? (scripts/\S+)", text) + re.findall(r"uses: \./(\S+)", text):
        assert (ROOT / script).exists()


def test_forms_and_files_of_a_project_are_there():
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())
    for file in ("SECURITY.md", "CONTRIBUTING.md", "CITATION.cff", "Dockerfile", "LICENSE"):
        assert (ROOT / file).stat().st_size > 300


def test_the_image_copies_every_package():
    """And nothing that is not there."""
    copied = set(re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert copied == folders
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in folders} <= set(ignored)
