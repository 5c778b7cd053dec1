"""Architectures without a family of their own: compared with the stock model before anything is pruned, or refused."""

import copy

import gemma_world
import pytest
import qwen_world
import torch
from generic_world import IMAGE, ROWS, batch, tiny
from torch import nn

from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Selection, admission
from prunetune.pruning.families import base, family_of, name_projector
from prunetune.pruning.rewrite import in_blocks
from prunetune.testing import FamilyIdentity
from prunetune.testing.families import Uneven, Words


class Generic(FamilyIdentity):
    """The suite of every family; of methods there are few, and nothing can be stored."""

    suppressed = (2, 6, IMAGE)
    can_be_stored = False
    architecture = ""

    def make_model(self):
        return tiny(self.architecture)

    def rows(self):
        return list(ROWS)

    def batch(self, rows, side, labels):
        return batch(self.architecture, rows, side, labels)

    def grown(self, inputs, ids):
        grown = super().grown(inputs, ids)
        return {**grown, "mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in inputs else grown


class TestInternVL(Generic):
    """Features in one tensor."""

    architecture = "internvl"


class TestGlm4v(Generic):
    """Features in a list, native resolution, positions in three parts."""

    architecture = "glm4v"

    def test_text_alone_is_stock_with_a_gradient_of_zero(self):
        pytest.skip("no blank image can be made")

    def test_ranks_without_an_image_encode_a_blank_of_every_modality(self):
        pytest.skip("no blank image can be made")

    def test_the_engine_trains_on_text_alone(self):
        pytest.skip("no blank image can be made")


FAMILIES = base.registered_families
TAKEN = ("gemma3", "internvl", "mistral3", "glm4v")
every_architecture = pytest.mark.parametrize("name", TAKEN)


@pytest.fixture(scope="module", autouse=True)
def _without_families():
    """The generic family also for architectures that have one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "registered_families", dict)
        yield


@pytest.fixture(autouse=True)
def _said_nothing(monkeypatch):
    monkeypatch.setattr(admission, "_SAID", set())


class Nothing:
    """Keeps no token of any item."""

    needs = frozenset()

    def __call__(self, tokens, keep):
        return Selection(torch.zeros(len(tokens.features), 0, dtype=torch.long))


@torch.no_grad()
@every_architecture
def test_beams_and_samples_equal_each_row_alone(name):
    """Rows keep unequally many tokens, of one image, of two or of none."""
    model = tiny(name)
    pruned = PrunedModel(model, PruningSpec("divprune", 5))
    pruned.pruner = Uneven()
    prompts = batch(name, side="left", labels=False)
    kept = pruned.prepare(prompts).kept["image"]
    assert len(set(kept)) > 1, kept
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [IMAGE, 6, 2]}
    for settings, copies in (
        ({"num_beams": 3, "do_sample": False}, 1),
        ({"num_return_sequences": 3, "do_sample": True, "top_k": 1}, 3),
        ({"num_beams": 3, "do_sample": False, "prefill_chunk_size": 4}, 1),
    ):
        together = pruned.generate(**prompts, **length, **settings).tokens
        for number, row in enumerate(ROWS):
            alone = pruned.generate(**batch(name, [row], "left", False), **length, **settings).tokens
            assert torch.equal(together[number * copies : (number + 1) * copies], alone), settings


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_nothing_kept_of_any_image_runs_and_can_be_generated_from(name):
    model = tiny(name)
    pruned = PrunedModel(model, PruningSpec("divprune", 5))
    pruned.pruner = Nothing()
    prompts = batch(name, side="left", labels=False)
    generated = pruned.generate(**prompts, max_new_tokens=2, num_beams=2, do_sample=False)
    assert generated.kept == {"image": [0, 0, 0, 0, 0]} and generated.tokens.shape == (4, 2)
    inputs = batch(name)
    texts = {key: value for key, value in pruned.prepare(inputs).inputs.items() if key != "mm_encoder_outputs"}
    torch.testing.assert_close(pruned.forward(**inputs).logits, model(**texts).logits)


@torch.no_grad()
@every_architecture
def test_a_model_is_compared_with_itself_once_and_that_is_said(name, capsys):
    model = tiny(name)
    runs = []
    model.base_model.register_forward_hook(lambda *_: runs.append(1))
    pruned = PrunedModel(model, PruningSpec("divprune", 4))
    pruned.prepare(batch(name, [ROWS[2]]))
    assert not runs  # text alone says nothing of images
    pruned.prepare(batch(name))
    PrunedModel(model, PruningSpec("fps", 4)).prepare(batch(name))
    assert len(runs) == (2 if pruned.family.counts_rows_and_columns else 3)  # and once with positions
    (line,) = capsys.readouterr().out.splitlines()
    assert f"'{name}': the generic one was compared with the stock model" in line and "bit for bit" in line


def test_each_modality_is_compared_for_itself():
    """An admission by images is none for videos, which go through other code of the model."""
    model = qwen_world.tiny_qwen()
    runs = []
    model.base_model.register_forward_hook(lambda *_: runs.append(1))
    pruned = PrunedModel(model, PruningSpec("divprune", 4))
    images, both = qwen_world.batch([qwen_world.ROWS[0]]), qwen_world.batch([qwen_world.MIXED[0]])
    for inputs, expected in ((images, 2), (both, 4), (images, 4), (both, 4)):
        pruned.prepare(inputs)
        assert len(runs) == expected


@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_whose_positions_begin_elsewhere_is_refused(policy, side):
    """PaliGemma counts from 1 by itself: unpruned that changes nothing, and a pruned batch would count from 0."""
    model = gemma_world.tiny_paligemma()
    inputs = gemma_world.batch(gemma_world.ROWS, side, True, size=16, types="suffix")
    pruned = PrunedModel(model, PruningSpec("divprune", 4, position_policy=policy))
    said = rf"'paligemma'.*with the positions of a pruned batch \({policy}, from 0\), its hidden states differ"
    with pytest.raises(PruningError, match=said):
        pruned.prepare(inputs)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["compact", "original"])
@pytest.mark.parametrize("name", ["gemma3", "internvl", "mistral3"])
def test_a_batch_padded_on_the_left_is_admitted(name, policy):
    pruned = PrunedModel(tiny(name), PruningSpec("divprune", 4, position_policy=policy))
    assert pruned.prepare(batch(name, side="left")).kept == {"image": [4] * 5}


def test_a_batch_that_the_stock_model_refuses_is_told_in_one_line():
    inputs = batch("internvl")
    inputs["input_ids"][0, 0] = 10**6  # no word of the vocabulary
    with pytest.raises(PruningError, match="stock model of model_type 'internvl' can't run this batch: ") as error:
        PrunedModel(tiny("internvl"), PruningSpec("divprune", 4)).prepare(inputs)
    assert "\n" not in str(error.value)


def test_positions_without_three_parts_are_refused_where_the_model_has_them():
    pruned, inputs = PrunedModel(tiny("glm4v"), PruningSpec("divprune", 4)), batch("glm4v")
    flat = torch.arange(inputs["input_ids"].shape[1]).expand(len(ROWS), -1)
    with pytest.raises(PruningError, match=r"`position_ids` must be \(3, batch, length\)"):
        pruned.prepare({**inputs, "position_ids": flat})


def test_a_trainer_is_compared_for_from_within_its_own_call(capsys):
    """Attached, in training mode, with a hook on the model that prunes."""
    model = tiny("internvl").train()
    with PrunedModel(model, PruningSpec("divprune", 4)).attach():
        model(**batch("internvl")).loss.backward()
    assert "bit for bit" in capsys.readouterr().out and model.training


def test_a_model_that_reads_more_than_features_is_refused():
    with pytest.raises(PruningError, match="'ovis2'.*can't be run.*visual_indicator_features.*write a family"):
        PrunedModel(tiny("ovis2"), PruningSpec("divprune", 4)).prepare(batch("ovis2"))


def test_a_model_that_comes_out_different_is_refused(monkeypatch):
    """One that reads the sizes of images outside its encoder, which pruning takes away."""
    model = tiny("mistral3")
    own = model.base_model.forward

    def forward(*args, image_sizes=None, mm_encoder_outputs=None, **kwargs):
        if mm_encoder_outputs is None:
            kwargs["position_ids"] = 2 * torch.arange(kwargs["input_ids"].shape[1])[None]
        return own(*args, image_sizes=image_sizes, mm_encoder_outputs=mm_encoder_outputs, **kwargs)

    model.base_model.forward = forward
    pruned = PrunedModel(model, PruningSpec("divprune", 4))
    for _ in range(2):  # a refusal is no admission
        with pytest.raises(PruningError, match="'mistral3'.*differ from the stock model's by up to [0-9.e-]+ on this"):
            pruned.prepare(batch("mistral3"))


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.zeros(32, 8), r"returns a tensor \(32, 8\) for its images"),
        (None, "returns a NoneType for its images"),
    ],
)
def test_features_without_items_are_refused(monkeypatch, features, said):
    model = tiny("internvl")
    own = model.base_model.get_image_features

    def encode(pixel_values, return_dict=True):
        output = own(pixel_values, return_dict=True)
        output.pooler_output = features
        return output

    model.base_model.get_image_features = encode
    with pytest.raises(PruningError, match=said):
        PrunedModel(model, PruningSpec("divprune", 4)).encode(batch("internvl"))


def test_levels_that_are_pairs_of_a_number_and_a_list_are_refused():
    """As Granite's are."""
    model = tiny("internvl")
    own = model.base_model.get_image_features

    def encode(pixel_values, return_dict=True):
        output = own(pixel_values, return_dict=True)
        output.deepstack_features = [(3, list(output.pooler_output))]
        return output

    model.base_model.get_image_features = encode
    with pytest.raises(PruningError, match="'internvl' has deepstack features of a layout of its own.*write a family"):
        PrunedModel(model, PruningSpec("divprune", 4)).encode(batch("internvl"))


def test_a_partitioned_model_is_refused():
    model = tiny("internvl")
    next(model.parameters()).ds_id = 0
    with pytest.raises(PruningError, match="'internvl'.*under ZeRO-3; train with train.deepspeed: zero2"):
        PrunedModel(model, PruningSpec("divprune", 4)).prepare(batch("internvl"))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("prumerge", "merges tokens before the projector"),
        ("fastervlm", "reads cls_attention"),
        ("random", "reads image_key"),
        ("cdpruner", "reads image_embeds, text_embeds"),
    ],
)
def test_methods_that_read_the_tower_are_refused_with_those_that_work(method, said):
    model = tiny("internvl")
    with pytest.raises(PruningError, match=rf"^{method} {said}, and family 'generic' sees.*choose .*divprune") as error:
        PrunedModel(model, PruningSpec(method, 4, text_tower="nowhere"))
    for name in str(error.value).split("choose ")[1].split(", or")[0].split(", "):
        PrunedModel(model, PruningSpec(name, 4), Words())


