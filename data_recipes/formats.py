"""The formats a recipe may have: what each reads, and the options its YAML takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from prunetune.data_recipes.content import column
from prunetune.data_recipes.images import ImageOpener
from prunetune.data_recipes.llava_json import BrokenRecord, check_sources, read_llava
from prunetune.data_recipes.parquet import ROW, ParquetImages, parquet_rows
from prunetune.data_recipes.sample import DataError
from prunetune.data_recipes.sampling import VideoSampling
from prunetune.data_recipes.videos import FolderVisuals
from prunetune.names import nearest
from prunetune.plugins import load_installed, named
from prunetune.reading import shown

if TYPE_CHECKING:
    from datasets import Dataset

PARSER_VERSION = 3
"""Part of the cache's key: raise it when the same file is read into other rows."""
MIX = "llava_v1_5_mix665k.json"


class Recipe(BaseModel):
    """What every recipe says, whatever its format: how much of its data is used.

    A format is a subclass with the options of its own and ``open_rows``; :func:`register_format` makes it known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    draws: ClassVar[bool] = False
    """Whether samples are drawn, not read: then there is no data file to name or to check."""

    name: str = Field(description="what logs and records call it")
    format: str = Field(description="a name from `prunetune list formats`, whose further keys stand beside these")
    weights: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="share of a source that is kept"
    )
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="at most so many samples of a source"
    )
    held_out: int = Field(0, ge=0, description="samples set aside with all others of their images, never trained on")
    max_samples: int | None = Field(None, ge=1, description="use this many samples, drawn by the seed; None is all")
    max_missing: float | None = Field(
        None, ge=0, le=1, description="largest share of samples without their image file; None is 1 %"
    )
    max_broken: float | None = Field(
        None, ge=0, le=1, description="largest share of records that are no conversation; None is 1 %"
    )
    seed: int = Field(0, description="of everything that is drawn")

    @abstractmethod
    def open_rows(self, file: str | None, image_root: str | None) -> tuple[Dataset, ImageOpener]:
        """Return all rows in their order (see ``Sample.to_row``), and what opens their images.

        A row of a record that is no conversation may stand among them, with what is wrong in a column ``broken``,
        which is None in all others: such rows are left out, and counted against ``max_broken``.

        Args:
            file: the data file that a run names; None leaves it to the recipe.
            image_root: folder of the images.

        Raises:
            DataError: for a file or record that can't be used.
        """

    def open_questions(self, file: str | None, image_root: str | None) -> tuple[Dataset, ImageOpener]:
        """Return all rows as :meth:`open_rows` does; a format that reads questions without answers returns those.

        Raises:
            DataError: as :meth:`open_rows`.
        """
        return self.open_rows(file, image_root)


class LlavaJsonRecipe(Recipe):
    """Conversations in LLaVA's format, filtered by source."""

    file: str | None = Field(None, description="data file, relative to the recipe's own folder")
    sources: list[str] | None = Field(
        None, description="by image prefix, text, and video; None is everything in the file"
    )
    video: VideoSampling = Field(default_factory=VideoSampling, description="which frames of videos are looked at")

    def data_file(self, file: str | None, image_root: str | None) -> Path:
        """Return the data file: the one given, the recipe's own, or LLaVA's mix lying in the folder of the images.

        Raises:
            DataError: if there is none of them.
        """
        named = file or self.file
        if named is not None:
            return Path(named)
        if image_root is not None and (Path(image_root) / MIX).is_file():
            return Path(image_root) / MIX
        raise DataError(f"recipe {self.name!r} reads a data file; set data.file (--file of `prunetune data`)")

    def open_rows(self, file: str | None, image_root: str | None) -> tuple[Dataset, ImageOpener]:
        """Return the rows, from the Arrow cache if they were read before, and the images.

        Raises:
            DataError: for a file or record that can't be used.
        """
        return self._opened(file, image_root, questions=False)

    def open_questions(self, file: str | None, image_root: str | None) -> tuple[Dataset, ImageOpener]:
        """Return the rows with what is asked alone, whether it is answered or not.

        Raises:
            DataError: as :meth:`open_rows`.
        """
        return self._opened(file, image_root, questions=True)

    def _opened(self, file: str | None, image_root: str | None, questions: bool) -> tuple[Dataset, ImageOpener]:
        path = self.data_file(file, image_root)
        check_sources(self.sources or ())
        rows = _cached_rows(path, self.sources, questions)
        embedded = _any_in_file(rows)
        return rows, ParquetImages(parquet_rows(path)) if embedded else FolderVisuals(image_root, self.video)


