"""Tiny models with as many decoder layers as stages need, and batches of them; a slow run with tokens hidden."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gemma_world
import qwen_world
import torch
from family_world import IMAGE, SHAPE, TEXT, lively, noise, padded, sentence

from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.pruning.families import family_of
from prunetune.pruning.spec import StageSpec
from prunetune.pruning.stages.base import Choice, Merged, Stage

LAYERS = 6
COUNT = 16  # visual tokens of an image of Llava

ROWS = (
    (1, 9, 1),
    (2, 6, 2),
    (0, 12, 3),
)
"""Images, words and a seed."""

TEXT = {**TEXT, "num_hidden_layers": LAYERS}


@dataclass(frozen=True)
class World:
    """A tiny model of one family, and batches for it.

    Attributes:
        build: makes the model, of an attention implementation.
        rows: samples.
        batch: rows, the padding's side and whether there are labels, as model inputs.
        plain: whether positions are plain and images causal: stages may number anew and merge.
        visual: the ids of placeholders, which generation must not produce.
    """

    build: Callable[[str], Any]
    rows: tuple[Any, ...]
    batch: Callable[..., dict[str, torch.Tensor]]
    plain: bool = True
    visual: tuple[int, ...] = (IMAGE,)

    @property
    def settings(self):
        return {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [2, *self.visual]}


def clip(**settings):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(num_hidden_layers=3, image_size=16, patch_size=4, **SHAPE, **settings)


def tiny_llava(attention="sdpa"):
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(num_key_value_heads=2, **TEXT)
    config = LlavaConfig(vision_config=clip(), text_config=text, image_token_id=IMAGE)
    config._attn_implementation = attention
    return lively(lambda: LlavaForConditionalGeneration(config))


def llava_batch(rows, side="right", labels=False):
    ids, pixels = [], []
    for images, words, seed in rows:
        ids.append(sentence([(IMAGE, COUNT)] * images, words, seed))
        pixels += [noise(10 * seed + number, 3, 16, 16) for number in range(images)]
    inputs = padded(ids, side, False)
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return with_answers(inputs, labels)


def with_answers(inputs, labels):
    """Inputs with labels of the last three tokens of each row, if they are asked for: all before them is the prompt."""
    if labels:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        left = mask.flip(1).cumsum(1).flip(1)  # tokens from here on
        inputs["labels"] = torch.where((left <= 3) & mask.bool(), ids, -100)
    return inputs


NEXT_SIZES = ((16, 32), (30, 28), (20, 16))


def tiny_next(attention="sdpa"):
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    text = LlamaConfig(num_key_value_heads=2, **TEXT)
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = LlavaNextConfig(
        vision_config=clip(), text_config=text, image_token_id=IMAGE, image_grid_pinpoints=pinpoints
    )
    config._attn_implementation = attention

    def build():
        model = LlavaNextForConditionalGeneration(config)
        with torch.no_grad():
            model.model.image_newline.normal_()
        return model

    return lively(build)


def next_batch(rows, side="right", labels=False):
    """Rows of a size of their only image, or None, words and a seed."""
    ids, pixels, sizes = [], [], []
    for size, words, seed in rows:
        if size is not None:
            crops = 1 + (2 if size == (16, 32) else 4)
            own = noise(seed, 5, 3, 16, 16)
            own[crops:] = 0
            pixels.append(own)
            sizes.append(size)
        ids.append(sentence([(IMAGE, next_count(size))] if size else [], words, seed))
    inputs = padded(ids, side, False)
    if pixels:
        inputs |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}
    return with_answers(inputs, labels)


_NEXT_COUNTS = {}


def next_count(size):
    """Placeholders of an image, by the model itself."""
    if not _NEXT_COUNTS:
        model = tiny_next()
        for own in NEXT_SIZES:
            pixels, sizes = torch.zeros(1, 5, 3, 16, 16), torch.tensor([own])
            found = model.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True)
            _NEXT_COUNTS[own] = len(found.pooler_output[0])
    return _NEXT_COUNTS[size]


def qwen_batch(rows, side="right", labels=False):
    return with_answers(qwen_world.batch(rows, side, labels=False), labels)


def tiny_internvl(attention="sdpa"):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    tower = InternVLVisionConfig(num_hidden_layers=3, image_size=24, patch_size=4, norm_type="rms_norm", **SHAPE)
    text = Qwen2Config(num_key_value_heads=2, **TEXT)
    config = InternVLConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    config._attn_implementation = attention
    return lively(lambda: InternVLForConditionalGeneration(config))


def internvl_batch(rows, side="right", labels=False):
    ids, pixels = [], []
    for images, words, seed in rows:
        ids.append(sentence([(IMAGE, 9)] * images, words, seed))
        pixels += [noise(10 * seed + number, 3, 24, 24) for number in range(images)]
    inputs = padded(ids, side, False)
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return with_answers(inputs, labels)


def gemma_batch(rows, side="right", labels=False):
    return gemma_world.batch(rows, side, labels, size=32, types="image")


def _qwen(kind):
    visual = (qwen_world.IMAGE, qwen_world.VIDEO)
    build = lambda attention: qwen_world.tiny_qwen(attention=attention, kind=kind, layers=LAYERS)  # noqa: E731
    return World(build, qwen_world.ROWS, qwen_batch, False, visual)


WORLDS = {
    "llava": World(tiny_llava, ROWS, llava_batch),
    "llava_next": World(tiny_next, ((NEXT_SIZES[0], 8, 1), (None, 9, 2), (NEXT_SIZES[1], 5, 3)), next_batch),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "qwen3_vl": _qwen("qwen3_vl"),
    "internvl": World(tiny_internvl, ROWS, internvl_batch),
    "gemma3": World(
        lambda attention: gemma_world.tiny_gemma3(attention, pairs=3), gemma_world.ROWS, gemma_batch, False
    ),
}


def staged(model, *stages, pruner="identity", keep="100%", **fields):
    specs = [StageSpec(**stage) for stage in stages]
    return PrunedModel(model, PruningSpec(pruner, keep, stages=specs, **fields))


def plan_for(pruned, inputs):
    """The plan of a forward, and its output."""
    with torch.no_grad(), pruned._inside() as plans:
        output = pruned.model(**pruned.prepare(inputs).inputs)
    (plan,) = plans
    return plan, output


@contextmanager
def listening(pruned):
    """What each boundary's stage hears, in their order."""
    heard, undo = [], []
    for point in pruned.stages.schedule.points:
        stage = point.stage
        if "choose" in vars(stage):
            continue  # of an earlier boundary too

        def choose(at, keep, stage=stage):
            heard.append(at)
            return type(stage).choose(stage, at, keep)

        object.__setattr__(stage, "choose", choose)  # a frozen dataclass
        undo.append(stage)
    try:
        yield heard
    finally:
        for stage in undo:
            object.__delattr__(stage, "choose")


