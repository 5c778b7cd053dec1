"""What the library takes for granted of a benchmark, on a few items in its format."""

import csv

from my_pruning.colours import COLOURS
from PIL import Image

from prunetune.testing import BenchmarkContract

NAMES = ("red", "green", "blue")


class TestColours(BenchmarkContract):
    def make_task(self):
        return COLOURS

    def write_files(self, folder):
        (folder / "squares").mkdir()
        with (folder / "colours.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "colour"])
            for name in NAMES:
                Image.new("RGB", (84, 84), name).save(folder / "squares" / f"{name}.png")
                writer.writerow([f"{name}.png", name])

    def right_answer(self, item):
        return item.answer.upper()
