"""Parquet files with images in a column, read through ``datasets`` without decoding them all."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from prunetune.data_recipes.images import Album, StoredImages
from prunetune.data_recipes.sample import DataError
from prunetune.reading import one_line, shown

if TYPE_CHECKING:
    from datasets import Dataset

ROW, NAMED = "row:", "id:"
"""How an image in a file is referred to: by its row, or by the value of the file's ``id`` column."""
COLUMNS = "/"
"""Stands between a row and its columns of images, with a comma between two, where that is not ``image``."""


def parquet_rows(paths: Path | Sequence[Path]) -> Dataset:
    """Return the rows of files, or of folders of ``save_to_disk``, in order; an image column holds bytes.

    Raises:
        DataError: naming the file that can't be read.
    """
    from datasets import concatenate_datasets

    tables = [_table(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    if len(tables) == 1:
        return tables[0]
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise DataError(f"the files {shown(paths)} hold unlike columns: {one_line(error)}") from error


def _table(path: Path) -> Dataset:
    from datasets import Image as ImageColumn  # takes seconds, and most commands read no Parquet file
    from datasets import load_dataset, load_from_disk

    try:
        with _without_its_errors():
            if path.is_dir():
                rows = load_from_disk(str(path))
            else:
                rows = load_dataset("parquet", data_files=str(path), split="train")
    # Arrow, the Parquet reader and `datasets` have no error in common for a file that is broken or empty.
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} can't be read as Parquet or Arrow data: {one_line(cause)}") from error
    # As bytes: reading a row for its text must not decode its images.
    for name, kind in rows.features.items():
        if isinstance(kind, ImageColumn):
            rows = rows.cast_column(name, ImageColumn(decode=False))
        elif isinstance(getattr(kind, "feature", None), ImageColumn):
            rows = rows.cast_column(name, type(kind)(ImageColumn(decode=False)))
    return rows


@contextmanager
def _without_its_errors() -> Iterator[None]:
    """While open, `datasets` logs nothing: what it raises is said in our own line, and need not stand above it."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class ParquetImages(StoredImages):
    """Images in columns of rows.

    A reference is ``row:NUMBER`` or ``id:NAME`` for the column ``image``, or ``row:NUMBER/COLUMN,COLUMN``; a column may
    hold lists of images. Several images are an :class:`Album`.
    """

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows
        self._index_of: dict[str, int] | None = None

    def _index(self, reference: str) -> int | None:
        if reference.startswith(ROW):
            number = reference.removeprefix(ROW).split(COLUMNS)[0]
            if number.isdigit() and int(number) < len(self._rows):
                return int(number)
            return None
        # Read when it is first needed: references by row never are.
        if self._index_of is None:
            names = self._rows["id"] if "id" in self._rows.column_names else []
            self._index_of = {f"{NAMED}{name}": index for index, name in enumerate(names)}
        return self._index_of.get(reference)

    def exists(self, reference: str) -> bool:
        """Return whether the row is there."""
        return self._index(reference) is not None

    def size(self, reference: str, sample_id: str) -> tuple[int, int]:
        """Return width and height of the image, or of the first of several, of which the image's head knows."""
        return self.size_in(self._contents(reference, sample_id)[0], self._what(reference, sample_id))

    def open(self, reference: str, sample_id: str) -> Image.Image | Album:
        """Return the decoded RGB image, or several."""
        what = self._what(reference, sample_id)
        images = [self.decode(content, what) for content in self._contents(reference, sample_id)]
        return images[0] if len(images) == 1 else Album(tuple(images))

    def _what(self, reference: str, sample_id: str) -> str:
        return f"sample {sample_id!r}: the image in {reference}"

    def _contents(self, reference: str, sample_id: str) -> list[io.BytesIO]:
        """Return the files of the images, of which there is at least one."""
        index = self._index(reference)
        if index is None:
            raise DataError(f"sample {sample_id!r}: {reference!r} is no row of the data file")
        columns = ["image"]
        if reference.startswith(ROW) and COLUMNS in reference:
            columns = reference.split(COLUMNS, 1)[1].split(",")
        row = self._rows[index]
        cells: list[Any] = []
        for column in columns:
            cell = row.get(column)
            cells += cell if isinstance(cell, list) else [cell]
        contents = []
        for cell in cells:
            content = cell.get("bytes") if isinstance(cell, dict) else None
            if not isinstance(content, bytes):
                raise DataError(f"sample {sample_id!r}: {reference} of the data file holds no image")
            contents.append(io.BytesIO(content))
        if not contents:
            raise DataError(f"sample {sample_id!r}: {reference} of the data file holds no image")
        return contents
