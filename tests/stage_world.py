"""Tiny models with as many decoder layers as stages need, and batches of them; a slow run with tokens hidden."""

from __future__ import annotations

import torch
from family_world import IMAGE, SHAPE, TEXT, lively, noise, padded, sentence

from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.pruning.spec import StageSpec

LAYERS = 6
COUNT = 16  # visual tokens of an image

ROWS = (
    (1, 9, 1),
    (2, 6, 2),
    (0, 12, 3),
)
"""Images, words and a seed."""


def tiny_llava(attention="sdpa"):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(num_hidden_layers=3, image_size=16, patch_size=4, **SHAPE)
    text = LlamaConfig(num_key_value_heads=2, **{**TEXT, "num_hidden_layers": LAYERS})
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    config._attn_implementation = attention
    return lively(lambda: LlavaForConditionalGeneration(config))


def llava_batch(rows, side="right", labels=False):
    ids, pixels = [], []
    for images, words, seed in rows:
        ids.append(sentence([(IMAGE, COUNT)] * images, words, seed))
        pixels += [noise(10 * seed + number, 3, 16, 16) for number in range(images)]
    inputs = padded(ids, side, False)
    if labels:
        inputs["labels"] = answers_of(inputs)
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return inputs


def answers_of(inputs):
    """Labels of the last three tokens of each row: all before them is the prompt."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    left = mask.flip(1).cumsum(1).flip(1)  # tokens from here on
    return torch.where((left <= 3) & mask.bool(), ids, -100)


def staged(model, *stages, pruner="identity", keep="100%", **fields):
    specs = [StageSpec(**stage) for stage in stages]
    return PrunedModel(model, PruningSpec(pruner, keep, stages=specs, **fields))


def plan_for(pruned, inputs):
    """The plan of a forward, and its output."""
    with torch.no_grad(), pruned._inside() as plans:
        output = pruned.model(**pruned.prepare(inputs).inputs)
    (plan,) = plans
    return plan, output


def masked_run(model, inputs, plan, dense=False):
    """The stock model on the full sequence, whose layers do not see what the plan dropped below them.

    Args:
        inputs: of the stock model; longer than the prompt where answers follow it.
        plan: what is kept at each layer.
        dense: whether layers behind a boundary number what is left anew.
    """
    text = model.base_model.language_model
    width = plan.width
    handles = []

    def hook(number, _, args, kwargs):
        hidden = args[0]
        length = hidden.shape[1]
        visible = torch.ones(len(hidden), length, dtype=torch.bool)
        visible[:, :width] = plan.real & (~plan.visual | plan.kept_columns(number))
        mask = kwargs["attention_mask"]
        seen = torch.ones(length, length).tril().bool() if mask is None else mask
        if seen.is_floating_point():
            seen = seen == 0
        seen = (seen & visible[:, None, None, :]) | torch.eye(length).bool()
        kwargs = {**kwargs, "attention_mask": seen}
        if mask is not None and mask.is_floating_point():
            kwargs["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        first = plan.schedule.points[0].boundary
        if dense and number >= first:
            positions = (visible.long().cumsum(1) - 1).clamp(min=0)
            kwargs["position_embeddings"] = text.rotary_emb(hidden, position_ids=positions)
        return args, kwargs

    for number, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(
            lambda *call, number=number: hook(number, *call), with_kwargs=True
        ))  # fmt: skip
    try:
        return model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def left_at_the_end(plan):
    """Which columns reach the last layer, (B, L)."""
    return plan.real & (~plan.visual | plan.kept_columns())
