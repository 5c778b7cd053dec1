"""What a run leaves in its folder to go on from: marked checkpoints, and the mark of a finished run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunetune.configs import ConfigError
from prunetune.data_recipes.content import is_older
from prunetune.models.code import told
from prunetune.outputs import write_text

COMPLETE = "complete.json"
FINISHED = "finished.json"
CODE = "prunetune"
"""In ``made_with``: which version of this package ran."""
FORMAT = 2
"""Of both marks; the first had no hashes."""


@dataclass(frozen=True)
class Mark:
    """What is written beside files once all of them are whole.

    Attributes:
        step: the optimizer step they are of.
        settings: the run's, which must not change between a run and its continuation.
        made_with: hashes of the base and the text tower, plug-ins and this package; known once the model is loaded.
        files: SHA-256 of every file, by its path relative to the mark.
    """

    step: int
    settings: dict[str, Any]
    made_with: dict[str, Any]
    files: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the mark; it is there as a whole or not at all."""
        write_text(path, json.dumps({"format": FORMAT, **vars(self)}, indent=1))

    def changed_settings(self, settings: dict[str, Any]) -> list[str]:
        """Return the names of settings that are others now."""
        changed = [key for key in {**self.settings, **settings} if self.settings.get(key) != settings.get(key)]
        if "data" in changed and is_older(self.settings.get("data")):
            # Nobody can tell then whether the samples are the same: the older version also read them otherwise.
            changed[changed.index("data")] = "data (an older version of prunetune read and hashed it)"
        return changed


class BrokenMark(Exception):
    """A mark, or a file that it names, that is not as it was written; the message says how."""


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that is whole, and newer ones that are not.

    Attributes:
        folder: None where there is no checkpoint at all.
        mark: the folder's.
        damaged: newer checkpoints, each with what is wrong with it.
    """

    folder: Path | None = None
    mark: Mark | None = None
    damaged: dict[Path, str] = field(default_factory=dict)


def file_hashes(folder: Path, below: str = "") -> dict[str, str]:
    """Return a SHA-256 of every file under ``folder / below``, by its path relative to ``folder``.

    Marks are left out, and hidden files, which file systems and desktops put anywhere.
    """
    found = {}
    for path in sorted((folder / below).rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.parent / path.name not in _marks(folder):
            with path.open("rb") as stream:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def find_checkpoint(output: Path, settings: dict[str, Any]) -> Found:
    """Return the newest marked checkpoint whose files are those that were written; nothing is unpickled.

    Raises:
        ConfigError: if it was written under other settings, naming them, or if there are checkpoints and none is whole.
    """
    # By number: of names checkpoint-900 would be newer than checkpoint-1000.
    by_step = {}
    for mark_file in output.glob(f"checkpoint-*/{COMPLETE}"):
        number = mark_file.parent.name.removeprefix("checkpoint-")
        if number.isdecimal():  # somebody's backup has another name
            by_step[int(number)] = mark_file.parent
    damaged: dict[Path, str] = {}
    for step in sorted(by_step, reverse=True):
        folder = by_step[step]
        try:
            mark = read_mark(folder / COMPLETE)
            check_files(folder, mark)
        except BrokenMark as error:
            damaged[folder] = str(error)
            continue
        changed = mark.changed_settings(settings)
        if changed:
            raise ConfigError(
                f"{folder} was written with other settings for {', '.join(changed)}; use another "
                "output folder, or set train.resume to never to start over"
            )
        return Found(folder, mark, damaged)
    if damaged:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
        raise ConfigError(
            f"no checkpoint in {output} can be used ({reasons}); put one back from a copy, or set train.resume to "
            "never, which moves them aside and starts over"
        )
    return Found()


def read_mark(path: Path) -> Mark:
    """Return a mark.

    Raises:
        BrokenMark: if it can't be read, or is of a format without hashes.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise BrokenMark(f"its {path.name} has format {values['format']!r}, not {FORMAT}")
        mark = Mark(values["step"], values["settings"], values["made_with"], values["files"])
        well_formed = all(isinstance(part, dict) for part in (mark.settings, mark.made_with, mark.files))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenMark(f"its {path.name} can't be read ({type(error).__name__}: {error})") from None
    if not well_formed:
        raise BrokenMark(f"its {path.name} does not hold what it should")
    return mark


