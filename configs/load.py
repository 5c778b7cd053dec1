"""From a YAML file and ``--section.field value`` overrides to a typed configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from prunetune.errors import PrunetuneError
from prunetune.names import nearest
from prunetune.plugins import PluginError
from prunetune.reading import parse_yaml, read_yaml, shown

Config = TypeVar("Config", bound=BaseModel)
FOLDER = Path(__file__).parent
_FLAGS = {"overwrite"}
"""What may be said without a value, as of commands that have no configuration."""

_MOVED = {"train.packing": "engine.packing", "train.gradient_checkpointing": "engine.checkpointing"}
"""Keys of former releases."""


class ConfigError(PrunetuneError):
    """A configuration that can't be used; the message lists every error in it."""


def load_config(schema: type[Config], file: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read ``file``, apply overrides such as ``["--train.learning_rate", "1e-4"]`` and validate.

    Args:
        schema: the kind of configuration.
        file: a path or a shipped configuration's name; None starts from the defaults.
        overrides: command-line arguments.

    Raises:
        ConfigError: with all errors at once, each with its key, what was expected and what was got.
        PluginError: the same, where a plug-in is among them.
    """
    values: dict[str, Any] = {}
    if file is not None:
        path = config_file(file)
        values = _read(path)
        _find_plugins(values, path.parent)
    for key, value in _pairs(overrides or []):
        _put(values, key.split("."), value)
    _find_plugins(values, Path.cwd())
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, detail) for detail in error.errors()]
        source = f"{file}" if file is not None else "the command line"
        # A plug-in may fail on one rank alone, which then has to say so itself.
        causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        if file is None and any(detail["type"] == "missing" for detail in error.errors()):
            lines.append("give --config FILE, or one of the names that `prunetune configs list` prints")
        kind = PluginError if any(isinstance(cause, PluginError) for cause in causes) else ConfigError
        count = len(error.errors())
        raise kind(f"{source} has {count} error{'s' * (count > 1)}:\n" + "\n".join(lines)) from None


def sets(file: str | Path, key: str, overrides: list[str] | None = None) -> bool:
    """Return whether a configuration or an override sets a top-level key, by which its kind is told.

    Raises:
        ConfigError: if the file or an override can't be read.
    """
    return key in _read(config_file(file)) or any(name == key for name, _ in _pairs(overrides or []))


def value_of(text: str, what: str) -> Any:
    """Return what a word of the command line says, read as in a YAML file; raises ConfigError naming ``what``."""
    try:
        return parse_yaml(text, shown(text), ConfigError, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}; quote text with special characters") from None


def to_yaml(config: BaseModel) -> str:
    """Return the effective configuration, defaults included, as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML as people write it: ``2e-5`` is a number, ``off`` is a word, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            # Every key of ours is a word: a number, a date or a list would only fail somewhere further on.
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem=f"a key is a word, got {_written(key)}", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"key {key.value!r} is written twice in one section"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written(node: yaml.Node) -> str:
    return shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a section"


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configurations by name, for example ``evaluate/tiny_dense``."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def config_file(name: str | Path) -> Path:
    """Return the file of a path or, where there is none, of a shipped configuration's name.

    Raises:
        ConfigError: if there is neither, with the nearest name.
    """
    try:
        if Path(name).is_file():
            return Path(name)
    except OSError as error:  # the name is too long, or its folder may not be read
        raise ConfigError(f"config file {name} can't be read: {error.strerror}") from None
    shipped = shipped_configs()
    asked = Path(name).as_posix().removeprefix("configs/").removesuffix(".yaml")
    if asked in shipped:
        return shipped[asked]
    raise ConfigError(
        f"config file {name} does not exist, and no shipped configuration has that name{nearest(asked, shipped)}; "
        "`prunetune configs list` names them"
    )


def is_shipped(file: Path) -> bool:
    """Return whether a file lies in the package's own folder of configurations, by whatever name it was found."""
    return file.resolve().is_relative_to(FOLDER.resolve())


def _read(path: Path) -> dict[str, Any]:
    values = read_yaml(path, ConfigError, _Loader)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections and keys, but holds {type(values).__name__}")
    return values


def _find_plugins(values: dict[str, Any], folder: Path) -> None:
    """Make relative files among the plug-ins absolute, so that every rank finds the same ones."""
    plugins = values.get("plugins")
    if not isinstance(plugins, list):
        return  # missing, or an error that validation tells
    for index, plugin in enumerate(plugins):
        if isinstance(plugin, str) and plugin.endswith(".py"):
            plugins[index] = str((folder / plugin).resolve())


def _pairs(arguments: list[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; overrides are written --section.field value")
        key, equals, value = flag[2:].partition("=")
        if key in _FLAGS and not equals and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not equals:
            if not rest:
                raise ConfigError(f"override --{key} has no value; write --{key} VALUE")
            value = rest.pop(0)
        pairs.append((key, value_of(value, f"override --{key}")))
    return pairs


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override --{'.'.join(path)}: {part!r} is no section")
    values[path[-1]] = value


def _explain(schema: type[BaseModel], detail: Any) -> str:
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path)
    if detail["type"] == "extra_forbidden" and key in _MOVED:
        return f"  {key}: unknown key; it is {_MOVED[key]} now"
    if detail["type"] == "extra_forbidden":
        known = _fields(schema, path[:-1])
        hint = nearest(path[-1], known).removeprefix(", ") or f"known keys: {', '.join(known)}"
        return f"  {key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"  {key}: missing; it must be set"
    if detail["type"] == "value_error":
        return f"  {key}: {detail['ctx']['error']}" if key else f"  {detail['ctx']['error']}"
    return f"  {key}: {detail['msg'][0].lower() + detail['msg'][1:]}, got {shown(detail['input'])}"


def _fields(schema: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = schema.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)
