"""What LLaVA-1.5's mix needs, where it comes from, and what of it is there."""

from __future__ import annotations

from pathlib import Path

from prunetune.data_recipes.llava_json import PREFIXES
from prunetune.data_recipes.recipe import LlavaJsonRecipe, read_recipe
from prunetune.data_recipes.sample import DataError

MIX = (
    "llava_v1_5_mix665k.json",
    "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
)
PICTURES: dict[str, list[tuple[str, str]]] = {
    "coco": [("coco/train2017", "http://images.cocodataset.org/zips/train2017.zip")],
    "gqa": [("gqa/images", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip")],
    "ocr_vqa": [
        ("ocr_vqa/images", "https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ (as .jpg)")
    ],
    "textvqa": [("textvqa/train_images", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip")],
    "vg": [
        ("vg/VG_100K", "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip"),
        ("vg/VG_100K_2", "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip"),
    ],
}
SAMPLES = {"coco": 364_100, "vg": 86_417, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "text": 40_688}


def plan(recipe_name: str, file: str | None, image_root: str | None) -> tuple[str, bool]:
    """Return what a recipe needs as text, each item with its folder, its source and whether it is there; and if all is.

    Raises:
        DataError: if the recipe needs no download.
    """
    recipe = read_recipe(recipe_name)
    if not isinstance(recipe, LlavaJsonRecipe):
        raise DataError(f"recipe {recipe_name!r} draws its samples; there is nothing to prepare")
    if recipe.sources is None:  # only the published mix names its sources
        raise DataError(f"recipe {recipe_name!r} reads a file of your own; there is nothing to download")
    root = Path(image_root or ".")
    name, url = MIX
    data = root / name if file is None else Path(file)
    complete = data.is_file()
    lines = [f"recipe {recipe.name}", f"  {_mark(complete)} {data}\n      {url}"]
    for source in recipe.sources:
        if source not in PREFIXES:
            continue
        lines.append(f"  {source}: {SAMPLES[source]:,} samples")
        for folder, url in PICTURES[source]:
            path = root / folder
            number = _files_in(path)
            complete = complete and number > 0
            found = f"  {number:,} files" if number else ""
            lines.append(f"    {_mark(number > 0)} {path}/{found}\n        {url}")
    if complete:
        lines.append("all there; read it once with `prunetune data check`")
    else:
        lines.append("missing: download what is marked, unpack it to the folder named, and call this again")
    return "\n".join(lines), complete


def _files_in(folder: Path) -> int:
    """Return how many files a folder holds; 0 where there is none."""
    if not folder.is_dir():
        return 0
    return sum(entry.is_file() for entry in folder.iterdir())


def _mark(here: bool) -> str:
    return "[there]  " if here else "[missing]"