def _any_in_file(rows: Dataset) -> bool:
    """Return whether an image lies in the data file itself."""
    import pyarrow.compute as pc  # takes a second, as `datasets` does

    return bool(pc.any(pc.starts_with(column(rows, "image"), ROW)).as_py())


def _cached_rows(path: Path, sources: list[str] | None, questions: bool) -> Dataset:
    files: list[Path] = []
    if path.is_dir():
        files = sorted(path.rglob("*"))
    elif path.exists():
        files = [path]
    state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    from datasets import Dataset, Features, Value  # takes seconds; naming the recipes that there are does not need it
    from datasets.exceptions import DatasetGenerationError

    text = Value("string")
    features = {
        "id": text,
        "source": text,
        "image": text,
        "turns": [{"question": text, "answer": text}],
        "broken": text,
    }
    options: dict[str, Any] = {
        "path": str(path.resolve()),
        "sources": None if sources is None else tuple(sources),  # lists are taken for shards
        "version": f"{PARSER_VERSION} {state}",
    }
    if questions:  # a key of its own, which files that were read before need not have
        options["questions"] = True
    try:
        return Dataset.from_generator(_llava_rows, features=Features(features), gen_kwargs=options)
    except DatasetGenerationError as error:
        cause = error.__cause__
        raise cause if isinstance(cause, DataError) else error from None


def _llava_rows(
    path: str, sources: tuple[str, ...] | None, version: str, questions: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield rows; ``version`` is part of the cache's key, so that an edited file is read again.

    Raises:
        DataError: for a file that can't be used, or has no record of the sources.
    """
    empty = True
    for sample in read_llava(path, sources, questions):
        empty = False
        if isinstance(sample, BrokenRecord):
            # By the file's name alone: what is left out stands in records, which say nothing of the machine.
            fault = str(sample).replace(path, Path(path).name, 1)
            yield {"id": "", "source": "", "image": None, "turns": [], "broken": fault}
        else:
            yield {**sample.to_row(), "broken": None}
    if empty:  # said here, because `datasets` makes no table of nothing
        raise DataError(f"{path} has no sample of {', '.join(sources or ['any source'])}")


_FORMATS: dict[str, type[Recipe]] = {}
_FOLDERS: list[Path] = [Path(__file__).parent / "recipes"]


def register_format(name: str, recipe: type[Recipe], folder: Path | None = None) -> None:
    """Make a format known, and the folder of the recipe files that come with it.

    Raises:
        DataError: if the name is taken.
    """
    if _FORMATS.get(name, recipe) is not recipe:
        raise DataError(f"two recipe formats are called {name!r}: {_FORMATS[name].__name__} and {recipe.__name__}")
    _FORMATS[name] = recipe
    if folder is not None and folder not in _FOLDERS:
        _FOLDERS.append(folder)


def registered_formats() -> dict[str, type[Recipe]]:
    """Return all formats by name."""
    load_installed()
    return dict(sorted(_FORMATS.items()))


def recipe_folders() -> list[Path]:
    """Return the folders of shipped recipe files."""
    registered_formats()
    return list(_FOLDERS)


def format_of(name: Any) -> type[Recipe]:
    """Return the format of a name, or the class that ``package.module:Class`` names.

    Raises:
        DataError: if there is none, with the nearest name, or the class is no recipe.
        PluginError: if its module can't be imported.
    """
    if not isinstance(name, str):
        raise DataError(f"a recipe's format is a name, got {shown(name)}")
    if ":" in name:
        recipe = named(name)
        if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
            raise DataError(f"format {name!r} is no recipe; a format is a subclass of data_recipes.formats.Recipe")
        return recipe
    known = registered_formats()
    if name not in known:
        raise DataError(f"unknown format {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


register_format("llava_json", LlavaJsonRecipe)
