"""Plug-ins: pruners, stages, families, signals, recipe formats, chat templates and benchmarks from outside our folders.

A plug-in is a module that registers something when it is imported. It is found in three ways: an installed package
names it in the entry-point group ``prunetune.plugins``, a configuration lists it under ``plugins:`` (a module's name or
a file), or an option names one object of it as ``package.module:Name``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from prunetune.errors import PrunetuneError

GROUP = "prunetune.plugins"


class PluginError(PrunetuneError):
    """A plug-in that can't be used; the message names it."""


@dataclass(frozen=True)
class Plugin:
    """One plug-in, as records name it.

    Attributes:
        name: of the entry point or the module, or the file's name.
        version: of the distribution that brings the module; None for a file or a folder that is on the path.
        sha256: of the module's source.
    """

    name: str
    version: str | None
    sha256: str


_LOADED: dict[str, Plugin] = {}  # by module
_SEARCHED = False


def load_plugins(names: Sequence[str], beside: Path | None = None) -> list[Plugin]:
    """Import plug-ins; what they register is known from then on. One that is loaded already stays as it is.

    Args:
        names: modules such as ``my_package.norm``, or files such as ``./norm.py``.
        beside: folder that relative files are looked for in; None is the working directory.

    Raises:
        PluginError: for one that can't be imported, or registers what it may not.
    """
    return [_load(name, name, beside=beside) for name in names]


def load_installed() -> None:
    """Import what installed packages offer in the group ``prunetune.plugins``, once.

    Raises:
        PluginError: as :func:`load_plugins`; the package to mend or to uninstall is named.
    """
    global _SEARCHED
    if _SEARCHED:
        return
    _SEARCHED = True  # before they are imported: a plug-in may ask a registry what there is
    for point in metadata.entry_points(group=GROUP):
        _load(point.value, point.name, version=point.dist.version if point.dist is not None else None)


def loaded_plugins() -> list[Plugin]:
    """Return every plug-in that is loaded, by name."""
    return sorted(_LOADED.values(), key=lambda plugin: plugin.name)


def plugin_records() -> list[dict[str, Any]]:
    """Return what records say of the plug-ins that are loaded, but for those that come with this package."""
    outside = [plugin for module, plugin in _LOADED.items() if not module.startswith("prunetune.")]
    return [asdict(plugin) for plugin in sorted(outside, key=lambda plugin: plugin.name)]


def named(reference: str) -> Any:
    """Return the object that ``package.module:Name`` names.

    Raises:
        PluginError: if the module can't be imported or has no such name.
    """
    module, _, name = reference.partition(":")
    _load(module, module)
    found = getattr(sys.modules[module], name, None)
    if found is None:
        raise PluginError(f"{reference!r}: module {module} has no {name!r}")
    return found


def import_folder(package: ModuleType) -> None:
    """Import every module of a package of ours, so that all of them have registered."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def _load(target: str, name: str, version: str | None = None, beside: Path | None = None) -> Plugin:
    """Import one module or file, under the module's name that others import it by, and remember it."""
    is_file = target.endswith(".py")
    path = (beside or Path.cwd()) / target if is_file else None
    key = _module_name(path) if path is not None else target.partition(":")[0]
    if key in _LOADED:
        return _LOADED[key]
    try:
        module = _import_file(key, path) if path is not None else importlib.import_module(key)
    except PrunetuneError as error:  # it registers a taken name, or something that breaks the contract
        raise PluginError(f"plug-in {name!r}: {error}") from error
    except Exception as error:  # whatever its code does at import; the user needs to know whose fault it is
        raise PluginError(f"plug-in {name!r} can't be imported: {_reason(error)}") from error
    source = Path(module.__file__ or "")
    digest = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
    shown = source.name if is_file else name
    if version is None and not is_file:
        version = _version_of(key)
    _LOADED[key] = Plugin(shown, version, digest)
    return _LOADED[key]


def _module_name(path: Path) -> str:
    """Return the module's name of a file, another one for each file of the same name."""
    return f"prunetune_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PluginError(f"the file {path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _version_of(module: str) -> str | None:
    """Return the version of the distribution that a module belongs to."""
    found = metadata.packages_distributions().get(module.partition(".")[0], [])
    return metadata.version(found[0]) if found else None


def _reason(error: Exception) -> str:
    """Return what went wrong in one line."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; install it, put its folder on PYTHONPATH, or give the path of its .py file"
    return f"{type(error).__name__}: {text}"