def check_files(folder: Path, mark: Mark, below: str = "") -> None:
    """Check that the files are exactly those of the mark.

    Raises:
        BrokenMark: naming the first that is missing, changed or new; new ones would be read as well.
    """
    try:
        found = file_hashes(folder, below)
    except OSError as error:
        raise BrokenMark(f"{Path(error.filename or folder).name} can't be read: {error.strerror}") from None
    for name, digest in mark.files.items():
        if name not in found:
            raise BrokenMark(f"{name} is missing")
        if found[name] != digest:
            raise BrokenMark(f"{name} is not what was written ({(folder / name).stat().st_size:,} bytes now)")
    for name in found:
        if name not in mark.files:
            raise BrokenMark(f"{name} was not written with it")


def finished_step(output: Path, settings: dict[str, Any]) -> int | None:
    """Return the last step of a run that has finished here under these settings, or None.

    Without its ``adapter`` folder a run is not finished: the last checkpoint, if it is there, has all that it needs.

    Raises:
        ConfigError: if a run of other settings has finished here, or the adapter is not what that run wrote.
    """
    if not (output / FINISHED).exists() or not (output / "adapter").exists():
        return None
    try:
        mark = read_mark(output / FINISHED)
        changed = mark.changed_settings(settings)
        if not changed:
            check_files(output, mark, "adapter")
    except BrokenMark as error:
        raise ConfigError(
            f"a run has finished in {output}, and its adapter was changed since: {error}; move {output / 'adapter'} "
            "away to have it written again, or use another output folder"
        ) from None
    if changed:
        raise ConfigError(
            f"a run with other settings for {', '.join(changed)} has finished in {output}; use another output folder, "
            "or set train.resume to never to start over"
        )
    return mark.step


def mark_finished(output: Path, step: int, settings: dict[str, Any], made_with: dict[str, Any]) -> None:
    """Say that the adapter is written and that there is nothing left to do."""
    Mark(step, settings, made_with, file_hashes(output, "adapter")).write(output / FINISHED)


def check_made_with(found: Found, made_with: dict[str, Any]) -> None:
    """Check that the base and the plug-ins are those that the checkpoint was made with.

    Raises:
        ConfigError: naming what is another.
    """
    if found.mark is None:
        return
    checked = [name for name in made_with if name != CODE]
    changed = [name for name in checked if found.mark.made_with.get(name) != made_with[name]]
    if changed:
        raise ConfigError(
            f"{found.folder} was made with another {' and another '.join(changed)} than there is now; put back what it "
            "was made with, use another output folder, or set train.resume to never to start over"
        )


def other_code(found: Found, made_with: dict[str, Any]) -> str | None:
    """Return in words that another version of this package wrote the checkpoint; None if it was this one.

    A newer version may mend what stopped the run, so it may go on; that the two halves differ must not stay unsaid.
    """
    if found.mark is None:
        return None
    before, now = found.mark.made_with.get(CODE), made_with[CODE]
    if before is not None and before["sha256"] == now["sha256"]:
        return None
    return f"{found.folder} was written by prunetune {told(before)} and is gone on with by {told(now)}"


def rename_damaged(found: Found) -> None:
    """Give checkpoints that can't be used another name, so that a new one of the same step starts empty."""
    for folder in found.damaged:
        number = 1
        while (target := folder.with_name(f"damaged-{folder.name}-{number}")).exists():
            number += 1
        folder.rename(target)


def set_aside(output: Path) -> None:
    """Move what an earlier run left in ``output`` below ``output/superseded-N``; nothing is deleted."""
    old: list[Path] = []
    for name in (
        "checkpoint-*",
        "damaged-checkpoint-*",
        "log.jsonl",
        "numbers.json",
        "wandb_id.txt",
        FINISHED,
        "adapter",
        "best",
    ):
        old += output.glob(name)
    if not old:
        return
    number = len(list(output.glob("superseded-*"))) + 1
    folder = output / f"superseded-{number}"
    folder.mkdir()
    for path in old:
        path.rename(folder / path.name)


def _marks(folder: Path) -> set[Path]:
    return {folder / COMPLETE, folder / FINISHED}
