"""Qwen2.5-VL: native resolution, ragged sizes in one batch, positions in three parts, images and videos."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from family_world import WITHOUT_CLS
from qwen_world import IMAGE, KEEP, MANY_MIXED, MIXED, ROWS, VIDEO, QwenImages, Row, batch, tiny_qwen

from prunetune.pruning import PrunedModel, PruningError, PruningSpec, registered_methods
from prunetune.pruning.families import family_of
from prunetune.testing.families import Words


def spec_of(name, keep=KEEP, **fields):
    return PruningSpec(name, keep, WITHOUT_CLS.get(name, {}), **fields)


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


class TestImages(QwenImages):
    """The suite of every family, on images of different sizes."""


class TestVideos(TestImages):
    """The same with videos, in one sequence with images and alone."""

    visuals = MANY_MIXED


def test_methods_that_need_no_cls_are_served():
    assert {"divprune", "fps", "hiprune", "vispruner", "tome", "trimtokenator", "random", "downsample"} <= set(NAMES)
    assert not {"fastervlm", "prismprune", "prumerge", "visionzip"} & set(NAMES)
    with pytest.raises(PruningError, match="'qwen2_5_vl.*does not offer.*Methods that work there.*divprune"):
        PrunedModel(MODEL, PruningSpec("fastervlm", 4))


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
            for among, selection in zip(choice.candidates, choice.selections, strict=True):
                for item, weights in enumerate(selection.mixing or ()):  # of a whole clip or image, frame by frame
                    number = among.images[item]
                    full[number][selection.origin[item]] = weights @ output.pooler_output[number]
            output.pooler_output = full
            outputs[modality] = output
        kwargs = {"mm_encoder_outputs": outputs} if outputs else {}
        reference = model(
            input_ids=inputs["input_ids"], attention_mask=mask[None, None], position_ids=positions, **kwargs
        )
        torch.testing.assert_close(ours, reference.logits[0, visible], rtol=1e-4, atol=1e-4)
        assert len(ours) == int(visible.sum())
        # Methods that keep the first frame whole keep images whole.
        whole = hasattr(plug(name).pruner, "least") and all(kind == "image" for kind, *_ in row.visuals)
        assert len(ours) < length or not row.visuals or whole


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


@every_method
def test_gradients_reach_exactly_the_merger(model, plug, name):
    model.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    model.train()
    with plug(name).attach():
        loss = model(**with_texts(batch(ROWS))).loss
    loss.backward()
    touched = {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {f"model.visual.merger.{part}" for part in ("ln_q", "mlp.0", "mlp.2")}
    assert all(p.grad.abs().sum() > 0 for p in model.model.visual.merger.parameters())


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
    order = family_of(model).raster_order(model, inputs["image_grid_thw"])
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


@torch.no_grad()
def test_budgets_of_a_video_count_for_frames_clips_or_seconds(plug):
    """Of each frame of each video the number of kept tokens; the clips have 3 frames of 16 and 2 of 24 tokens."""
    inputs = batch(MIXED)

    def kept(keep=4, seconds=None, **fields):
        given = inputs if seconds is None else {**inputs, "video_seconds": seconds}
        prepared = plug("divprune", keep, **fields).prepare(given)
        assert prepared.kept["video"] == [sum(frames) for frames in prepared.kept_per_frame]
        return prepared.kept_per_frame

    assert kept() == kept(video_budget="frame") == [[4, 4, 4], [4, 4]]
    assert kept(7, video_budget="clip") == [[2, 2, 3], [3, 4]]
    assert kept(video_budget="second") == [[4, 4, 4], [4, 4]]  # second_per_grid_ts is 1
    assert kept(video_budget="second", seconds=[2.0, 3.3]) == [[2, 3, 3], [6, 7]]
    assert kept("25%", video_budget="second") == [[4, 4, 4], [6, 6]]
    for unit, totals in (("auto", [7, 7]), ("frame", [21, 14]), ("clip", [7, 7]), ("second", [14, 21])):
        pooled = kept(7, scope="image", video_budget=unit, seconds=[2.0, 3.0])
        assert [sum(frames) for frames in pooled] == totals, unit
    assert kept(16, video_budget="second", seconds=[9.0, 1.0], small_images="keep_all") == [[16, 16, 16], [8, 8]]
    generated = plug("divprune", 7, video_budget="clip").generate(**batch(MIXED, "left", False), max_new_tokens=1)
    assert (
        generated.kept_per_frame == [[2, 2, 3], [3, 4]] and plug("divprune").prepare(batch(ROWS)).kept_per_frame == []
    )


def test_budgets_of_videos_that_do_not_fit_are_refused_in_a_line(plug):
    inputs = {**batch(MIXED), "sample_ids": ["a", "b", "c"]}
    del inputs["second_per_grid_ts"]
    with pytest.raises(PruningError, match=r"^sample 'a': video_budget: second needs .* `video_seconds`.*set pruning"):
        plug("divprune", 7, video_budget="second").prepare(inputs)
    with pytest.raises(PruningError, match="says how long 1 videos are, and the batch has 2"):
        plug("divprune", 7, video_budget="second").prepare({**inputs, "video_seconds": [1.0]})
    with pytest.raises(PruningError, match=r"^sample 'a': keep=7 a second asks for 63 visual tokens in 9 s.*only 48"):
        plug("divprune", 7, video_budget="second").prepare({**inputs, "video_seconds": [9.0, 1.0]})
    with pytest.raises(PruningError, match=r"^sample 'a': keep=2 is 2 visual tokens for a video of 3 frames.*scope"):
        plug("divprune", 2, video_budget="clip").prepare(inputs)


def test_lengths_and_positions_of_another_shape_are_refused_in_a_line(plug):
    inputs = batch(MIXED)
    one_more = torch.cat([inputs["second_per_grid_ts"], torch.ones(1)])
    flat = torch.arange(inputs["input_ids"].shape[1]).expand(len(MIXED), -1)
    for name, value, said in (
        ("second_per_grid_ts", one_more, "`second_per_grid_ts` is of 3 videos, and the batch has 2"),
        ("video_seconds", [None, 2.0], r"`video_seconds` is \[None, 2.0\]: give one number per video"),
        ("position_ids", flat, r"`position_ids` must be \(3, batch, length\).* got \(3, "),
        ("position_ids", flat[None].expand(2, -1, -1), r"`position_ids` must be .* got \(2, 3, "),
    ):
        with pytest.raises(PruningError, match=said) as error:
            plug("divprune", 4).prepare({**inputs, name: value})
        assert "\n" not in str(error.value)


def test_ranks_of_zero3_read_text_and_project_in_one_order(model, monkeypatch):
    """Images and videos, images alone, and neither: the text is read for each modality before tokens are projected."""
    monkeypatch.setattr("prunetune.pruning.preparing.is_partitioned", lambda _: True)
    pruned = PrunedModel(model, PruningSpec("tome", 8))
    calls = []
    add, project = pruned.text.add, type(pruned.family).project
    monkeypatch.setattr(pruned.text, "add", lambda *args: (calls.append("text"), add(*args))[1])
    monkeypatch.setattr(type(pruned.family), "project", lambda *args: (calls.append("project"), project(*args))[1])
    model.train()
    found = []
    for rows in (MIXED, ROWS, [ROWS[1]]):
        pruned.prepare(batch(rows))
        found.append(calls.copy())
        calls.clear()
    model.eval()
    assert found == [["text", "text", "project", "project"]] * 3


def test_stored_images_are_refused_in_training_under_zero3(model, plug, monkeypatch):
    inputs, pruned = batch(ROWS), plug("divprune", 4)
    stored = pruned.encode(inputs)
    without = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
    monkeypatch.setattr("prunetune.pruning.preparing.is_partitioned", lambda _: True)
    pruned.prepare(without, vision=stored)  # at rest nobody waits
    model.train()
    with pytest.raises(PruningError, match="stored images can't be trained on under ZeRO-3.*zero2"):
        pruned.prepare(without, vision=stored)
    model.eval()


@torch.no_grad()
def test_plain_positions_of_text_alone_reach_the_model_as_they_are(model, plug):
    inputs = batch([ROWS[1]] * 4)
    flat = torch.arange(inputs["input_ids"].shape[1]).expand(4, -1)
    ours = plug("divprune", 4).prepare({**inputs, "position_ids": flat}).inputs
    assert torch.equal(ours["position_ids"], flat)


@torch.no_grad()
def test_frames_of_unequal_budgets_keep_what_they_keep_among_equals(model, plug):
    """Dealt out unevenly: each frame keeps what the method, run on all frames, keeps with that frame's budget."""
    inputs = {**batch([MIXED[0]]), "instructions": ["q"]}
    dealt = plug("divprune", 8, video_budget="clip").prepare(inputs)
    assert dealt.kept_per_frame == [[2, 3, 3]]
    kept = dealt.chosen["video"].kept_tokens().view(3, 16)
    for frame, number in enumerate((2, 3, 3)):
        equal = plug("divprune", number).prepare(inputs).chosen["video"].kept_tokens().view(3, 16)
        assert torch.equal(kept[frame], equal[frame])


