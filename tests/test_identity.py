"""Identity is sacred: what is not pruned is the stock model bit for bit, and pruning is nothing but dropping tokens."""

from dataclasses import replace

import pytest
import torch
from conftest import scene_sample, spec_of

from prunetune.data_recipes import Sample, Turn
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Vision, registered_methods
from prunetune.pruning.sequence import shorten

NAMES = [name for name, method in registered_methods().items() if name != "identity" and not method.video]
every_method = pytest.mark.parametrize("name", NAMES)


def greedy(model, inputs, count=5):
    return model.generate(**stock(inputs), max_new_tokens=count, min_new_tokens=count, do_sample=False)


def stock(batch):
    """A batch as the unpruned model takes it."""
    return {key: value for key, value in batch.items() if key not in ("instructions", "sample_ids")}


def selection(prepared):
    """What was kept of the images of a batch; they are all of one size here."""
    (only,) = prepared.selections["image"]
    return only


@pytest.fixture
def plug(model, processor):
    return lambda name, keep=16, **fields: PrunedModel(model, spec_of(name, keep, **fields), processor.tokenizer)


@pytest.mark.parametrize("name", ["identity", *NAMES])
def test_keep_all_is_bit_identical_to_stock(model, reading, samples, plug, name):
    batch = reading.training_batch(samples)
    prompts = reading.prompt_batch(samples)
    pruned = plug(name, 144)
    with torch.no_grad():
        theirs, ours = model(**stock(batch)), pruned.forward(**batch)
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(
            pruned.generate(**prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False).tokens,
            greedy(model, prompts)[:, prompts["input_ids"].shape[1] :],
        )


@every_method
def test_pruned_equals_full_length_run_with_dropped_tokens_masked(model, reading, samples, plug, name):
    """With original positions, dropping tokens is the same as hiding them from everything else."""
    batch = reading.training_batch(samples[:1])
    pruned = plug(name, position_policy="original")
    with torch.no_grad():
        prepared = pruned.prepare(batch)
        ours = model(**prepared.inputs)
        run = (batch["input_ids"][0] == 4).nonzero()[:, 0]
        chosen = selection(prepared)
        kept = run[chosen.of(0)]
        encoded = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
        features = encoded.pooler_output[0].clone()
        if chosen.merged is not None:
            features[chosen.slots_of(0)] = model.model.multi_modal_projector(chosen.merged[0])
        if chosen.mixing is not None:
            features[chosen.slots_of(0)] = chosen.mixing[0] @ encoded.pooler_output[0]
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
@every_method
def test_ragged_batch_equals_each_sample_alone(model, reading, samples, plug, name, policy):
    text_only = Sample("t", "text", None, (Turn("what color is the red ring ?", "red"),))
    mixed = [samples[0], text_only, samples[1], samples[2]]
    pruned = plug(name, position_policy=policy)
    with torch.no_grad():
        together = pruned.prepare(reading.training_batch(mixed))
        logits = model(**together.inputs).logits
        for row, sample in enumerate(mixed):
            alone = pruned.forward(**reading.training_batch([sample])).logits[0]
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


@every_method
def test_generate_equals_step_by_step(model, reading, samples, plug, name):
    prompts = reading.prompt_batch(samples)
    pruned = plug(name)
    with torch.no_grad():
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [4]}
        generated = pruned.generate(**prompts, **options).tokens
        for row, sample in enumerate(samples):
            prompt = reading.prompt_batch([sample])
            ids = prompt["input_ids"]
            for step in range(6):
                step_inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                logits = pruned.forward(**step_inputs).logits[0, -1]
                logits[[3, 4]] = float("-inf")  # no end before min_new_tokens, and no picture in an answer
                assert logits.argmax() == generated[row, step]
                ids = torch.cat([ids, generated[row : row + 1, step : step + 1]], dim=1)


@every_method
def test_selection_does_not_depend_on_the_batch_and_is_the_same_in_training_and_inference(reading, samples, plug, name):
    pruned = plug(name)
    with torch.no_grad():
        together = selection(pruned.prepare(reading.training_batch(samples)))
        for row, sample in enumerate(samples):
            for batch in (reading.training_batch([sample]), reading.prompt_batch([sample])):
                assert torch.equal(together.of(row), selection(pruned.prepare(batch)).of(0))


