"""FLOP counted by hand equal those that torch counts while a model runs."""

import pytest
import torch
from family_world import SHAPE, TEXT, lively
from gemma_world import tiny_gemma3, tiny_paligemma
from generic_world import tiny as tiny_generic
from idefics_world import tiny_idefics
from qwen_world import CLASSES, tiny_qwen
from torch.utils.flop_counter import FlopCounterMode

from prunetune.models.blueprint import model_without_weights
from prunetune.pruning.families import family_of
from prunetune.train.flops import Work, flops_of, image, per_token, sequence, sequences
from prunetune.train.shape import shape_of

LENGTH = 24


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tiny_llava(attention="eager"):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(num_hidden_layers=3, image_size=24, patch_size=4, projection_dim=16, **SHAPE)
    text = LlamaConfig(num_key_value_heads=2, **TEXT)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, vision_feature_layer=-2)
    config._attn_implementation = attention
    return lively(lambda: LlavaForConditionalGeneration(config))


MODELS = {
    "llava": tiny_llava,
    "gemma3": lambda: tiny_gemma3(attention="eager"),
    "paligemma": lambda: tiny_paligemma(attention="eager"),
    "idefics3": lambda: tiny_idefics("idefics3", attention="eager"),
    "smolvlm": lambda: tiny_idefics("smolvlm", attention="eager"),
    "mistral3": lambda: tiny_generic("mistral3").eval(),  # which no family covers but the generic one
    **{kind: lambda kind=kind: tiny_qwen(attention="eager", kind=kind) for kind in CLASSES},
}


def both_ways(model, checkpointing):
    """Run the frozen LLM forward and backward to its inputs, as torch counts it."""
    model.requires_grad_(False)
    language = getattr(model.model, family_of(model).language_model)
    language.set_attn_implementation("eager")
    if checkpointing:
        language.gradient_checkpointing_enable({"use_reentrant": False})
        language.train()
    hidden = torch.randn(1, LENGTH, language.config.hidden_size, requires_grad=True)
    return counted(lambda: language(inputs_embeds=hidden, use_cache=False).last_hidden_state.sum().backward())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_llm_costs_what_torch_counts(name, checkpointing):
    """Eager attention computes the whole square, also what the mask hides; of that we count half."""
    model = MODELS[name]()
    shape = shape_of(model)
    square = Work(tokens=LENGTH, pairs=LENGTH * LENGTH)
    ours = flops_of(shape, square, checkpointing).total
    # Angles of rotary positions are a product as well, which no weight is in.
    assert both_ways(model, checkpointing) == pytest.approx(ours, rel=2e-3)


def test_logits_cost_their_positions_forward_and_backward():
    model = tiny_llava().requires_grad_(False)
    hidden = torch.randn(7, 32, requires_grad=True)
    ours = flops_of(shape_of(model), Work(logits=7)).logits
    assert counted(lambda: model.lm_head(hidden).sum().backward()) == ours


@pytest.mark.parametrize("stop", [False, True])
def test_a_tower_costs_what_torch_counts(stop):
    model = tiny_llava()
    shape = shape_of(model)
    pixels = torch.randn(2, 3, 24, 24)
    if stop:
        del model.model.vision_tower.encoder.layers[shape.tower.needed :]
    ours = flops_of(shape, image(37).times(2), stop_tower=stop).tower
    with torch.no_grad():
        # [CLS] is no patch of pixels, which we count it as.
        assert counted(lambda: model.model.vision_tower(pixels)) == pytest.approx(ours, rel=0.01)
    assert shape.tower.layers == 3 and shape.tower.needed == 2


@pytest.mark.parametrize("kind", CLASSES)
def test_a_qwen_tower_with_windows_costs_what_torch_counts(kind):
    model = tiny_qwen(attention="eager", kind=kind)
    family, patches = family_of(model), 8 * 16
    inputs = {"pixel_values": torch.randn(patches, 96), "image_grid_thw": torch.tensor([[1, 8, 16]])}
    with torch.no_grad():
        total = counted(lambda: family.encode(model, inputs, "image", frozenset()))
    shape = shape_of(model)
    ours = flops_of(shape, Work(projected=patches / 4, patches=patches, patch_pairs=patches**2))
    # The projector runs forward alone here.
    assert total == pytest.approx(ours.tower + ours.projector / 3, rel=0.02)


def test_parameters_are_counted_once():
    for make in MODELS.values():
        model = make()
        assert shape_of(model).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_with_a_trained_copy_is_as_large_as_it_was():
    from prunetune.models import wrap_projector

    model = tiny_llava()
    before = shape_of(model)
    assert shape_of(wrap_projector(model).get_base_model()) == before


def test_the_7b_shape_costs_the_known_figures():
    """26.4 GFLOP a token and 36.5 with checkpointing, measured on the meta device with dense attention."""
    shape = shape_of(model_without_weights("llava-hf/llava-1.5-7b-hf"))
    assert per_token(shape, 420) / 1e9 == pytest.approx(26.4, rel=0.01)
    assert per_token(shape, 420, checkpointing=True) / 1e9 == pytest.approx(36.5, rel=0.01)


def test_sequences_do_not_see_each_other():
    assert sequences([3, 4]) == sequence(3) + sequence(4) == Work(tokens=7, pairs=6 + 10)
    assert sequence(3).times(2) == sequences([3, 3])
    behind = sequence(10) + Work(tokens=-4, pairs=-10)  # what a prefix of 4 tokens costs is left out
    assert sequences([6], shared=4) == behind


def test_a_window_bounds_what_attention_costs():
    """With a window as long as the sequence nothing changes; a short one costs by its length."""
    from dataclasses import replace

    shape = shape_of(tiny_llava())

    def attention(window, length):
        language = replace(shape.language, windows=(window,) * shape.language.layers, linear=0)
        return flops_of(replace(shape, language=language), sequence(length)).llm

    assert attention(None, 100) == attention(1000, 100)
    assert attention(10, 1000) == pytest.approx(3 * 2 * 4 * 32 * 1000 * 10)
