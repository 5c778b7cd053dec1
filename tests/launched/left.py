"""A recalibration, and what it leaves in its process."""

import multiprocessing

from prunetune.train import recalibrate


def main(arguments: list[str]) -> None:
    """Recalibrate, and count the data loading processes afterwards."""
    recalibrate.main(arguments)
    print(f"data loading processes left: {len(multiprocessing.active_children())}")