@every_method
def test_answers_never_reach_the_pruner(reading, plug, name):
    """The same first question keeps the same tokens, whatever the answers and the questions that give them away."""
    pruned = plug(name)
    kept = []
    for answer, later in (("northwest", ""), ("large blue square", ""), ("southeast", "what color is the northwest ?")):
        sample = scene_sample(10_000_002, "where is the circle ?", answer)
        more = (Turn(later, "red"),) if later else ()
        sample = Sample(sample.id, sample.source, sample.image, (*sample.turns, *more))
        batch = reading.training_batch([sample])
        assert batch["instructions"] == ["where is the circle ?"]
        with torch.no_grad():
            kept.append(selection(pruned.prepare(batch)))
    for other in kept[1:]:
        assert torch.equal(kept[0].of(0), other.of(0))
        if kept[0].merged is not None:
            assert torch.equal(kept[0].merged[0], other.merged[0])


@every_method
def test_every_method_can_be_trained_through(model, reading, samples, plug, name):
    """Gradients reach all of the projector and nothing else; the choice of tokens carries none."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    batch = reading.training_batch(samples)
    seen = []
    with plug(name).attach(seen.append):
        before = model(**batch).loss
        before.backward()
        kept = selection(seen[0])
        assert all(not row.requires_grad for row in kept.indices)
        touched = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None}
        assert touched == {"multi_modal_projector"}
        assert all(p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vscan", {"shallow_layer": 2}),
        ("holov", {"order": "published"}),
        ("holov", {"runs": 2, "overflow": "published", "order": "published"}),
        ("prunesid", {"order": "published"}),
    ],
)
def test_tokens_merged_after_the_projector_train_it_as_written_out(model, reading, samples, processor, name, options):
    """The loss and the projector's gradient are those of outputs that are put into the sequence by hand."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    pruned = PrunedModel(model, PruningSpec(name, 40, options), processor.tokenizer)
    batch = reading.training_batch(samples)
    prepared = pruned.prepare(batch)
    model(**prepared.inputs).loss.backward()
    gradient = projector.linear_1.weight.grad.clone()
    projector.zero_grad()

    chosen, inputs = selection(prepared), prepared.inputs
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    projected = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
    for row, image in enumerate(projected):
        if chosen.mixing is None:
            outputs = projector(chosen.merged[row])
        else:
            outputs = torch.zeros(40, image.shape[1])
            for output, token in chosen.mixing[row].nonzero().tolist():
                outputs[output] = outputs[output] + chosen.mixing[row][output, token] * image[token]
        order = list(range(40)) if chosen.in_order else chosen.origin[row].argsort()
        embeds[row, inputs["input_ids"][row] == 4] = outputs[order]
    kept = ("attention_mask", "position_ids", "labels")
    model(inputs_embeds=embeds, **{key: inputs[key] for key in kept}).loss.backward()
    torch.testing.assert_close(gradient, projector.linear_1.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["divprune", "trim", "trimtokenator", "crisprune"])
def test_text_only_training_batch_has_a_zero_gradient_and_the_stock_loss(model, reading, plug, name):
    batch = reading.training_batch([Sample("t", "text", None, (Turn("what color is the red ring ?", "red"),))])
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    with plug(name).attach():
        loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, model(**stock(batch)).loss)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() == 0


def test_stock_generate_on_an_attached_model_is_refused_instead_of_running_unpruned(model, formatter, samples):
    prompts = formatter.prompt_batch(samples)
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    with pruned.attach():
        with pytest.raises(PruningError, match=r"use|generate with PrunedModel.generate"):
            greedy(model, prompts)
        inside = pruned.generate(**prompts, max_new_tokens=4, do_sample=False).tokens
    assert torch.equal(inside, pruned.generate(**prompts, max_new_tokens=4, do_sample=False).tokens)
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
    full = (mask.cumsum(1) - 1).clamp(min=0)
    positions = full if policy == "original" else None
    result = shorten({"input_ids": ids, "attention_mask": mask, "labels": labels}, kept, positions, side)
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


def test_inputs_that_follow_the_sequence_are_cut_with_it_or_named(model, formatter, samples, monkeypatch):
    """Gemma3 and PaliGemma build their masks from token types: left as long as before they would be wrong, silently."""
    batch = formatter.training_batch(samples)
    batch["token_type_ids"] = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    assert "token_type_ids" not in pruned.prepare(batch).inputs  # Llava does not read them
    monkeypatch.setattr(type(pruned.family), "aligned", {"token_type_ids": 7})
    prepared = pruned.prepare(batch)
    for row in range(3):
        real = prepared.inputs["attention_mask"][row].bool()
        kept = prepared.keep[row] & batch["attention_mask"][row].bool()
        assert torch.equal(prepared.inputs["token_type_ids"][row, real], batch["token_type_ids"][row, kept])
        assert (prepared.inputs["token_type_ids"][row, ~real] == 7).all()
    monkeypatch.setattr(type(pruned.family), "aligned", {})
    monkeypatch.setattr(type(pruned.family), "unread", ())
    with pytest.raises(PruningError, match="'token_type_ids' has the sequence's shape.*`aligned`"):
        pruned.prepare(batch)


