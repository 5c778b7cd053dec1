"""What a recalibration has to process: samples, tokens after pruning, and the work of each source.

Where the data is there, every sample's length comes from it. Where it is not, a plan can still be made for the sources
of LLaVA-1.5's instruction mix, on assumptions that it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunetune.configs import ConfigError, RecalibrateConfig
from prunetune.data_recipes import DataError, RecipeData, load_recipe
from prunetune.data_recipes.formats import LlavaJsonRecipe, Recipe
from prunetune.data_recipes.lengths import text_lengths
from prunetune.data_recipes.recipe import read_recipe
from prunetune.data_recipes.videos import VIDEO
from prunetune.errors import PrunetuneError
from prunetune.models import CheckpointError
from prunetune.models.blueprint import formatter_without_model
from prunetune.pruning import PruningSpec
from prunetune.train.elastic import settings_of
from prunetune.train.flops import Work, layered, sequences
from prunetune.train.visual import Visual, visual_layers, visual_of

MIX = {"coco": 364_100, "vg": 86_417, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "text": 40_688}
"""Conversations by source in llava_v1_5_mix665k.json."""
TEXT_TOKENS = 356
"""Assumed text tokens of a sample of the mix: 420 with 64 visual tokens; 360 to 450 of those are plausible."""
PLAUSIBLE = (360, 450)
SUPERVISED = 0.3
"""Assumed share of the text that is answers."""
IMAGE = (480, 640)
"""Assumed height and width of an image where they decide how many tokens it has."""
LOOKED_AT = 100
"""Images whose size is looked at."""
TOKENS_PER_WORD, TOKENS_PER_TURN, TOKENS_AROUND = 1.4, 8, 36
"""Estimated tokens of a word, of what a template writes around a turn, and of what it begins with."""
PREFIX = {"vicuna_v1": 35}
"""Tokens that all prompts begin with, by template."""
PADDED = {"shuffled": 1.51, "length": 1.05, "modality_length": 1.05}
"""Tokens with padding for each token of a sample, where samples are not packed and their lengths are not known."""


@dataclass(frozen=True)
class Source:
    """One source of a recipe.

    Attributes:
        name: the source's.
        samples: how many there are in an epoch.
        images: how many of them have an image or a video.
        text: text tokens of a sample, on average.
        visual: tokens after pruning of a sample with an image, on average.
    """

    name: str
    samples: int
    images: int
    text: float
    visual: float

    @property
    def tokens(self) -> float:
        """Tokens of a sample after pruning, on average."""
        return self.text + self.visual * self.images / max(self.samples, 1)


@dataclass(frozen=True)
class Workload:
    """One epoch of a recipe.

    Attributes:
        sources: of the recipe.
        work: of all samples, without padding.
        longest: tokens of the longest sample after pruning; the average one's where lengths are assumed.
        visual: what an image is to the model, of the average size.
        inside: visual tokens of a sample with one image in each layer of the LLM, mean over the settings; empty where
            every layer processes what enters.
        assumptions: what is not known but assumed, a sentence each.
        measured: whether samples were counted in the data itself.
    """

    sources: tuple[Source, ...]
    work: Work
    longest: int
    visual: Visual
    inside: tuple[float, ...] = ()
    assumptions: list[str] = field(default_factory=list)
    measured: bool = False

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return sum(source.samples for source in self.sources)

    @property
    def tokens(self) -> float:
        """Tokens of a sample after pruning, on average."""
        return sum(source.tokens * source.samples for source in self.sources) / self.samples


def workload_of(config: RecalibrateConfig, model: Any) -> Workload:
    """Return the work of one epoch, from the data where it is there.

    Args:
        config: the recalibration's.
        model: the stock model, which may lie on the meta device.

    Raises:
        ConfigError: if the data is not there and its sources are not known.
        DataError: for a recipe or data that can't be used.
        PruningError: for a budget that images do not have.
    """
    recipe = read_recipe(config.data.recipe)
    if not _is_there(recipe, config):
        return _assumed(recipe, config, model)
    data = load_recipe(config.data.recipe, **config.data.model_dump(exclude={"recipe"}))
    return workload_of_data(config, model, data)


def workload_of_data(
    config: RecalibrateConfig, model: Any, data: RecipeData, lengths: Sequence[int] | None = None
) -> Workload:
    """Return the work of one epoch of data that is loaded.

    Args:
        config: the recalibration's.
        model: the stock model, which may lie on the meta device.
        data: the samples.
        lengths: text tokens of every sample, without visual tokens; None counts or estimates them here.
    """
    assumptions: list[str] = []
    text = np.asarray(_text_lengths(config, data, assumptions) if lengths is None else lengths, dtype=float)
    visual = visual_of(model, *_size_of_images(data, model, assumptions))
    kept, most = kept_by(config, visual)
    frames = _frames(data, config, assumptions)
    items = np.array([0 if image is None else frames if image.startswith(VIDEO) else 1 for image in data.rows["image"]])
    total = np.minimum(text, config.train.max_length) + kept * items
    names = np.array(data.rows["source"])
    sources = []
    for name in sorted(set(names.tolist())):
        own = names == name
        with_image = int((items[own] > 0).sum())
        visuals = float(kept * items[own].sum() / max(with_image, 1))
        sources.append(Source(name, int(own.sum()), with_image, float(text[own].mean()), visuals))
    inside = inside_by(config, model, visual)
    work = sequences(total.tolist()) if not inside else _work_inside(config, model, visual, total - kept * items, items)
    work += _images(visual, int(items.sum()), kept)
    work += Work(logits=float(text.sum()) * _supervised(data))
    longest = int((total + (most - kept) * items).max())
    return Workload(tuple(sources), work, longest, visual, inside, assumptions, measured=True)


def inside_by(config: RecalibrateConfig, model: Any, visual: Visual) -> tuple[float, ...]:
    """Return the visual tokens of an image in each layer of the LLM, mean over a run's settings; empty without stages.

    Raises:
        PruningError: for stages that the model can't have, or an average that can't be reached, with the least.
    """
    if not config.pruning.stages:
        return ()
    total = np.zeros(int(model.config.get_text_config().num_hidden_layers))
    for share, spec in _settings(config):
        total += share * np.array(visual_layers(model, spec, visual.kept(spec)))
    return tuple(total.tolist())


def _settings(config: RecalibrateConfig) -> list[tuple[float, PruningSpec]]:
    """Return the share and the pruning of each setting of a run."""
    settings = settings_of(config.pruning, config.elastic)
    return [(setting.share, setting.spec) for setting in settings] or [(1.0, config.pruning)]


def _work_inside(config: RecalibrateConfig, model: Any, visual: Visual, text: Any, items: Any) -> Work:
    """Return the LLM's work of samples whose layers process unlike many tokens.

    Args:
        config: the run's.
        model: the stock model.
        visual: an image.
        text: text tokens of every sample.
        items: images of every sample.
    """
    work = Work()
    for share, spec in _settings(config):
        kept = visual.kept(spec)
        by_items = {number: visual_layers(model, spec, kept * number) for number in set(items.tolist())}
        counts = np.array([by_items[number] for number in items.tolist()])  # (samples, layers)
        lengths = text[:, None] + counts
        pairs = (lengths * (lengths + 1) / 2).mean(axis=1).sum()
        work += Work(tokens=float(lengths.mean(axis=1).sum()), pairs=float(pairs)).times(share)
    return work


def kept_by(config: RecalibrateConfig, visual: Visual) -> tuple[int, int]:
    """Return how many tokens of an image reach the LLM: in the mean over the settings of a run, and at most."""
    settings = settings_of(config.pruning, config.elastic)
    if not settings:
        kept = visual.kept(config.pruning)
        return kept, kept
    counts = [visual.kept(setting.spec) for setting in settings]
    mean = sum(setting.share * count for setting, count in zip(settings, counts, strict=True))
    return round(mean), max(counts)


def prefix_of(template: str) -> int:
    """Return how many tokens all prompts of a template begin with; 0 where that is not known."""
    return PREFIX.get(template, 0)


def _is_there(recipe: Recipe, config: RecalibrateConfig) -> bool:
    if not isinstance(recipe, LlavaJsonRecipe):
        return recipe.draws
    try:
        there = recipe.data_file(config.data.file, config.data.image_root).exists()
    except DataError:  # none is named
        return False
    if not there:
        raise ConfigError(f"data.file {config.data.file} does not exist; leave it out for a plan on assumptions")
    return True


def _assumed(recipe: Recipe, config: RecalibrateConfig, model: Any) -> Workload:
    names = getattr(recipe, "sources", None)
    if not names or set(names) - set(MIX):
        raise ConfigError(
            f"recipe {config.data.recipe!r} can't be planned without its data: its sizes are known for LLaVA-1.5's mix "
            f"alone; name the data with --data.file and --data.image_root"
        )
    samples = {}
    for name in names:
        wanted = round(MIX[name] * recipe.weights.get(name, 1.0))
        samples[name] = min(wanted, recipe.caps.get(name, wanted))
    total = sum(samples.values()) - recipe.held_out
    limit = min(config.data.max_samples or total, recipe.max_samples or total, total)
    visual = visual_of(model, *IMAGE)
    kept, most = kept_by(config, visual)
    sources = []
    for name, count in samples.items():
        share = round(count * limit / sum(samples.values()))
        sources.append(Source(name, share, 0 if name == "text" else share, TEXT_TOKENS, kept))
    images = sum(source.images for source in sources)
    inside = inside_by(config, model, visual)
    work = Work()
    for source in sources:
        # Of those without an image no layer sees one.
        lengths = [
            source.text + tokens * source.images / max(source.samples, 1) for tokens in inside or (source.visual,)
        ]
        work += layered([[length] for length in lengths]).times(source.samples)
        work += Work(logits=source.samples * source.text * SUPERVISED)
    low, high = (tokens - 64 for tokens in PLAUSIBLE)
    assumptions = [
        f"the data is not here: samples as in llava_v1_5_mix665k.json, {TEXT_TOKENS} text tokens each (plausible {low} "
        f"to {high}), {SUPERVISED:.0%} of them answers",
    ]
    if visual.sized:
        assumptions.append(f"images of {IMAGE[1]} x {IMAGE[0]} pixels")
    longest = max(source.tokens for source in sources) + most - kept
    return Workload(tuple(sources), work + _images(visual, images, kept), round(longest), visual, inside, assumptions)


def _images(visual: Visual, images: int, kept: int) -> Work:
    """Return what tower and projector do for so many images, if the projector sees kept tokens alone."""
    patches = visual.patches * visual.items * images
    pairs = visual.patches * patches
    return Work(projected=kept * images, patches=patches, patch_pairs=pairs)


def _text_lengths(config: RecalibrateConfig, data: RecipeData, assumptions: list[str]) -> Any:
    """Return every sample's text tokens, counted where the tokenizer is there and estimated from words elsewhere."""
    try:
        return text_lengths(data, formatter_without_model(config.model, data.images))
    except CheckpointError as error:  # its config.json alone may be here
        assumptions.append(f"text is not tokenised but estimated from its words: {error}")
        return estimated_lengths(data)