def test_a_method_for_videos_is_given_whole_clips(plug):
    """Frames in order of time, what belongs to frames with an axis of them, the instruction once per clip."""
    from dataclasses import dataclass
    from typing import ClassVar

    from prunetune.pruning import Selection, register_pruner, registry

    seen = []

    @register_pruner("clip_spy", paper="test", video=True)
    @dataclass(frozen=True)
    class Spy:
        needs: ClassVar[frozenset] = frozenset({"image_key", "received_attention", "text_token_embeds"})

        def __call__(self, tokens, keep):
            seen.append((tokens, keep))
            return Selection(torch.arange(keep).expand(len(tokens.features), -1))

    try:
        rows = (*MIXED, Row((("video", (3, 8, 8), 15),), 5, 9))
        pruned = plug("clip_spy", 4)
        inputs = with_texts(batch(rows))
        prepared = pruned.prepare(inputs)
        assert prepared.kept == {"image": [4, 4], "video": [12, 8, 12]}
        image, three, two = (tokens for tokens, _ in sorted(seen, key=lambda call: call[0].frames != 1)[1:])
        assert (image.frames, image.grid) == (1, (4, 4)) and [keep for _, keep in seen] == [4, 4, 12, 8]
        assert (three.frames, three.per_frame, three.grid, two.frames, two.grid) == (3, 16, (4, 4), 2, (4, 6))
        assert three.signals["image_key"].shape == (2, 3) and three.signals["received_attention"].shape == (2, 4, 48)
        words = three.signals["text_token_embeds"]
        assert words.ndim == 3 and len(words) == 2 and not torch.equal(words[0], words[1])  # of rows 0 and 3
        plain = pruned.encode(inputs)["video"].groups[0]  # the frames of both clips of 4 x 4, one after the other
        assert torch.equal(three.features, plain.features.view(2, 48, -1))
        assert torch.equal(three.signals["image_key"].flatten(), plain.signals["image_key"])
        # What is kept of a clip among others is what is kept of it alone.
        alone = pruned.prepare(with_texts(batch([rows[-1]])))
        assert torch.equal(seen[-1][0].features[0], three.features[1]) and alone.kept["video"] == [12]
    finally:
        del registry._METHODS["clip_spy"]