def test_an_architecture_that_takes_no_encoded_images_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    with pytest.raises(PruningError, match="model_type 'llama'.*get_image_features.*docs/adding.md"):
        family_of(model)


def test_the_projector_is_found_by_its_name_or_named():
    assert family_of(tiny("internvl")).projectors == ("multi_modal_projector",)
    assert family_of(tiny("glm4v")).projectors == ("visual.merger",)
    model = tiny("ovis2")
    with pytest.raises(PruningError, match="'ovis2'.*not clear: there is none of.*model.projector"):
        _ = family_of(model).projectors
    with pytest.raises(PruningError, match="no module 'merger' below the head; there are vision_tower"):
        name_projector(model, "merger")
    name_projector(model, "visual_embeddings_table")
    assert family_of(copy.deepcopy(model)).projectors == ("visual_embeddings_table",)
    model.base_model.aligner = model.base_model.projector = nn.Linear(2, 2)
    del model.prunetune_projector
    with pytest.raises(PruningError, match="there are projector and aligner; name it"):
        _ = family_of(model).projectors


def test_naming_the_projector_of_a_family_that_knows_it_is_refused(monkeypatch, model):
    monkeypatch.setattr(base, "registered_families", FAMILIES)
    with pytest.raises(PruningError, match="family 'llava' trains multi_modal_projector: leave it unset"):
        name_projector(model, "multi_modal_projector")


