"""``prunetune recalibrate``."""

import sys

from prunetune.cli.schema import SchemaCommand, config_option
from prunetune.configs import RecalibrateConfig


def run(config: str | None, overrides: list[str]) -> None:
    """Launch DeepSpeed to recalibrate a projector, on all devices or as many as `devices` says."""
    from prunetune.scripts.launch import launch_recalibration

    sys.exit(launch_recalibration(config, overrides))


command = SchemaCommand("recalibrate", RecalibrateConfig, callback=run, params=[config_option()], help=run.__doc__)