def estimated_lengths(data: RecipeData) -> list[int]:
    """Return about how many text tokens every sample has, from its words."""
    lengths = []
    for turns in data.rows["turns"]:
        words = sum(len(f"{turn['question']} {turn['answer']}".split()) for turn in turns)
        lengths.append(round(TOKENS_AROUND + TOKENS_PER_TURN * len(turns) + TOKENS_PER_WORD * words))
    return lengths


def _supervised(data: RecipeData) -> float:
    """Return which share of the text is answers, by letters of at most a thousand samples."""
    answers = letters = 0
    for turns in data.rows["turns"][:1000]:
        for turn in turns:
            answers += len(turn["answer"] or "")
            letters += len(turn["question"]) + len(turn["answer"] or "")
    return answers / max(letters, 1)


def _size_of_images(data: RecipeData, model: Any, assumptions: list[str]) -> tuple[int, int]:
    """Return the height and width of the image of average area among some, where they decide how many tokens it has."""
    if not visual_of(model, *IMAGE).sized:
        return IMAGE
    references = [image for image in data.rows["image"] if image is not None and not image.startswith(VIDEO)]
    sizes = []
    for reference in references[:: max(1, len(references) // LOOKED_AT)][:LOOKED_AT]:
        try:
            image = data.images.open(reference, reference)
        except PrunetuneError:
            continue  # `prunetune data check` names those
        sizes.append((image.height, image.width))
    if not sizes:
        assumptions.append(f"images of {IMAGE[1]} x {IMAGE[0]} pixels")
        return IMAGE
    sizes.sort(key=lambda size: size[0] * size[1])
    height, width = sizes[len(sizes) // 2]
    assumptions.append(f"all images are as the middle one of {len(sizes)}: {width} x {height} pixels")
    return height, width


def _frames(data: RecipeData, config: RecalibrateConfig, assumptions: list[str]) -> int:
    """Return how many frames a video has here."""
    if not any(image is not None and image.startswith(VIDEO) for image in data.rows["image"]):
        return 0
    recipe = read_recipe(config.data.recipe)
    frames = recipe.video.frames if isinstance(recipe, LlavaJsonRecipe) else 1
    assumptions.append(f"a video is counted as {frames} images")
    return frames
