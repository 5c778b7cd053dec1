"""The engine: every saving leaves loss and gradient as they are; and how an update is laid out."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import FEW, arguments, losses, run, run_several
from safetensors.torch import load_file

from prunetune.configs import ConfigError, EngineConfig, ModelConfig
from prunetune.data_recipes import Sample, Turn, load_recipe
from prunetune.models import Arm
from prunetune.pruning import PrunedModel, PruningError, PruningSpec
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.head import FrozenHeadLoss, plain_head
from prunetune.train.engine.layout import Share, by_budget, of_equal_number
from prunetune.train.engine.lengths import pruned_lengths
from prunetune.train.engine.prefix import common_prefix
from prunetune.train.engine.tower import unread_layers

SWITCHES = {"packing": True, "supervised_logits": True, "shared_prefix": True, "project_kept": True, "stop_tower": True}
PLAIN = dict.fromkeys(SWITCHES, False)
LONG = Turn("you are asked about a scene , look closely and answer in a word or two . what color is it ?", "red")


@pytest.fixture
def batch(reading, samples):
    """Conversations that begin alike, of unlike length, one of them without a picture."""
    texts = [Turn(LONG.question + extra, answer) for extra, answer in (("", "red"), (" is it small ?", "no red blue"))]
    rows = [Sample(str(n), "vg", samples[n].image, (texts[n % 2], *samples[n].turns[: n + 1])) for n in range(3)]
    return reading.training_batch([*rows, Sample("t", "text", None, (texts[1],))])


def trained(folder, processor, name, batch, *, dtype=torch.float64, prefix=True, policy="auto", **switches):
    """Return loss, gradient and engine of one batch under some switches."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    spec = PruningSpec(name, 16, position_policy=policy)
    pruned = PrunedModel(model, spec, processor.tokenizer)
    config = EngineConfig(**{**PLAIN, **switches})
    ids = batch["input_ids"][0, :9] if prefix else None
    engine = Engine(pruned, config, ids)
    head = head_of(pruned, config, partitioned=False)
    floats = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    with engine.attached(), engine.own_head(head):
        loss = engine.summed_loss(model, floats)
        loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "multi_modal_projector" not in n)
    gradient = torch.cat([p.grad.flatten() for p in model.model.multi_modal_projector.parameters()])
    return loss.detach(), gradient, engine


@pytest.fixture
def text_first(batch):
    """The same rows with the picture behind their first words, as prompts with a system text have it."""
    moved = dict(batch)
    image = 4
    for name in ("input_ids", "labels"):
        moved[name] = batch[name].clone()
    for row in range(3):
        ids = batch["input_ids"][row]
        at = (ids == image).nonzero()[:, 0]
        words = ids[at[-1] + 1 : at[-1] + 11].clone()
        moved["input_ids"][row, at[0] : at[0] + 10] = words
        moved["input_ids"][row, at[0] + 10 : at[-1] + 11] = image
    return moved


@pytest.mark.parametrize(
    ("name", "switch"),
    [*(("vispruner", switch) for switch in SWITCHES), ("vispruner", "all"), ("visionzip", "all"), ("divprune", "all")],
)
def test_every_saving_leaves_loss_and_gradient_as_they_are(untrained_folder, processor, text_first, switch, name):
    """In float64, where nothing but arithmetic that differs could show; float32 is held to its own rounding."""
    on = SWITCHES if switch == "all" else {switch: True, "packing": switch in ("packing", "shared_prefix")}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        loss, gradient, plain = trained(untrained_folder, processor, name, text_first, dtype=dtype)
        other, found, engine = trained(untrained_folder, processor, name, text_first, dtype=dtype, **on)
        torch.testing.assert_close(other, loss, rtol=tolerance, atol=0)
        assert (found - gradient).norm() <= tolerance * gradient.norm()
    assert engine.choice.project_kept == (on.get("project_kept", False) and name != "divprune")
    assert (engine.rows.tokens < plain.rows.tokens) == on["packing"]