@torch.no_grad()
@pytest.mark.parametrize("unit", ["frame", "clip"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vidcom2", {"count": "published"}),
        ("fastvid", {"count": "published", "segments": 2}),
        ("evs", {"prune_rate": 0.6}),
        ("dycoke", {"merge_ratio": 0.7, "groups": "published"}),
    ],
)
def test_published_counts_run_on_clips_and_images_of_any_size(model, name, options, unit):
    """Counts that differ from clip to clip: each row of a batch keeps what it keeps alone, and the logits agree."""
    rows = (*MIXED, Row((("video", (4, 8, 8), 31),), 6, 11), Row((("video", (3, 8, 8), 32),), 3, 12))
    pruned = PrunedModel(model, PruningSpec(name, 8, options, video_budget=unit))
    together = pruned.prepare(batch(rows))
    logits = model(**together.inputs).logits
    assert together.kept["video"] == [sum(frames) for frames in together.kept_per_frame]
    for number, row in enumerate(rows):
        alone = pruned.prepare(batch([row]))
        length = len(row.ids())
        assert torch.equal(together.keep[number, :length], alone.keep[0])
        real = together.inputs["attention_mask"][number].bool()
        torch.testing.assert_close(logits[number, real], model(**alone.inputs).logits[0], rtol=1e-4, atol=1e-4)


