"""Chat templates by name: the model's own, those of ``data_recipes/templates/``, those of plug-ins, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.data_recipes.sample import DataError
from prunetune.names import nearest
from prunetune.plugins import load_installed
from prunetune.reading import read_text

MODELS_OWN = "model"
V1 = "vicuna_v1"
"""LLaVA's v1 prompt, which is built by segments."""
_TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def register_template(name: str, file: str | Path) -> None:
    """Make a Jinja chat template known by a name.

    Args:
        name: what ``model.template`` calls it.
        file: the template. What the assistant says stands between ``{% generation %}`` marks, end token included.

    Raises:
        DataError: if the name is taken, or there is no such file.
    """
    path = Path(file)
    if name == MODELS_OWN or _TEMPLATES.get(name, path) != path:
        raise DataError(f"two chat templates are called {name!r}; rename one")
    if not path.is_file():
        raise DataError(f"chat template {name!r}: the file {path} does not exist")
    _TEMPLATES[name] = path


def registered_templates() -> dict[str, Path]:
    """Return all templates but the models' own, by name."""
    load_installed()
    return dict(sorted(_TEMPLATES.items()))


def template_file(name: str) -> Path:
    """Return the file of a template's name, or of a path that ends in ``.jinja``.

    Raises:
        DataError: if there is none, with the nearest name.
    """
    if name.endswith(".jinja"):
        if Path(name).is_file():
            return Path(name)
        raise DataError(f"chat template {name} does not exist; model.template is a file or one of {_names()}")
    known = registered_templates()
    if name not in known:
        raise DataError(f"unknown template {name!r}{nearest(name, known)}; there are {_names()}, or a .jinja file")
    return known[name]


def template_text(processor: Any, name: str) -> str:
    """Return a chat template's source.

    Args:
        processor: the model's Hugging Face processor, which has the template called "model".
        name: see :func:`template_file`.

    Raises:
        DataError: for an unknown name, or a processor without a template.
    """
    if name != MODELS_OWN:
        return read_text(template_file(name), DataError)
    if not processor.chat_template:
        raise DataError("this processor has no chat template; set model.template, for example to vicuna_v1")
    return processor.chat_template


def check_marks(template: str) -> None:
    """Check that a template marks what the assistant says; training needs it, prompting does not.

    Raises:
        DataError: naming the templates that do.
    """
    if "{% generation %}" not in template and "{%- generation" not in template:
        raise DataError(
            "the model's chat template has no {% generation %} marks around the assistant's text, so answers can't be "
            f"told from questions; set model.template to a template that has them ({', '.join(registered_templates())})"
        )


def _names() -> str:
    return ", ".join([MODELS_OWN, *registered_templates()])