def test_the_shared_prefix_is_left_out_of_every_row(untrained_folder, processor, text_first):
    own, shared = (
        trained(untrained_folder, processor, "divprune", text_first, packing=True, shared_prefix=on)[2].rows.tokens
        for on in (False, True)
    )
    assert own - shared == 4 * 9
    other = {**text_first, "input_ids": text_first["input_ids"].clone()}
    other["input_ids"][3, 4] += 1  # one row begins otherwise, and nothing is shared
    assert (
        trained(untrained_folder, processor, "divprune", other, packing=True, shared_prefix=True)[2].rows.tokens == own
    )


def test_original_positions_can_be_packed(untrained_folder, processor, text_first):
    """Samples are told apart by where they are, not by gaps between positions."""
    options = {"policy": "original"}
    loss, gradient, _ = trained(untrained_folder, processor, "divprune", text_first, **options)
    other, found, _ = trained(untrained_folder, processor, "divprune", text_first, **options, **SWITCHES)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    assert (found - gradient).norm() <= 1e-12 * gradient.norm()


def test_the_plain_path_is_the_stock_loss(untrained_folder, processor, batch, model):
    loss, _, engine = trained(untrained_folder, processor, "divprune", batch, dtype=torch.float32)
    with PrunedModel(model, PruningSpec("divprune", 16), processor.tokenizer).attach():
        stock = model(**batch).loss
    torch.testing.assert_close(loss / len(engine.rows.targets), stock.detach(), rtol=1e-6, atol=0)


def test_a_batch_without_any_target_has_a_gradient_of_zero(untrained_folder, processor, batch):
    batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for switches in (PLAIN, SWITCHES):
        _, gradient, _ = trained(untrained_folder, processor, "divprune", batch, prefix=False, **switches)
        assert not gradient.isnan().any()


def test_vision_layers_behind_the_last_one_read_do_not_run(model, processor):
    assert len(unread_layers(PrunedModel(model, PruningSpec("divprune", 16), processor.tokenizer))) == 1
    assert not unread_layers(PrunedModel(model, PruningSpec("hiprune", 16, options={"object_layer": 5})))


def test_logits_of_a_head_that_does_more_are_left_to_the_model(model):
    assert plain_head(model) is model.lm_head
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: out.clamp(-1, 1))
    assert plain_head(model) is None
    handle.remove()
    assert plain_head(model) is model.lm_head
    stock = model.forward

    def softened(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.forward = softened
    assert plain_head(model) is None


@given(st.integers(1, 2500), st.booleans())
def test_the_loss_in_pieces_is_cross_entropy(positions, has_bias):
    torch.manual_seed(positions)
    hidden = torch.randn(positions, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(11, 8, dtype=torch.float64), torch.randn(11, dtype=torch.float64) if has_bias else None
    targets = torch.randint(11, (positions,))
    (FrozenHeadLoss.apply(hidden, weight, bias, targets) * 3).backward()
    mine, hidden.grad = hidden.grad, None
    loss = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)[torch.arange(positions), targets]
    (-3 * loss.sum()).backward()
    torch.testing.assert_close(mine, hidden.grad, rtol=1e-10, atol=1e-12)


def test_prompts_begin_with_what_all_rows_do():
    ids = torch.tensor([[1, 5, 6, 7, 9, 3], [1, 5, 6, 7, 8, 9]])
    mask, none = torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, -100)
    assert common_prefix(ids, none, mask, [9]).tolist() == [1, 5, 6]
    assert common_prefix(ids, none, mask, [6]).tolist() == [1]
    labels = none.clone()
    labels[1, 2] = 6
    assert common_prefix(ids, labels, mask, [9]).tolist() == [1]


# ---- how an update is laid out ------------------------------------------------------------------------------------