@dataclass(frozen=True)
class Miscounts(Stage):
    """Keeps another number of tokens than it is asked for, in the last row."""

    more: int = 1

    def choose(self, at, keep):
        wanted = torch.tensor(keep)
        wanted[-1] += self.more
        return Choice(at.visual & (at.visual.long().cumsum(1) <= wanted[:, None]))


@dataclass(frozen=True)
class Misshapen(Stage):
    """Answers of some slots alone."""

    def choose(self, at, keep):
        return Choice(at.visual[:, :4])


@dataclass(frozen=True)
class Folding(Stage):
    """Keeps the first tokens and folds the others into one, with the positions of the prompt."""

    merges = True

    def after(self, entering, keep):
        return keep + 1 if keep < entering else entering

    def choose(self, at, keep):
        kept = at.visual & (at.visual.long().cumsum(1) <= torch.tensor(keep)[:, None])
        dropped = (at.visual & ~kept).float()
        mixing = (dropped / dropped.sum(1, keepdim=True).clamp(min=1))[:, None]
        return Choice(kept, Merged(mixing, dropped.argmax(1, keepdim=True), [1] * len(kept)))


def masked_run(model, inputs, plan, dense_from=LAYERS, until=LAYERS, **options):
    """The stock model on the full sequence, whose layers do not see what the plan dropped below them.

    Args:
        inputs: of the stock model; longer than the prompt where answers follow it.
        plan: what is kept at each layer.
        dense_from: the first layer that numbers what is left anew.
        until: the last layer that drops anything.
        options: what the model is asked for beside its logits.
    """
    text = family_of(model).llm(model)
    width = plan.width
    handles = []

    def hook(number, _, args, kwargs):
        hidden = args[0]
        length = hidden.shape[1]
        visible = torch.ones(len(hidden), length, dtype=torch.bool)
        visible[:, :width] = plan.real & (~plan.visual | plan.kept_columns(min(number, until)))
        mask = kwargs["attention_mask"]
        seen = torch.ones(length, length).tril().bool() if mask is None else mask
        if seen.is_floating_point():
            seen = seen == 0
        seen = (seen & visible[:, None, None, :]) | torch.eye(length).bool()
        kwargs = {**kwargs, "attention_mask": seen}
        if mask is not None and mask.is_floating_point():
            kwargs["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        if number >= dense_from:
            positions = (visible.long().cumsum(1) - 1).clamp(min=0)
            kwargs["position_embeddings"] = text.rotary_emb(hidden, position_ids=positions)
        return args, kwargs

    for number, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(
            lambda *call, number=number: hook(number, *call), with_kwargs=True
        ))  # fmt: skip
    try:
        return model(**inputs, **{"use_cache": False, **options})
    finally:
        for handle in handles:
            handle.remove()


def left_at_the_end(plan):
    """Which columns reach the last layer, (B, L)."""
    return plan.real & (~plan.visual | plan.kept_columns())
