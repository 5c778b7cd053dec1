"""``prunetune verify``."""

import sys
from pathlib import Path

import click

from prunetune.cli.options import plugins_option


@click.command("verify")
@click.argument("path", type=Path)
@click.option("--base", metavar="DIR", help="folder or cached hub id of the base, instead of the named one")
@plugins_option
def command(path: Path, base: str | None) -> None:
    """Check every seal of PATH: an adapter, a recalibration, an arm, a comparison, a dial, an export or a profile.

    Exits with 1 if anything does not hold. What can't be checked on this machine is listed as such.
    """
    from prunetune.scripts.verify import to_text, verify

    checks = verify(path, base)
    print(to_text(checks))
    sys.exit(1 if any(check.holds is False for check in checks) else 0)
