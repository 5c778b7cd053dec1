"""The lmms-lab layout: a benchmark as Parquet files, with its images in a column.

What a row of one benchmark holds is in that benchmark's file; here is what all of them share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetune.data_recipes.parquet import COLUMNS, NAMED, ROW, ParquetImages, parquet_rows
from prunetune.evaluation.errors import MissingFile, TaskError
from prunetune.evaluation.readers import number_repeats

if TYPE_CHECKING:
    from prunetune.data_recipes.videos import NamedVideos
    from prunetune.evaluation.tasks.base import Item

Row = dict[str, Any]


def image_in_row(number: int, *columns: str) -> str:
    """Return the reference of the image in a row of the table, counted from 0.

    Args:
        number: of the row.
        columns: with the images, several for a question about several; none is the column ``image``.
    """
    return f"{ROW}{number}{COLUMNS}{','.join(columns)}" if columns else f"{ROW}{number}"


def image_named(name: str) -> str:
    """Return the reference of an image in a file of images, which names them in its ``id`` column."""
    return f"{NAMED}{name}"


@dataclass(frozen=True)
class ParquetRows:
    """Reads a benchmark from the Parquet files of lmms-lab; prompts and answers are those of the published files.

    Attributes:
        name: the benchmark's, for messages.
        item: makes an item of a row and its number, counted from 0 over all files; None leaves the row out.
        repeats: whether an image may be asked the same twice; the ids are numbered then.
        source: where to get the files, for benchmarks that are published in this layout.
    """

    name: str
    item: Callable[[Row, int], Item | None]
    repeats: bool = False
    source: str = ""

    def read(self, data: Path) -> list[Item]:
        """Return the items in the order of the files.

        Raises:
            MissingFile: if there is no Parquet file.
            TaskError: if a column is missing, or items repeat.
        """
        rows = _tables(data, self.source)[0]
        items = []
        # What a benchmark's row function looks up and does not find names the column; the rest of the message says
        # what there is instead, since lmms-lab has several data sets of most benchmarks.
        try:
            for number, row in enumerate(rows):
                item = self.item(row, number)
                if item is not None:
                    items.append(item)
        except KeyError as error:
            there = ", ".join(rows.column_names)
            raise TaskError(
                f"{data}: the Parquet files of {self.name} have no column {error}; they have {there}"
            ) from None
        if not items:
            raise TaskError(f"{data}: none of the {len(rows)} rows is a question of {self.name}")
        if self.repeats:
            items = _numbered(items)
        ids = {item.id for item in items}
        # A folder with the files of two splits reads as one long table, and would be scored as such.
        if len(ids) < len(items):
            raise TaskError(f"{data}: questions of {self.name} repeat; keep the files of one split only")
        return items

    def read_answers(self, data: Path) -> list[Item]:
        """Return the items: the answers are in the same rows."""
        return self.read(data)

    def open_images(self, data: Path) -> ParquetImages:
        """Return the images: of the question's own rows, or, where those have none, of the files that do."""
        # Opened anew and not kept from reading: a table is a memory map, and items are read long before images.
        questions, images = _tables(data)
        # GQA's are apart, since 12,578 questions share 398 images.
        if "image" in questions.column_names or images is None:
            return ParquetImages(questions)
        return ParquetImages(images)


@dataclass(frozen=True)
class VideoRows:
    """Reads a benchmark about videos from the Parquet files of lmms-lab; the videos lie beside them, unpacked.

    Attributes:
        rows: reads the items, whose images are names of videos.
        videos: opens the videos in a folder.
    """

    rows: ParquetRows
    videos: Callable[[Path], NamedVideos]

    def read(self, data: Path) -> list[Item]:
        """Return the items in the order of the files."""
        return self.rows.read(data)

    def read_answers(self, data: Path) -> list[Item]:
        """Return the items: the answers are in the same rows."""
        return self.rows.read(data)

    def open_images(self, data: Path) -> NamedVideos:
        """Return the videos."""
        return self.videos(data)


def _numbered(items: list[Item]) -> list[Item]:
    """Return the items with ids of their own where several have the same."""
    numbered = []
    for item, name in zip(items, number_repeats(item.id for item in items), strict=True):
        numbered.append(replace(item, id=name))
    return numbered


def _tables(data: Path, source: str = "") -> tuple[Any, Any]:
    """Return the rows with questions, and the rows with nothing but images, or None if there are no such."""
    questions: list[Path] = []
    images: list[Path] = []
    files = sorted(data.rglob("*.parquet"))
    if not files:
        where = f"; get it from {source}" if source else ""
        raise MissingFile(f"{data} holds no Parquet file{where}")
    # By their columns and not by their names, which differ from data set to data set.
    for path in files:
        columns = set(parquet_rows(path).column_names)
        if columns <= {"id", "image"}:
            images.append(path)
        else:
            questions.append(path)
    if not questions:
        raise TaskError(f"{data}: the Parquet files hold pictures only, and no questions")
    return parquet_rows(questions), parquet_rows(images) if images else None