def test_a_modality_that_the_family_does_not_prune_is_refused(model, formatter, samples):
    batch = formatter.training_batch(samples)
    batch["pixel_values_videos"] = torch.zeros(1, 2, 3, 84, 84)
    with pytest.raises(PruningError, match="'llava' prunes images.*'pixel_values_videos', which would run unpruned"):
        PrunedModel(model, PruningSpec("divprune", 16)).prepare(batch)


def test_images_in_a_later_turn_are_refused(model, formatter, samples):
    prompts = stock(formatter.prompt_batch(samples))
    with PrunedModel(model, PruningSpec("divprune", 16)).attach(), torch.no_grad():
        cache = model(**prompts).past_key_values
        with pytest.raises(PruningError, match="images in a later turn"):
            model(**prompts, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["divprune", "crisprune", "tome"])
def test_encoded_images_from_disk_give_the_same_logits(model, reading, samples, plug, tmp_path, name):
    """Plain data: written, read back, pruned to any budget, without a pixel."""
    batch = reading.training_batch(samples)
    pruned = plug(name)
    pruned.encode(batch)["image"].save(tmp_path / "vision.pt")
    vision = Vision.load(tmp_path / "vision.pt")
    without_pixels = {key: value for key, value in batch.items() if key != "pixel_values"}
    cached = pruned.prepare(without_pixels, vision={"image": vision})
    assert torch.equal(model(**cached.inputs).logits, pruned.forward(**batch).logits)
    few = pruned.prepare(without_pixels, vision={"image": vision}, keep="5%")
    assert few.kept["image"] == [7, 7, 7] and pruned.prepare(batch, keep=7).kept == few.kept


@pytest.mark.parametrize("name", ["holov", "promprune", "prunesid"])
def test_published_orders_are_refused_where_positions_are_those_of_the_slots(model, name):
    with pytest.raises(
        PruningError, match=f"{name} hands tokens on in an order of its own.*: set position_policy: com"
    ):
        PrunedModel(model, PruningSpec(name, 8, {"order": "published"}, position_policy="original"))
    PrunedModel(model, PruningSpec(name, 8, {"order": "published"}))
    PrunedModel(model, PruningSpec(name, 8, {"order": "raster"}, position_policy="original"))


def test_a_selection_in_an_order_of_its_own_is_refused_there_too(model, reading, samples):
    """Of a method whose options do not say it."""
    pruned = PrunedModel(model, PruningSpec("divprune", 8, position_policy="original"))
    own = pruned.pruner
    pruned.pruner = lambda tokens, keep: replace(own(tokens, keep), in_order=True)
    pruned.pruner.needs = own.needs
    with pytest.raises(PruningError, match="divprune hands tokens on in an order of its own"):
        pruned.prepare(reading.training_batch(samples[:2]))


def test_a_file_that_holds_no_images_is_refused_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code of a file was run",))

    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"no file")
    for name in ("evil", "other", "broken", "missing"):
        with pytest.raises(PruningError, match="holds no encoded images"):
            Vision.load(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("name", ["sources", "level_features", "layers"])
def test_images_that_an_earlier_release_wrote_are_to_be_encoded_again(name, reading, samples, plug, tmp_path):
    """Whatever the default of a field is: without it, levels would not be projected anew."""
    vision = plug("fastervlm").encode(reading.training_batch(samples[:2]))["image"]
    del vars(vision.groups[0] if name == "layers" else vision)[name]
    torch.save(vision, tmp_path / "earlier.pt")
    with pytest.raises(PruningError, match=rf"earlier.pt was written by another release.* no {name}; encode"):
        Vision.load(tmp_path / "earlier.pt")


def test_what_stays_of_the_sequence_is_said(model, reading, samples, plug):
    """``keep`` aligns the pruned run with the full one: a teacher's positions, reports, masks."""
    text_only = Sample("t", "text", None, (Turn("what color is the red ring ?", "red"),))
    batch = reading.training_batch([samples[0], text_only, samples[1]])
    with torch.no_grad():
        prepared = plug("fastervlm").prepare(batch)
    for row in range(3):
        real = prepared.inputs["attention_mask"][row].bool()
        kept = prepared.keep[row] & batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row, kept], prepared.inputs["input_ids"][row, real])
        assert torch.equal(batch["labels"][row, kept], prepared.inputs["labels"][row, real])
    assert prepared.keep[1].all() and int((~prepared.keep).sum()) == 2 * (144 - 16)
