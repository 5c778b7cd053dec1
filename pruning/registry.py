"""Which pruning methods exist. A method is one file, here or in a plug-in, that registers one frozen dataclass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from prunetune.names import nearest
from prunetune.plugins import import_folder, load_installed, named
from prunetune.pruning.errors import PruningError
from prunetune.pruning.fitting import Fit, Report, check_fits
from prunetune.pruning.signals import signal_of
from prunetune.pruning.types import Pruner
from prunetune.reading import shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter


@dataclass(frozen=True)
class Method:
    """A registered method: the class that holds its options, and what ``prunetune list pruners`` says of it."""

    name: str
    paper: str
    pruner: type[Pruner]
    merges: bool = False
    exact: bool = True
    golden: bool = False
    video: bool = False
    servable: bool = True
    fits: Sequence[Fit] = ()
    reports: Sequence[Report] = ()

    @property
    def needs(self) -> frozenset[str]:
        """Signals the method reads beside the features, with its default options."""
        return self.pruner().needs


_METHODS: dict[str, Method] = {}


def register_pruner(
    name: str,
    *,
    paper: str,
    merges: bool = False,
    exact: bool = True,
    golden: bool = False,
    video: bool = False,
    servable: bool = True,
    fits: Sequence[Fit] = (),
    reports: Sequence[Report] = (),
) -> Callable[[Any], Any]:
    """Register a frozen dataclass as the method ``name``.

    Args:
        name: lower-case name of the command line.
        paper: the paper, with its arXiv number where there is one.
        merges: whether the selection carries merged features.
        exact: False for a reconstruction: no code was published, and the paper leaves steps open.
        golden: whether ``scripts/check_golden.py`` compares it with answers of the published code.
        video: whether it compares the frames of a video: it is given whole clips, whatever the budget counts for.
        servable: whether an engine can serve it with default options: it is known before an image is encoded how many
            tokens are kept, so that a prompt can be written with as many placeholders, and the LLM is given nothing
            but their embeddings.
        fits: the options that belong to the model and not to the method; ``prunetune calibrate`` fits them.
        reports: what it tells about the method's choices besides.

    Raises:
        PruningError: if the name is taken or not lower-case, the class is no frozen dataclass, it needs an unknown
            signal, or what is to be fitted is none of its options.
    """

    def register(pruner: Any) -> Any:
        if name != name.lower() or not name.isidentifier():
            raise PruningError(f"a method's name is a lower-case identifier, got {name!r}")
        if name in _METHODS:
            raise PruningError(
                f"two methods are called {name!r}: {_METHODS[name].pruner.__module__} and "
                f"{pruner.__module__}; rename one"
            )
        check_contract(name, pruner)
        check_fits(name, pruner, fits)
        _METHODS[name] = Method(
            name, paper, pruner, merges, exact, golden, video, servable, tuple(fits), tuple(reports)
        )
        return pruner

    return register


def registered_methods() -> Mapping[str, Method]:
    """Return all methods by name, alphabetically: those of ``pruning/methods/`` and of plug-ins."""
    import prunetune.pruning.methods as package

    import_folder(package)
    load_installed()
    return dict(sorted(_METHODS.items()))


def method_of(name: str) -> Method:
    """Return the method of a name, or of a class that ``package.module:Class`` names, registered or not.

    Raises:
        PruningError: if there is none, with the nearest name, or the class breaks the contract.
        PluginError: if its module can't be imported.
    """
    if ":" in name:
        return _method_of_class(name)
    known = registered_methods()
    if name not in known:
        raise PruningError(f"unknown pruner {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def _method_of_class(reference: str) -> Method:
    pruner = named(reference)
    for method in registered_methods().values():
        if method.pruner is pruner:
            return method
    check_contract(reference, pruner)
    return Method(
        reference,
        "not registered",
        pruner,
        merges=bool(getattr(pruner, "merges", False)),
        video=bool(getattr(pruner, "video", False)),
        servable=bool(getattr(pruner, "servable", True)),
    )


def check_contract(name: str, pruner: Any) -> None:
    """Check what can be told of a pruner's class without running it; :mod:`prunetune.testing` runs it.

    Raises:
        PruningError: if it is no frozen dataclass that can be called, or needs an unknown signal.
    """
    parameters = getattr(pruner, "__dataclass_params__", None)
    if not isinstance(pruner, type) or parameters is None or not parameters.frozen:
        shown = getattr(pruner, "__name__", repr(pruner))
        raise PruningError(f"{shown} must be a frozen dataclass: its fields are the method's options")
    if not hasattr(pruner, "needs"):
        raise PruningError(f"{pruner.__name__} must say in `needs` which signals it reads; frozenset() is none")
    for need in pruner().needs:
        try:
            signal_of(need)
        except PruningError as error:
            raise PruningError(f"{name} needs {need!r}: {error}") from None
    if "__call__" not in dir(pruner):
        raise PruningError(f"{pruner.__name__} must be called with (tokens, keep), as Pruner says")


def build_pruner(name: str, options: Mapping[str, Any] | None = None) -> Pruner:
    """Return the method ``name`` with ``options`` (fields of its dataclass; the rest are the paper's defaults).

    Raises:
        PruningError: for an unknown method or option, with the nearest valid name, or a value of another type.
    """
    pruner = method_of(name).pruner
    valid = [field.name for field in fields(pruner)]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in valid:
            raise PruningError(
                f"pruner {name!r} has no option {option!r}{nearest(option, valid)}; it has {', '.join(valid) or 'none'}"
            )
    if options:
        _check_types(name, pruner, options)
    return pruner(**(options or {}))


def _check_types(name: str, pruner: type[Pruner], options: Mapping[str, Any]) -> None:
    """Check values against the annotations of the dataclass's fields: an int is a float, text is neither."""
    # Here: methods import this module, and neither they nor `import prunetune` should wait for pydantic.
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        annotations = get_type_hints(pruner)
    except NameError:  # of an outside class, whose types are imported for type checkers alone; it checks them itself
        return
    for option, value in options.items():
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(annotations[option], config=ConfigDict(allow_inf_nan=False))
        except PydanticUserError:  # an outside class's own type
            continue
        if not _fits(adapter, value):
            raise PruningError(
                f"option {option!r} of pruner {name!r} takes {_type_name(annotations[option])}, got {shown(value)}"
            )


def _fits(adapter: TypeAdapter[Any], value: Any) -> bool:
    """Return whether a value is of a type as it is, or as JSON: YAML has no tuples, so a list is as good as one."""
    try:
        adapter.validate_python(value, strict=True)
    except ValueError:  # pydantic's ValidationError among them
        try:
            adapter.validate_json(json.dumps(value), strict=True)
        except (ValueError, TypeError):
            return False
    return True


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def merges(name: str, pruner: Pruner) -> bool:
    """Return whether a method may return merged features; where its options decide, its ``merges`` says so."""
    return bool(getattr(pruner, "merges", method_of(name).merges))


def servable(name: str, pruner: Pruner) -> bool:
    """Return whether an engine can serve a method; where its options decide, its ``servable`` says so."""
    return bool(getattr(pruner, "servable", method_of(name).servable))