def test_text_alone_reaches_the_projector_in_training_where_a_blank_image_can_be_made():
    model = tiny("internvl").train().requires_grad_(False)
    projector = model.base_model.multi_modal_projector.requires_grad_(True)
    texts = batch("internvl", [ROWS[2]])
    with PrunedModel(model, PruningSpec("divprune", 4)).attach():
        loss = model(**texts).loss
    loss.backward()
    assert torch.equal(loss, model(**texts).loss)
    assert all(parameter.grad.abs().sum() == 0 for parameter in projector.parameters())
    with pytest.raises(PruningError, match="'mistral3'.*can't make a blank image.*leave samples without an image out"):
        PrunedModel(tiny("mistral3").train(), PruningSpec("divprune", 4)).prepare(batch("mistral3", [ROWS[2]]))


@pytest.mark.parametrize(
    ("counts", "shape"),
    [([4, 6], (5, 2, 3)), ([5, 5], (2, 5, 3)), ([0, 4], (1, 4, 3)), ([2, 3, 0], (5, 1, 3)), ([0, 0], (0, 1, 3))],
)
def test_blocks_hold_tokens_of_one_image(counts, shape):
    features = torch.arange(sum(counts) * 3.0).view(1, -1, 3)
    blocks = in_blocks(features, counts)
    assert tuple(blocks.shape) == shape and torch.equal(blocks.flatten(), features.flatten())


def test_the_configuration_names_the_projector(untrained_folder, monkeypatch):
    monkeypatch.setattr(base, "registered_families", FAMILIES)
    from prunetune.configs import ModelConfig
    from prunetune.models import Arm

    with pytest.raises(PruningError, match="model.projector is for models without a family of their own"):
        Arm.load(ModelConfig(path=str(untrained_folder), projector="multi_modal_projector"), device="cpu")
