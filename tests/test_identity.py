"""Identity is sacred: what is not pruned is the stock model bit for bit, and pruning is nothing but dropping tokens."""

import pytest
import torch

from data_recipes import Sample, Turn
from pruning import PrunedModel, PruningError, PruningSpec
from pruning.sequence import shorten

SPECS = [
    PruningSpec("fastervlm", 16),
    PruningSpec("vispruner", 16),
    PruningSpec("prismprune", 15),
    PruningSpec("divprune", "10%"),
    PruningSpec("random", 0.2),
    PruningSpec("downsample", 9),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.pruner)


def greedy(model, inputs, count=5):
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("spec", [PruningSpec(), *[PruningSpec(s.pruner, 144) for s in SPECS]], ids=lambda s: s.pruner)
def test_keep_all_is_bit_identical_to_stock(model, formatter, samples, spec):
    batch = formatter.training_batch(samples)
    prompts = formatter.prompt_batch(samples)
    pruned = PrunedModel(model, spec)
    with torch.no_grad():
        stock, ours = model(**batch), pruned.forward(**batch)
        if spec.pruner == "downsample":  # it projects pooled features anew, as a product of another shape
            torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(ours.logits, stock.logits)
            assert torch.equal(ours.loss, stock.loss)
        assert torch.equal(
            pruned.generate(**prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False),
            greedy(model, prompts)[:, prompts["input_ids"].shape[1] :],
        )


@every_spec
def test_pruned_equals_full_length_run_with_dropped_tokens_masked(model, formatter, samples, spec):
    """With original positions, dropping tokens is the same as hiding them from everything else."""
    batch = formatter.training_batch(samples[:1])
    spec = PruningSpec(spec.pruner, spec.keep, position_policy="original")
    pruned = PrunedModel(model, spec)
    with torch.no_grad():
        prepared = pruned.prepare(batch)
        ours = model(**prepared.inputs)
        run = (batch["input_ids"][0] == 4).nonzero()[:, 0]
        kept = run[prepared.selection.of(0)]
        encoded = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
        features = encoded.pooler_output[0].clone()
        if prepared.selection.merged is not None:
            merged = model.model.multi_modal_projector(prepared.selection.merged[0])
            features[prepared.selection.of(0)] = merged
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[0, run] = features
        length = embeds.shape[1]
        visible = torch.ones(length, dtype=torch.bool)
        visible[run] = False
        visible[kept] = True
        mask = torch.ones(length, length).tril().bool() & visible[None, :] | torch.eye(length).bool()
        full = model(inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=torch.arange(length)[None])
    torch.testing.assert_close(ours.logits[0], full.logits[0, visible], rtol=1e-4, atol=1e-4)
    assert len(kept) < 144 and ours.logits.shape[1] == int(visible.sum())


@pytest.mark.parametrize("policy", ["compact", "original"])
@every_spec
def test_ragged_batch_equals_each_sample_alone(model, formatter, samples, spec, policy):
    text_only = Sample("t", "text", None, (Turn("what color is the red ring ?", "red"),))
    mixed = [samples[0], text_only, samples[1], samples[2]]
    pruned = PrunedModel(model, PruningSpec(spec.pruner, spec.keep, position_policy=policy))
    with torch.no_grad():
        together = pruned.prepare(formatter.training_batch(mixed))
        logits = model(**together.inputs).logits
        for row, sample in enumerate(mixed):
            alone = pruned.forward(**formatter.training_batch([sample])).logits[0]
            real = together.inputs["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row, real], alone, rtol=1e-4, atol=1e-4)


def test_several_images_in_one_row_keep_their_own_tokens(model, processor, samples, formatter):
    """Rows with two, no and one picture: each picture keeps K tokens at its own place."""
    one, two, three = (formatter.training_batch([sample]) for sample in samples)
    bare = formatter.training_batch([Sample("t", "text", None, samples[1].turns)])
    rows = [torch.cat([one["input_ids"][0], two["input_ids"][0]]), bare["input_ids"][0], three["input_ids"][0]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.cat([b["pixel_values"] for b in (one, two, three)]),
    }
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    with torch.no_grad():
        together = pruned.prepare(inputs)
        assert ((together.inputs["input_ids"] == 4).sum(dim=1)).tolist() == [32, 0, 16]
        logits = model(**together.inputs).logits
        first = {key: value[:1] for key, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][:2]}
        alone = pruned.forward(**first).logits[0]
    torch.testing.assert_close(logits[0, : len(alone)], alone, rtol=1e-4, atol=1e-4)


@every_spec
def test_generate_equals_step_by_step(model, formatter, samples, spec):
    prompts = formatter.prompt_batch(samples)
    pruned = PrunedModel(model, spec)
    with torch.no_grad():
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [4]}
        generated = pruned.generate(**prompts, **options)
        for row, sample in enumerate(samples):
            prompt = formatter.prompt_batch([sample])
            ids = prompt["input_ids"]
            for step in range(6):
                step_inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                logits = pruned.forward(**step_inputs).logits[0, -1]
                logits[[3, 4]] = float("-inf")  # no end before min_new_tokens, and no picture in an answer
                assert logits.argmax() == generated[row, step]
                ids = torch.cat([ids, generated[row : row + 1, step : step + 1]], dim=1)


