"""What ``prunetune list`` prints."""

from __future__ import annotations

from collections.abc import Callable


def list_pruners() -> str:
    """Return a table of methods: paper, signals, whether training goes through, how faithful they are."""
    from prunetune.pruning import registered_methods  # what is listed is imported: benchmarks need no torch

    rows = [["name", "paper", "needs", "trainable through", "status", "golden-checked"]]
    for method in registered_methods().values():
        rows.append(
            [
                method.name,
                method.paper,
                ", ".join(sorted(method.needs)) or "-",
                "yes, merges" if method.merges else "yes",
                "exact" if method.exact else "reconstruction",
                "yes" if method.golden else "no",
            ]
        )
    return _table(rows)


def list_families() -> str:
    """Return a table of model families."""
    from prunetune.pruning import registered_families

    rows = [["name", "model types", "projector", "budget per"]]
    for family in registered_families().values():
        rows.append([family.name, ", ".join(family.model_types), ", ".join(family.projectors), family.item])
    return _table(rows)


def list_recipes() -> str:
    """Return a table of data recipes with the first comment line of each."""
    from prunetune.data_recipes.recipe import recipe_file, recipe_names

    first = {name: recipe_file(name).read_text().splitlines()[0].lstrip("# ") for name in recipe_names()}
    return _table([["name", "about"], *([name, about] for name, about in first.items())])


def list_tasks() -> str:
    """Return a table of benchmarks."""
    from prunetune.evaluation.tasks import tasks

    rows = [["name", "protocol", "about"]]
    return _table(rows + [[task.name, task.protocol, task.about] for task in tasks().values()])


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


LISTS: dict[str, Callable[[], str]] = {
    "pruners": list_pruners,
    "families": list_families,
    "recipes": list_recipes,
    "tasks": list_tasks,
}
