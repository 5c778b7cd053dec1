"""Qwen2.5-VL: native resolution, ragged sizes in one batch, positions in three parts, images and videos."""

import pytest
import torch
from qwen_world import IMAGE, MIXED, ROWS, VIDEO, Row, batch, tiny_qwen

from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Vision, registered_methods
from prunetune.pruning.families import family_of

KEEP = 5


class Words:
    """A tokenizer of two words; for methods that read the instruction."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [7 + len(text) % 11, 9]}


def spec_of(name, keep=KEEP, **fields):
    options = {
        "hiprune": {"object_layer": 2},
        "vispruner": {"saliency": "received"},
        "crisprune": {"saliency": "received", "text": "llm"},
    }
    return PruningSpec(name, keep, options.get(name, {}), **fields)


def serves(name) -> bool:
    try:
        PrunedModel(MODEL, spec_of(name), Words())
    except PruningError:
        return False
    return True


MODEL = tiny_qwen()
NAMES = [name for name in registered_methods() if name != "identity" and serves(name)]
every_method = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("rows", [ROWS, MIXED], ids=["images", "mixed"])


@pytest.fixture(scope="module")
def model():
    return MODEL


@pytest.fixture(autouse=True)
def _as_loaded(model):
    """The stock model remembers positions of its last batch, and tests of training leave gradients."""
    model.model.rope_deltas = None
    yield
    model.eval().requires_grad_(True)
    model.zero_grad()


@pytest.fixture
def plug(model):
    return lambda name, keep=KEEP, **fields: PrunedModel(model, spec_of(name, keep, **fields), Words())


def with_texts(inputs):
    """A batch with an instruction per row, for methods that read it."""
    return {**inputs, "instructions": [f"question {'?' * row}" for row in range(len(inputs["input_ids"]))]}


def greedy(model, inputs, **options):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    return model.generate(**inputs, **settings, **options)


def test_methods_that_need_no_cls_are_served():
    assert {"divprune", "fps", "hiprune", "vispruner", "tome", "trimtokenator", "random", "downsample"} <= set(NAMES)
    assert not {"fastervlm", "prismprune", "prumerge", "visionzip"} & set(NAMES)
    with pytest.raises(PruningError, match="'qwen2_5_vl.*does not offer.*Methods that work there.*divprune"):
        PrunedModel(MODEL, PruningSpec("fastervlm", 4))


@torch.no_grad()
@both
@pytest.mark.parametrize("name", ["identity", *NAMES])
def test_keep_all_is_bit_identical_to_stock(model, plug, name, rows):
    inputs, prompts = batch(rows), batch(rows, "left", labels=False)
    pruned = plug(name, "100%")
    stock = model(**inputs)
    ours = pruned.forward(**with_texts(inputs))
    assert torch.equal(ours.logits, stock.logits) and torch.equal(ours.loss, stock.loss)
    theirs = greedy(model, prompts)[:, prompts["input_ids"].shape[1] :]
    model.model.rope_deltas = None
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    assert torch.equal(pruned.generate(**with_texts(prompts), **settings).tokens, theirs)


@torch.no_grad()
@both
@every_method
def test_pruned_equals_full_length_run_with_dropped_tokens_masked(model, plug, name, rows):
    """The stock model on the full sequence, with the dropped tokens hidden from everything else."""
    for row in rows:
        inputs = batch([row], labels=False)
        prepared = plug(name).prepare(with_texts(inputs))
        ours = model(**prepared.inputs).logits[0]
        model.model.rope_deltas = None
        positions = model.model.get_rope_index(**{k: v for k, v in inputs.items() if "pixel" not in k})[0]
        length = inputs["input_ids"].shape[1]
        visible = prepared.keep[0]
        mask = torch.ones(length, length).tril().bool() & visible[None, :] | torch.eye(length).bool()
        outputs = {}
        for modality, choice in prepared.chosen.items():
            output = getattr(model.model, f"get_{modality}_features")(
                inputs[family_of(model).pixels[modality]], inputs[f"{modality}_grid_thw"], return_dict=True
            )
            places, merged = choice.merged_tokens()
            full = [features.clone() for features in output.pooler_output]
            if len(places):
                made = dict(zip(places.tolist(), family_of(model).project(model, merged), strict=True))
                for features, origin in zip(full, choice.vision.origin, strict=True):
                    for place, number in enumerate(origin.tolist()):
                        features[place] = made.get(number, features[place])
            output.pooler_output = full
            outputs[modality] = output
        kwargs = {"mm_encoder_outputs": outputs} if outputs else {}
        reference = model(
            input_ids=inputs["input_ids"], attention_mask=mask[None, None], position_ids=positions, **kwargs
        )
        torch.testing.assert_close(ours, reference.logits[0, visible], rtol=1e-4, atol=1e-4)
        assert len(ours) == int(visible.sum()) and (len(ours) < length or not row.visuals)


@torch.no_grad()
@both
@every_method
def test_ragged_batch_equals_each_sample_alone(model, plug, name, rows):
    pruned = plug(name)
    inputs = with_texts(batch(rows))
    together = pruned.prepare(inputs)
    logits = model(**together.inputs).logits
    for number, row in enumerate(rows):
        own = {**batch([row]), "instructions": inputs["instructions"][number : number + 1]}
        alone = pruned.prepare(own)
        length = own["input_ids"].shape[1]
        assert torch.equal(together.keep[number, :length], alone.keep[0])
        real = together.inputs["attention_mask"][number].bool()
        torch.testing.assert_close(logits[number, real], model(**alone.inputs).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@both
@every_method
def test_generate_equals_step_by_step(model, plug, name, rows):
    prompts = with_texts(batch(rows, "left", labels=False))
    pruned = plug(name)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    generated = pruned.generate(**prompts, **settings).tokens
    for number, row in enumerate(rows):
        own = {**batch([row], labels=False), "instructions": prompts["instructions"][number : number + 1]}
        ids = own["input_ids"]
        for step in range(4):
            grown = {**own, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            grown["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
            logits = pruned.forward(**grown).logits[0, -1]
            logits[[2, IMAGE, VIDEO]] = float("-inf")
            assert logits.argmax() == generated[number, step]
            ids = torch.cat([ids, generated[number : number + 1, step : step + 1]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["divprune", "tome"])
def test_beams_equal_each_row_alone(plug, name):
    prompts = with_texts(batch(ROWS, "left", labels=False))
    pruned = plug(name)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = pruned.generate(**prompts, **settings, suppress_tokens=[IMAGE, VIDEO]).tokens
    for number, row in enumerate(ROWS):
        own = {**batch([row], "left", labels=False), "instructions": prompts["instructions"][number : number + 1]}
        alone = pruned.generate(**own, **settings, suppress_tokens=[IMAGE, VIDEO]).tokens
        assert torch.equal(together[number], alone[0])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@every_method
def test_gradients_reach_exactly_the_merger(model, plug, name, packed):
    model.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    model.train()
    with plug(name).attach(packed=packed):
        loss = model(**with_texts(batch(ROWS))).loss
    loss.backward()
    touched = {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {f"model.visual.merger.{part}" for part in ("ln_q", "mlp.0", "mlp.2")}
    assert all(p.grad.abs().sum() > 0 for p in model.model.visual.merger.parameters())


def test_packing_changes_neither_loss_nor_gradients(model, plug):
    """Every sample's positions begin anew, in all three parts."""
    model.requires_grad_(False)
    merger = model.model.visual.merger.requires_grad_(True)
    model.train()
    found = []
    for packed in (False, True):
        model.zero_grad()
        with plug("divprune").attach(packed=packed):
            loss = model(**batch(ROWS)).loss
        loss.backward()
        found.append((loss.detach(), merger.mlp[0].weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["divprune", "trimtokenator", "tome"])
def test_text_only_training_batch_has_a_zero_gradient_and_the_stock_loss(model, plug, name):
    model.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    model.train()
    inputs = batch([ROWS[1]])
    with plug(name).attach():
        loss = model(**with_texts(inputs)).loss
    loss.backward()
    assert torch.equal(loss, model(**inputs).loss)
    assert all(p.grad.abs().sum() == 0 for p in model.model.visual.merger.parameters())


@torch.no_grad()
def test_an_encoded_batch_from_disk_gives_the_same_logits(model, plug, tmp_path):
    """What is cached is plain data: no pixel is read again."""
    inputs = batch(MIXED)
    pruned = plug("hiprune")
    fresh = pruned.prepare(inputs)
    for modality, vision in pruned.encode(inputs).items():
        vision.save(tmp_path / modality)
    read = {modality: Vision.load(tmp_path / modality) for modality in ("image", "video")}
    without_pixels = {name: value for name, value in inputs.items() if "pixel" not in name}
    cached = pruned.prepare(without_pixels, vision=read)
    assert torch.equal(model(**cached.inputs).logits, model(**fresh.inputs).logits)
    other = pruned.prepare(without_pixels, vision=read, keep=3)
    assert other.kept["image"] == [3, 3] and pruned.prepare(inputs, keep=3).kept == other.kept


@torch.no_grad()
def test_signals_equal_the_models_own_attention(model, monkeypatch):
    """The softmax of the model's eager attention, one call per image, in the order of attention windows."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as module

    seen = []
    eager = module.eager_attention_forward

    def listening(layer, *args, **kwargs):
        output, weights = eager(layer, *args, **kwargs)
        if layer is eager_model.model.visual.blocks[1].attn:
            seen.append(weights[0])
        return output, weights

    eager_model = tiny_qwen(attention="eager")
    monkeypatch.setattr(module, "eager_attention_forward", listening)
    inputs = batch([ROWS[0], ROWS[2]])
    vision = PrunedModel(eager_model, spec_of("hiprune")).encode(inputs)["image"]
    assert [group.grid for group in vision.groups] == [(4, 6), (6, 4), (4, 4)] and len(seen) == 3
    order = family_of(model)._raster_order(model, inputs["image_grid_thw"])
    received = torch.cat([weights.mean(1) for weights in seen], dim=-1)  # (H, patches)
    expected = received.unflatten(1, (-1, 4)).mean(2)[:, order].split([24, 24, 16], dim=1)
    for group, own in zip(vision.groups, expected, strict=True):
        torch.testing.assert_close(group.signals["received_attention"][0], own, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_are_in_raster_order(plug):
    """A change of one patch of the picture changes the token at its place, in features and in slots."""
    row = Row((("image", (1, 8, 12), 1),), 4)
    inputs = batch([row])
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    token = 9  # row 1, column 3 of 4 x 6 tokens; its four patches follow one another
    changed["pixel_values"][4 * token + 2] += 5
    before, after = (plug("divprune").encode(own)["image"] for own in (inputs, changed))
    moved = (before.groups[0].features - after.groups[0].features)[0].norm(dim=-1)
    slots = (before.slots[0] - after.slots[0]).norm(dim=-1)
    assert int(moved.argmax()) == int(slots.argmax()) == token


@torch.no_grad()
def test_projecting_features_gives_the_projected_tokens(model, plug):
    for vision in plug("divprune").encode(batch(MIXED)).values():
        for group in vision.groups:
            again = family_of(model).project(model, group.features.flatten(0, 1))
            assert torch.equal(again, group.projected.flatten(0, 1))


@torch.no_grad()
def test_frames_of_a_video_share_a_budget_when_asked(plug):
    inputs = batch([MIXED[1]])
    assert plug("divprune", 4).prepare(inputs).kept["video"] == [8]  # two frames, four tokens each
    assert plug("divprune", 7, scope="image").prepare(inputs).kept["video"] == [7]


def test_small_images_are_named_or_kept_whole(plug):
    rows = (Row((("image", (1, 4, 4), 8),), 4, 7), ROWS[0])
    inputs = {**batch(rows), "sample_ids": ["small", "large"]}
    with pytest.raises(PruningError, match="^sample 'small': keep=9 asks for 9 visual tokens, but .* only 4"):
        plug("divprune", 9).prepare(inputs)
    assert plug("divprune", 9, small_images="keep_all").prepare(inputs).kept["image"] == [4, 9]


def test_positions_numbered_anew_are_refused(model):
    with pytest.raises(PruningError, match="can't have position_policy: compact.*original.*rows and columns"):
        PrunedModel(model, PruningSpec("divprune", 4, position_policy="compact"))


def test_placeholders_that_disagree_are_refused_by_modality(plug):
    inputs = batch(MIXED)
    inputs["input_ids"][1, 5] = 7
    with pytest.raises(PruningError, match="video placeholder tokens.*visual tokens per video"):
        plug("divprune").prepare(inputs)
