"""A pytest plugin that writes down what of the families' identity suite passed.

``python -m pytest -p prunetune.testing.report --families-report FILE`` runs that suite alone and writes one record per
test, also under pytest-xdist: tests carry what they are of in their reports, which the workers send to the controller.
``python -m prunetune.scripts.families FILE`` makes a page of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--families-report``."""
    about = "run the families' identity suite alone, and write what passed to this JSON file"
    parser.addoption("--families-report", metavar="FILE", help=about)


def pytest_configure(config: pytest.Config) -> None:
    """Begin a report, where one was asked for and this process is no worker."""
    path = config.getoption("--families-report")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FamiliesReport(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Leave out whatever is no test of the suite."""
    if not config.getoption("--families-report"):
        return
    others = [item for item in items if not getattr(item.cls, "in_report", False)]
    items[:] = [item for item in items if getattr(item.cls, "in_report", False)]
    config.hook.pytest_deselected(items=others)


class FamiliesReport:
    """Collects one record per test and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome of a test, or of a setup that failed."""
        said = dict(report.user_properties)
        if "family" not in said or (report.when != "call" and not report.failed):
            return
        name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
        self.records.append(
            {
                "family": said["family"],
                "modality": said["modality"],
                "methods": said["methods"],
                "test": report.nodeid.rpartition("::")[0],
                "check": name.removeprefix("test_"),
                "of": parameters.removesuffix("]"),
                "outcome": report.outcome,
            }
        )

    def pytest_sessionfinish(self) -> None:
        """Write the records, sorted: workers finish in any order."""
        records = sorted(self.records, key=lambda record: [str(value) for value in record.values()])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(records, indent=1) + "\n")
