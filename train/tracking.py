"""Where a run's numbers go: a JSONL file always, Weights & Biases when asked."""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from prunetune.configs import ConfigError, TrackingConfig
from prunetune.outputs import write_text
from prunetune.screen import say


class Tracker:
    """Appends rows to ``log.jsonl`` and mirrors them to W&B.

    Args:
        config: the tracking section.
        folder: the run's output folder; W&B's offline files go below it.
        settings: the effective configuration, stored with the W&B run.
        first_step: the step a continued run goes on from; rows of later steps are cut off, they will come again.

    Raises:
        ConfigError: if W&B is to be online and there is no key.
    """

    def __init__(
        self, config: TrackingConfig, folder: Path, settings: dict[str, Any], first_step: int | None = None
    ) -> None:
        self.config = config
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if first_step is not None and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) <= first_step]
            write_text(self.path, "".join(kept))
        self.run = self._start(config, folder, settings) if config.wandb != "off" else None

    @property
    def run_id(self) -> str | None:
        """The W&B run's id, if there is one."""
        return self.run.id if self.run is not None else None

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        """Append one row; a number that W&B can plot is sent there as well."""
        if step is not None:
            row = {"step": step, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.run is not None:
            self.run.log({key: value for key, value in row.items() if key != "step"}, step=step)

    def summarize(self, name: str, values: dict[str, Any]) -> None:
        """Write numbers of the whole run to ``NAME.json`` beside the log, and into the W&B run's summary."""
        write_text(self.path.parent / f"{name}.json", json.dumps(values, indent=2) + "\n")
        if self.run is not None:
            self.run.summary.update({f"{name}/{key}": value for key, value in values.items()})

    def log_table(self, name: str, columns: Sequence[str | int], rows: list[list[Any]]) -> None:
        """Send a table to W&B."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Table(columns=list(columns), data=rows)})

    def note(self, values: dict[str, Any]) -> None:
        """Add to the W&B run's configuration what is known once the run is under way, such as hashes."""
        if self.run is not None:
            self.run.config.update(values, allow_val_change=True)

    def log_adapter(self, folder: Path, about: dict[str, Any]) -> None:
        """Send a recalibrated projector to W&B as an artefact, with its hashes."""
        if self.run is not None and self.config.adapters:
            import wandb

            artifact = wandb.Artifact(f"projector-{self.run.id}", type="adapter", metadata=about)
            for file in sorted(folder.iterdir()):  # one by one, which W&B says nothing about
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)

    def log_report(self, name: str, path: Path) -> None:
        """Send an HTML page to W&B."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def log_pictures(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table to W&B in which PNG files, as bytes, are pictures."""
        if self.run is None:
            return
        import io

        import PIL.Image
        import wandb

        drawn = []
        for row in rows:
            cells = []
            for cell in row:
                cells.append(wandb.Image(PIL.Image.open(io.BytesIO(cell))) if isinstance(cell, bytes) else cell)
            drawn.append(cells)
        self.run.log({name: wandb.Table(columns=list(columns), data=drawn)})

    def log_image(self, name: str, path: Path) -> None:
        """Send a picture to W&B."""
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Image(str(path))})

    def close(self, failed: bool = False) -> None:
        """Finish the W&B run."""
        if self.run is not None:
            self.run.finish(exit_code=int(failed))
            self.run = None

    def _start(self, config: TrackingConfig, folder: Path, settings: dict[str, Any]) -> Any:
        import wandb

        mode = wandb_mode(config.wandb)
        options: dict[str, Any] = {
            "project": config.project,
            "name": config.name or folder.name,
            "dir": str(folder),
            "config": settings,
            "group": config.group,
            "job_type": config.job_type,
            "tags": config.tags or None,
            "settings": wandb.Settings(silent=True),  # where the run is, we say ourselves
            "reinit": "create_new",  # a run that failed to close is no other's
        }
        id_file = folder / "wandb_id.txt"
        if id_file.exists():
            options |= {"id": id_file.read_text().strip(), "resume": "allow"}
        try:
            run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode == "offline":
                raise
            say(
                f"W&B can't be reached ({error}); this run goes on offline. "
                f"Send it later with: wandb sync {folder}/wandb/offline-run-*"
            )
            mode = "offline"
            run = wandb.init(mode=mode, **options)
        write_text(id_file, run.id)
        if mode == "online" and run.url is not None:  # of an offline one W&B prints a complaint
            say(f"W&B: {run.url}")
        return run


def wandb_mode(wanted: str) -> Literal["online", "offline"]:
    """Return the mode W&B starts in; "auto" is online with a key and offline, with a notice, without.

    Raises:
        ConfigError: for "online" without a key.
    """
    if wanted == "offline" or os.environ.get("WANDB_MODE") == "offline":
        return "offline"
    if has_wandb_key():
        return "online"
    if wanted == "online":
        raise ConfigError(
            "tracking.wandb is online, but there is no W&B key; set WANDB_API_KEY or run `wandb login`, "
            "or use tracking.wandb: offline"
        )
    say(
        "W&B: no key found (WANDB_API_KEY or `wandb login`), so this run is tracked offline; "
        "send it later with `wandb sync`"
    )
    return "offline"


def has_wandb_key() -> bool:
    """Return whether there is a W&B key, in the environment or where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