def test_selection_does_not_depend_on_the_batch(model, formatter, samples):
    for spec in SPECS:
        pruned = PrunedModel(model, spec)
        together = pruned.prepare(formatter.training_batch(samples)).selection
        for row, sample in enumerate(samples):
            alone = pruned.prepare(formatter.training_batch([sample])).selection
            assert torch.equal(together.of(row), alone.of(0)), spec.pruner


def test_cls_attention_equals_the_eager_attention_weights(untrained_folder, formatter, samples):
    from transformers import LlavaForConditionalGeneration

    eager = LlavaForConditionalGeneration.from_pretrained(untrained_folder, attn_implementation="eager").eval()
    pixels = formatter.training_batch(samples)["pixel_values"]
    with torch.no_grad():
        maps = eager.model.vision_tower(pixel_values=pixels, output_attentions=True).attentions
        ours = PrunedModel(eager, PruningSpec("fastervlm", 16)).prepare(formatter.training_batch(samples))
    # The feature layer is hidden_states[-2], the output of the second-last layer, whose own attention this is.
    torch.testing.assert_close(ours.encoded.tokens.cls_attention, maps[-2][:, :, 0, 1:], rtol=1e-5, atol=1e-6)


def test_signals_are_computed_only_when_asked_for(model, formatter, samples):
    tokens = PrunedModel(model, PruningSpec("divprune", 16)).prepare(formatter.training_batch(samples)).encoded.tokens
    assert tokens.cls_attention is None and tokens.image_key is None


def test_training_through_an_attached_pruner_reaches_the_projector_alone(model, formatter, samples):
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    batch = formatter.training_batch(samples)
    with pruned.attach():
        attached = model(**batch).loss
        attached.backward()
    assert torch.equal(attached, pruned.forward(**batch).loss)
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None} == {"multi_modal_projector"}
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_text_only_training_batch_has_a_zero_gradient_and_the_stock_loss(model, formatter):
    batch = formatter.training_batch([Sample("t", "text", None, (Turn("what color is the red ring ?", "red"),))])
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    with PrunedModel(model, PruningSpec("divprune", 16)).attach():
        loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, model(**batch).loss)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() == 0


def test_stock_generate_on_an_attached_model_is_refused_instead_of_running_unpruned(model, formatter, samples):
    prompts = formatter.prompt_batch(samples)
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    with pruned.attach():
        with pytest.raises(PruningError, match=r"use|generate with PrunedModel.generate"):
            greedy(model, prompts)
        inside = pruned.generate(**prompts, max_new_tokens=4, do_sample=False)
    assert torch.equal(inside, pruned.generate(**prompts, max_new_tokens=4, do_sample=False))
    greedy(model, prompts)  # detached: stock again


def test_placeholders_and_images_that_disagree_are_refused(model, formatter, samples):
    batch = formatter.training_batch(samples)
    batch["input_ids"][1, 5] = 7
    with pytest.raises(PruningError, match="431 image placeholder tokens.*432 visual tokens.*143"):
        PrunedModel(model, PruningSpec("divprune", 16)).prepare(batch)


def test_a_missing_attention_mask_is_refused(model, formatter, samples):
    batch = formatter.training_batch(samples)
    del batch["attention_mask"]
    with pytest.raises(PruningError, match="attention_mask"):
        PrunedModel(model, PruningSpec("divprune", 16)).prepare(batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", ["compact", "original"])
def test_shorten_against_a_loop_over_rows(side, policy):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (6, 30), generator=generator)
    mask = torch.ones(6, 30, dtype=torch.long)
    for row in range(6):
        pad = int(torch.randint(0, 8, (1,), generator=generator))
        if pad:
            mask[row, (slice(0, pad) if side == "left" else slice(30 - pad, 30))] = 0
    labels = torch.where(torch.rand(6, 30, generator=generator) < 0.5, ids, -100)
    kept = torch.rand(6, 30, generator=generator) < 0.6
    result = shorten({"input_ids": ids, "attention_mask": mask, "labels": labels}, kept, policy, side)
    width = max(sum(1 for i in range(30) if kept[r, i] and mask[r, i]) for r in range(6))
    assert result["input_ids"].shape == (6, width)
    for row in range(6):
        start = int(mask[row].argmax())
        places = [i for i in range(30) if kept[row, i] and mask[row, i]]
        here = result["attention_mask"][row].bool()
        assert here.sum() == len(places)
        assert bool(here[-1] if side == "left" else here[0])
        assert result["input_ids"][row, here].tolist() == ids[row, places].tolist()
        assert result["labels"][row, here].tolist() == labels[row, places].tolist()
        assert (result["labels"][row, ~here] == -100).all()
        expected = list(range(len(places))) if policy == "compact" else [i - start for i in places]
        assert result["position_ids"][row, here].tolist() == expected
