"""Which stages exist. A stage is one file, here or in a plug-in, that registers one frozen dataclass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from prunetune.names import nearest
from prunetune.plugins import import_folder, load_installed, named
from prunetune.pruning.errors import PruningError
from prunetune.pruning.stages.base import Stage
from prunetune.reading import shown


@dataclass(frozen=True)
class StageMethod:
    """A registered stage: the class that holds its options."""

    name: str
    paper: str
    stage: type[Stage]


_STAGES: dict[str, StageMethod] = {}


def register_stage(name: str, *, paper: str) -> Callable[[Any], Any]:
    """Register a frozen dataclass, based on :class:`Stage`, as the stage ``name``.

    Raises:
        PruningError: if the name is taken or not lower-case, or the class is no such dataclass.
    """

    def register(stage: Any) -> Any:
        if name != name.lower() or not name.isidentifier():
            raise PruningError(f"a stage's name is a lower-case identifier, got {name!r}")
        if name in _STAGES:
            raise PruningError(
                f"two stages are called {name!r}: {_STAGES[name].stage.__module__} and {stage.__module__}; rename one"
            )
        check_stage(stage)
        _STAGES[name] = StageMethod(name, paper, stage)
        return stage

    return register


def check_stage(stage: Any) -> None:
    """Check that a class is a frozen dataclass based on :class:`Stage`; raises PruningError."""
    parameters = getattr(stage, "__dataclass_params__", None)
    is_stage = isinstance(stage, type) and issubclass(stage, Stage)
    if not is_stage or parameters is None or not parameters.frozen:
        told = getattr(stage, "__name__", repr(stage))
        raise PruningError(f"{told} must be a frozen dataclass based on Stage: its fields are the stage's options")


def registered_stages() -> Mapping[str, StageMethod]:
    """Return all stages by name, alphabetically: those of ``pruning/stages/methods/`` and of plug-ins."""
    import prunetune.pruning.stages.methods as package

    import_folder(package)
    load_installed()
    return dict(sorted(_STAGES.items()))


def stage_class(name: str) -> type[Stage]:
    """Return the class of a stage's name, or of one that ``package.module:Class`` names, registered or not.

    Raises:
        PruningError: if there is none, with the nearest name.
        PluginError: if its module can't be imported.
    """
    if ":" in name:
        stage = named(name)
        check_stage(stage)
        return stage  # type: ignore[no-any-return] # checked
    known = registered_stages()
    if name not in known:
        raise PruningError(f"unknown stage {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name].stage


def build_stage(name: str, options: Mapping[str, Any] | None = None) -> Stage:
    """Return the stage ``name`` with ``options`` (fields of its dataclass; the rest are the paper's defaults).

    Raises:
        PruningError: for an unknown stage or option, with the nearest valid name, or a value of another type.
    """
    stage = stage_class(name)
    valid = [field.name for field in fields(stage)]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in valid:
            raise PruningError(
                f"stage {name!r} has no option {option!r}{nearest(option, valid)}; it has {', '.join(valid) or 'none'}"
            )
    if options:
        _check_types(name, stage, options)
    return stage(**(options or {}))


def _check_types(name: str, stage: type[Stage], options: Mapping[str, Any]) -> None:
    """Check values against the annotations of the dataclass's fields."""
    # Here: stages import this module, and should not wait for pydantic.
    from pydantic import ConfigDict, TypeAdapter

    annotations = get_type_hints(stage)
    for option, value in options.items():
        adapter: TypeAdapter[Any] = TypeAdapter(annotations[option], config=ConfigDict(allow_inf_nan=False))
        try:
            adapter.validate_json(json.dumps(value), strict=True)
        except (ValueError, TypeError):
            raise PruningError(
                f"option {option!r} of stage {name!r} takes {annotations[option]}, got {shown(value)}"
            ) from None
