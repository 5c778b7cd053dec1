"""The chain of seals: from the base to the results, every link is a hash, made when written and checked when used.

Records (``prunetune.json`` of adapters and exports) and manifests (``manifest.json`` of arms) hold the hashes under the
names of :data:`CHAIN`, and a seal of their own over everything that they say, so that no field can be edited unseen.
It protects against accidents and confusion. Whoever means to forge can make a new seal: nothing here is signed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.reading import Kind, read_json, shown

SEAL = "seal"
CHAIN = {
    "frozen_hash": "the base's stored weights but the projector's",
    "original_projector_hash": "the projector that the base's files hold, whatever training started from",
    "settings_hash": "the base's configuration, processor and tokenizer",
    "text_tower_hash": "the text tower that the pruner reads, if it reads one",
    "projector_hash": "the recalibrated projector, as its file holds it",
    "profile": "the seal of the profile that fitted the pruner's options, if there is one",
    "prunetune": "this package's version and source",
    "plugins": "what was loaded from outside",
    "results_hash": "the answers and their scores",
    SEAL: "the record or the manifest itself",
}
"""Every link, from the base to the results, under its name in records and manifests.

Checked when an adapter is loaded (``load_projector``), a run or an arm is gone on with, a projector is exported, arms
are compared (``evaluation.report``), and by ``prunetune verify``. Of a profile nothing is read again: what it filled in
stands under ``pruning``.
"""


def seal_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, whatever their order, without the seal that they may hold."""
    content = {key: value for key, value in values.items() if key != SEAL}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with their seal as the last one."""
    content = {key: value for key, value in values.items() if key != SEAL}
    return {**content, SEAL: seal_of(content)}


def why_unsealed(values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a seal in words; None if it holds."""
    stored, own = values.get(SEAL), seal_of(values)
    if stored == own:
        return None
    if stored is None:
        return "its seal is missing"
    return f"it was changed after it was written: its seal is {short(stored)}, its content's {short(own)}"


def read_sealed(path: Path, what: str, again: str, error: Kind, **marks: object) -> dict[str, Any]:
    """Return a sealed file of ours, with its seal.

    Args:
        path: the file.
        what: it should be, for the message.
        again: what to do where it is none.
        error: is raised if it is missing, no JSON, something else, another version's, or was edited.
        marks: values that it must hold, such as its ``format``.
    """
    if not path.is_file():
        raise error(f"{path} is missing; {again}")
    values = read_json(path, error)
    other = [name for name in marks if not isinstance(values, dict) or values.get(name) != marks[name]]
    if other == ["format"] and "format" in values:
        raise error(f"{path} has format {shown(values['format'])}, this version reads {marks['format']}; {again}")
    if not isinstance(values, dict) or other:
        raise error(f"{path} is no {what} that this version reads; {again}")
    wrong = why_unsealed(values)
    if wrong is not None:
        raise error(f"{path} can't be trusted: {wrong}; {again}")
    return values


def short(value: object) -> str:
    """Return the first digits of a hash, for people: 48 bits tell any two apart."""
    return str(value)[:12]