updates = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(updates, st.integers(90, 400), st.integers(1, 4), st.booleans())
def test_a_budget_holds_every_sample_once_and_is_never_passed(lengths, budget, ranks, padded):
    shares = by_budget(range(len(lengths)), lengths, budget, ranks, padded)
    taken = [index for share in shares for batch in share if batch.counts for index in batch.indices]
    assert sorted(taken) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1  # all ranks run the model equally often
    for batch in (batch for share in shares for batch in share):
        own = [lengths[index] for index in batch.indices]
        assert (len(own) * max(own) if padded else sum(own)) <= budget
    if not padded and ranks == 1 and len(lengths) > 1:
        # Never more than twice the parts that would hold all tokens if samples could be cut.
        assert len(shares[0]) <= 2 * -(-sum(lengths) // budget)


@given(st.integers(1, 70), st.integers(1, 8), st.integers(1, 4))
def test_without_a_budget_micro_batches_are_of_equal_number(samples, size, ranks):
    shares = of_equal_number(range(samples), size, ranks)
    assert len({len(share) for share in shares}) == 1
    sizes = [len(batch.indices) for share in shares for batch in share if batch.counts]
    assert sum(sizes) == samples and max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_a_budget_below_one_sample_is_one_line():
    with pytest.raises(ConfigError, match="token_budget 50 is less than one sample: the longest has 61 tokens"):
        Share(0, 2, 4, 1, budget=50).of([0, 1], [20, 61])


def test_what_can_not_be_packed_says_so(model):
    pruned = PrunedModel(model, PruningSpec("divprune", 16))
    pruned.family.aligned = {"token_type_ids": 0}
    try:
        assert not Engine(pruned, EngineConfig()).choice.packing
        with pytest.raises(PruningError, match="can't be packed: by token_type_ids"):
            Engine(pruned, EngineConfig(packing=True))
    finally:
        del pruned.family.aligned


def test_lengths_before_a_run_are_those_of_its_pruned_rows(untrained_folder):
    arm = Arm.load(ModelConfig(path=str(untrained_folder), dtype="float32"), PruningSpec("vispruner", 16), device="cpu")
    data = load_recipe(str(FEW), max_samples=12)
    formatter = arm.formatter(data.images)
    lengths = pruned_lengths(data, formatter, arm.pruned, None)
    for number, length in enumerate(lengths):
        rows = arm.pruned.prepare(arm.place(formatter.training_batch([data[number]]))).inputs
        assert int(rows["attention_mask"].sum()) == length
    assert pruned_lengths(data, formatter, arm.pruned, 8) == [8 + 16] * 12  # never fewer than there may be


def test_a_budget_that_no_update_could_keep_stops_before_the_first(untrained_folder, tmp_path):
    printed = run(untrained_folder, tmp_path / "run", "--engine.token_budget", "20", world=1, status=1)
    assert re.search("error: engine.token_budget 20 is less than one sample: the longest has [0-9]+ tokens", printed)
    assert not (tmp_path / "run" / "adapter").exists() and not list((tmp_path / "run").glob("checkpoint-*"))


# ---- launched ------------------------------------------------------------------------------------------------------


def test_an_update_is_the_same_however_it_is_laid_out(untrained_folder, tmp_path):
    """16 samples an update: 1 x 16, 2 x 8 and 8 x 2, by budget, over 1 and 2 ranks, under ZeRO-1, 2 and 3."""
    layouts = {
        1: {"1x16": ("16", "1", "zero1"), "8x2": ("2", "8", "zero2"), "budget": ("16", "1", "zero1")},
        2: {"2x8": ("8", "1", "zero2"), "8x2": ("1", "8", "zero1"), "zero3": ("4", "2", "zero3")},
    }
    found = {}
    for ranks, runs in layouts.items():
        lines = []
        for name, (size, accumulation, stage) in runs.items():
            output = tmp_path / str(ranks) / name
            budget = ("--engine.token_budget", "200") if name == "budget" else ()
            layout = ("--train.batch_size", size, "--train.accumulation", accumulation, "--train.deepspeed", stage)
            lines.append(arguments(untrained_folder, output, *layout, *budget, "--train.max_steps", "3"))
            found[ranks, name] = output
        run_several(lines, ranks)
    first, *others = found.values()
    norms = [
        [json.loads(row)["grad_norm"] for row in (run / "log.jsonl").read_text().splitlines()] for run in found.values()
    ]
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in found.values()]
    for other, norm, tensors in zip(others, norms[1:], weights[1:], strict=True):
        assert losses(other) == pytest.approx(losses(first), rel=1e-5)
        assert norm == pytest.approx(norms[0], rel=1e-4)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, weights[0][name], rtol=1e-3, atol=1e-5)
