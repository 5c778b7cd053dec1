"""Commands whose options are the fields of a configuration's schema."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false", dict: "YAML", list: "YAML"}


@dataclass(frozen=True)
class SchemaOption:
    """One option of a schema.

    Attributes:
        flag: as it is written, ``--section.field``.
        type: what it takes, in words.
        default: in YAML, or None where it must be set.
        about: what it means.
    """

    flag: str
    type: str
    default: str | None
    about: str

    @property
    def section(self) -> str:
        """The part before the dot; empty for options without a section."""
        name = self.flag.removeprefix("--")
        return name.partition(".")[0] if "." in name else ""


def schema_options(schema: type[BaseModel], prefix: str = "--") -> list[SchemaOption]:
    """Return every option of a schema, sections opened, in its order."""
    found = []
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += schema_options(inner, f"{prefix}{name}.")
        else:
            found.append(SchemaOption(f"{prefix}{name}", _type(field), _default(field), field.description or ""))
    return found


class SchemaCommand(click.Command):
    """A command that takes ``--config FILE`` and ``--section.field value`` for every field of a schema.

    Its function is called with ``config``, the file or None, ``overrides``, the other arguments as they are written,
    and its own options. Overrides are read by :func:`prunetune.configs.load_config`, together with the file, so that
    all errors are told at once; help, the reference page and completion come from the schema.
    """

    def __init__(self, name: str, schema: type[BaseModel], **options: Any) -> None:
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        super().__init__(name, context_settings=settings, **options)
        self.schema = schema

    def invoke(self, context: click.Context) -> Any:
        """Call the function; what no option of its own took are overrides."""
        context.params["overrides"] = context.args
        return super().invoke(context)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, then the schema's, section by section."""
        super().format_options(context, formatter)
        own = self._own_flags()
        for section, found in by_section(self.schema):
            options = [option for option in found if option.flag not in own]  # one is told of once
            if not options:
                continue
            with formatter.section(section or "Configuration"):
                formatter.write_dl([(f"{option.flag} {option.type}", _told(option)) for option in options], col_max=44)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the schema's options as well."""
        own = super().shell_complete(context, incomplete)
        if not incomplete.startswith("-"):
            return own
        taken = self._own_flags()
        known = (option for option in schema_options(self.schema) if option.flag.startswith(incomplete))
        return own + [CompletionItem(option.flag, help=option.about) for option in known if option.flag not in taken]

    def _own_flags(self) -> set[str]:
        """Return the options of the command's own, which stand before the schema's of the same name."""
        return {flag for option in self.params for flag in option.opts}


def by_section(schema: type[BaseModel]) -> Iterator[tuple[str, list[SchemaOption]]]:
    """Yield each section with its options; options without one come last."""
    options = schema_options(schema)
    sections = list(dict.fromkeys(option.section for option in options))
    for section in sorted(sections, key=lambda name: name == ""):
        yield section, [option for option in options if option.section == section]


def config_option(required: bool = False) -> Any:
    """Return the option ``--config``."""
    about = "YAML file, or a name from `prunetune configs list`"
    return click.Option(["--config"], metavar="FILE", required=required, help=about)


def _told(option: SchemaOption) -> str:
    default = "in the file or here: required" if option.default is None else f"default: {option.default}"
    return f"{option.about}  [{default}]"


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value, default=_as_written)


def _as_written(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(exclude_defaults=True)


def _type(field: FieldInfo) -> str:
    """Return what a field takes: a choice, or a word with its bounds."""
    text = _type_text(field.annotation)
    bounds = []
    for constraint in field.metadata:
        for sign, name in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
            if getattr(constraint, name, None) is not None:
                bounds.append(f"{sign}{getattr(constraint, name)}")
    return f"{text} {', '.join(bounds)}" if bounds else text


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join("null" if part is type(None) else _type_text(part) for part in arguments)
    return _WORDS.get(origin or annotation, "TEXT")