def test_fastvid_trains_the_projector_as_its_means_written_out(model):
    """The gradient of kept features is that of means of the stock model's features of the whole clip."""
    inputs = batch([Row((("video", (3, 8, 8), 32),), 3, 12)])
    projector = model.model.visual.merger.requires_grad_(True)
    weight = next(parameter for parameter in projector.parameters() if parameter.ndim == 2)
    prepared = PrunedModel(model, PruningSpec("fastvid", 5, {"segments": 1, "threshold": -1.0})).prepare(inputs)
    (selection,) = prepared.chosen["video"].selections
    (mixing,) = selection.mixing
    assert mixing.shape == (15, 48) and not mixing.requires_grad
    assert int((mixing > 0).sum()) > 15  # something is merged
    ours = prepared.inputs["mm_encoder_outputs"]["video"].pooler_output
    ours = (ours if isinstance(ours, torch.Tensor) else torch.cat(list(ours))).flatten(0, -2)
    target = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((ours * target).sum(), weight)

    stock = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    outputs = []
    for token, own in zip(selection.of(0).tolist(), mixing, strict=True):
        sources = own.nonzero()[:, 0].tolist()
        assert token in sources
        outputs.append(sum(own[source] * stock.pooler_output[0][source] for source in sources))
    torch.testing.assert_close(ours, torch.stack(outputs))
    (expected,) = torch.autograd.grad((torch.stack(outputs) * target).sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_fastvid_without_a_pooling_head_is_refused(model):
    with pytest.raises(
        PruningError, match="FastVID reads head_attention, head_feature, which the vision tower 'qwen2_5"
    ):
        PrunedModel(model, PruningSpec("fastvid", 4, {"frames": "pooling_head"}))


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


@torch.no_grad()
def test_positions_of_stock_generation_are_taken_as_the_models_own(model, plug):
    """Four rows: one counts tokens, three are the positions."""
    inputs = batch(ROWS, labels=False)
    pruned = plug("divprune")
    own = pruned.family.positions(model, inputs)
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = pruned.prepare({**inputs, "position_ids": torch.cat([counted[None], own])})
    assert torch.equal(given.inputs["position_ids"], pruned.prepare(inputs).inputs["position_ids"])


@torch.no_grad()
def test_stored_images_meet_the_projector_of_now(model, plug):
    """A projector that was tuned after images were stored is applied to them, and gradients reach it."""
    inputs = batch(MIXED)
    pruned = plug("divprune")
    stored = pruned.encode(inputs)
    without_pixels = {name: value for name, value in inputs.items() if "pixel" not in name}
    bias = model.model.visual.merger.mlp[2].bias
    kept = bias.clone()
    bias.add_(0.3)
    try:
        fresh = pruned.forward(**inputs).logits
        model.model.rope_deltas = None
        assert torch.equal(pruned.forward(**without_pixels, vision=stored).logits, fresh)
    finally:
        bias.copy_(kept)
    model.requires_grad_(False)
    bias.requires_grad_(True)
    with torch.enable_grad():
        pruned.forward(**without_pixels, vision=stored).loss.backward()
    assert bias.grad.abs().sum() > 0


@torch.no_grad()
def test_a_budget_is_given_to_a_single_call(plug):
    prompts = batch(ROWS, "left", labels=False)
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    one, other = plug("divprune", 3), plug("divprune", 5)
    assert one.generate(**prompts, **settings, keep=5).kept == other.generate(**prompts, **settings).kept
    logits = other.forward(**batch(ROWS)).logits
    assert torch.equal(one.forward(**batch(ROWS), keep=5).logits, logits)


@torch.no_grad()
def test_deepstack_levels_are_cut_with_the_slots(model, plug):
    """Of each level the features of the slots that stay, image by image; they bypass the projector."""
    pruned = plug("divprune")
    inputs = batch(ROWS)
    vision = pruned.encode(inputs)["image"]
    levels = tuple(tuple(features + level for features in vision.slots) for level in (1.0, 2.0))
    without_pixels = {name: value for name, value in inputs.items() if "pixel" not in name}
    prepared = pruned.prepare(without_pixels, vision={"image": replace(vision, levels=levels)})
    output = prepared.inputs["mm_encoder_outputs"]["image"]
    for level, own in zip((1.0, 2.0), output.deepstack_features, strict=True):
        for features, cut in zip(output.pooler_output, own, strict=True):
            assert len(cut) == KEEP and torch.equal(cut, features + level)


@contextmanager
def modules_called(model):
    """Collect the paths of a model's modules in the order in which they are called."""
    order = []
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, path=path: order.append(path)))
    yield order
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["divprune", "tome", "trimtokenator"])
def test_ranks_call_every_module_equally_often_when_weights_are_gathered_in_step(model, plug, name):
    """Under ZeRO-3 a rank with images alone calls what a rank with images and videos does; loss and gradient stay."""
    model.requires_grad_(False)
    model.model.visual.merger.requires_grad_(True)
    model.train()
    found, calls = {}, {}
    parameter = next(model.parameters())
    for partitioned in (False, True):
        if partitioned:
            parameter.ds_id = 0
        for kind, row in (("both", MIXED[0]), ("video", MIXED[1]), ("image", MIXED[2]), ("text", ROWS[1])):
            model.zero_grad()
            with plug(name).attach(), modules_called(model) as order:
                loss = model(**with_texts(batch([row]))).loss
            loss.backward()
            gradients = [p.grad.clone() for p in model.model.visual.merger.parameters()]
            if partitioned:
                calls[kind] = order
                for one, other in zip([loss, *gradients], found[kind], strict=True):
                    assert torch.equal(one, other), kind
            found[kind] = [loss, *gradients]
    del parameter.ds_id
    assert calls["both"] == calls["video"] == calls["image"] == calls["text"]
    assert calls["both"].count("model.visual.merger") >= 2
