"""`prunetune profile`: what is computed is what torch counts and what caches hold; rounds, load, files, columns."""

import json
import threading
import types
from dataclasses import replace

import pytest
import torch
from conftest import spec_of
from gemma_world import tiny_gemma3
from idefics_world import tiny_idefics
from qwen_world import tiny_qwen
from stage_world import LAYERS
from stage_world import tiny_llava as staged_llava
from test_flops import tiny_llava
from test_llava_next import _small_model
from test_tables import table

from prunetune.cli import main
from prunetune.configs import ConfigError
from prunetune.evaluation.report.comparison import read_table
from prunetune.models.blueprint import model_without_weights, pruned_without_tokenizer
from prunetune.pruning import PruningSpec
from prunetune.pruning.spec import StageSpec
from prunetune.scripts.profiling import energy
from prunetune.scripts.profiling.accounting import cache_bytes, decode_flop, flop_of, prefill_flop, same_everywhere
from prunetune.scripts.profiling.columns import measured_columns
from prunetune.scripts.profiling.energy import energy_counter
from prunetune.scripts.profiling.load import run_load
from prunetune.scripts.profiling.make import computed_table, profile_table
from prunetune.scripts.profiling.measure import Settings, Subject, in_turn, measure
from prunetune.scripts.profiling.record import Number, read_costs
from prunetune.scripts.profiling.requests import MadeUp
from prunetune.scripts.profiling.stages import STAGES, generated, generated_by_stock, staged
from prunetune.scripts.tables.make import make_table
from prunetune.train.flops import Work, image
from prunetune.train.shape import shape_of

MODELS = {
    "llava": tiny_llava,
    "llava, sdpa": lambda: tiny_llava("sdpa"),
    "llava_next": _small_model,
    "gemma3": tiny_gemma3,
    "gemma3, short window": lambda: tiny_gemma3(window=8),
    "qwen2_5_vl": tiny_qwen,
    "qwen3_vl": lambda: tiny_qwen(kind="qwen3_vl"),
    "smolvlm": lambda: tiny_idefics("smolvlm"),
}


def hooks_of(model):
    return [[*module._forward_pre_hooks, *module._forward_hooks] for module in model.modules()]


def subject(model, spec, text=10, side=32):
    pruned = pruned_without_tokenizer(model, spec)
    return Subject(spec.pruner, spec.pruner, spec, pruned, MadeUp(pruned, text, side))


@pytest.fixture(scope="module")
def llava():
    return tiny_llava("sdpa")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_is_what_torch_counts_and_what_the_cache_holds(name):
    model = MODELS[name]()
    arms = [subject(model, PruningSpec()), subject(model, spec_of("random", keep=4))]
    for arm in measure(arms, Settings(sizes=(2,), repeats=1, warmup=0, new_tokens=4), print):
        (cost,) = arm.batches
        assert set(cost.counted) == {*STAGES, "decode"} and cost.layers == [cost.tokens] * len(cost.layers)
        for part, computed in cost.flop.items():
            # Rotary angles are a product that no weight is in, and [CLS] is computed as a patch of pixels: in models as
            # narrow as these both are seen.
            assert cost.counted[part] == pytest.approx(computed, rel=0.02), part
        assert cost.cache_measured == cost.cache
        assert cost.same_as_stock in (None, True)
    dense, fewer = arms[0].ready[0], arms[1].ready[0]
    assert dense.model is fewer.model and not dense.model._forward_pre_hooks


STAGED = {
    "fastv": [{"name": "fastv", "boundaries": [2], "average": 9}],
    "pyramiddrop": [{"name": "pyramiddrop", "boundaries": [1, 3, 4]}],
    "dart": [{"name": "dart", "boundaries": [2], "keep": 8, "options": {"image_pivots": 2, "text_pivots": 1}}],
    "sparsevlm": [{"name": "sparsevlm", "boundaries": [2, 4], "keep": [10, 5]}],
    "vtw": [{"name": "vtw", "boundaries": [3]}],
    "both": [{"name": "fastv", "boundaries": [2], "keep": 3}, {"name": "vtw", "boundaries": [4]}],
}


@pytest.mark.parametrize("name", STAGED)
def test_layers_behind_stages_cost_what_torch_counts_and_their_caches_hold(name):
    model = staged_llava()
    stages = [StageSpec(**stage) for stage in STAGED[name]]
    spec = PruningSpec("divprune", 12, stages=stages) if name == "both" else PruningSpec(stages=stages)
    arms = [subject(model, PruningSpec()), replace(subject(model, spec), row=name)]
    dense, arm = measure(arms, Settings(sizes=(2,), repeats=1, warmup=0, new_tokens=4), print)
    (cost,), (beside,) = arm.batches, dense.batches
    text = beside.tokens - 16
    assert len(cost.layers) == LAYERS and cost.layers[0] == cost.tokens and cost.layers[-1] < cost.tokens
    assert cost.average == pytest.approx(sum(cost.layers) / LAYERS - text)
    for part, computed in cost.flop.items():
        assert cost.counted[part] == pytest.approx(computed, rel=0.03), part
    assert cost.cache_measured == cost.cache < beside.cache
    # What a stage reads and chooses is the pruner's own, and not among the parts; withdrawing all reads nothing.
    assert (cost.counted["inside"] > 0) == (name != "vtw") and "inside" in cost.stages
    assert beside.counted["inside"] == 0 and beside.average is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_fewer_tokens_in_later_layers_cost_what_those_layers_do(llava):
    """The seam of stages inside the LLM: a list of tokens by layer."""
    language = shape_of(llava).language
    for cost in (prefill_flop, lambda *a: decode_flop(*a, 5), lambda *a: cache_bytes(*a, 2)):
        many, few = cost(language, [40, 40]), cost(language, [12, 12])
        assert cost(language, [40, 12]) == (many + few) / 2 and few < many
    # By hand: two projections of 32 x 32, two of 32 x 16 (grouped keys), three of 32 x 48; four heads of 8; 64 words.
    linear = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert prefill_flop(language, [40, 12]) == 2 * linear * 52 + 4 * 32 * (40**2 + 12**2) + 2 * 32 * 64
    assert decode_flop(language, [40, 12], 3) == 2 * (4 * linear + 2 * 32 * 64) + 4 * 32 * (41 + 42 + 13 + 14)
    assert cache_bytes(language, [40, 12], 2) == 2 * 16 * 2 * 52
    with pytest.raises(ValueError, match="3 numbers of tokens were given for 2 layers"):
        prefill_flop(language, [40, 12, 3])


KNOWN = {2880: 42.61, 640: 9.32, 320: 5.00, 160: 2.88, 576: 8.45, 192: 3.30, 128: 2.45, 64: 1.61, 32: 1.20}
STEPS = {2880: 14.76, 640: 13.58, 320: 13.41, 160: 13.33, 576: 13.55, 192: 13.35, 128: 13.31, 64: 13.28, 32: 13.26}


def test_the_7b_shape_costs_the_known_figures():
    """Prefill in T and a decode step in G, with 60 text tokens; counted by torch on the meta device elsewhere."""
    shape = shape_of(model_without_weights("llava-hf/llava-1.5-7b-hf"))
    for tokens, prefill in KNOWN.items():
        crops = 5 if tokens in (2880, 640, 320, 160) else 1
        layers = same_everywhere(shape, tokens + 60)
        found = flop_of(shape, image(577, crops) + Work(projected=576), layers, new_tokens=2)
        assert found.prefill / 1e12 == pytest.approx(prefill, abs=0.006)
        assert found.decode / 1e9 == pytest.approx(STEPS[tokens], abs=0.006)
        assert found.tower / 1e12 == pytest.approx(0.382 * crops, rel=0.002)
        assert found.projector / 1e9 == pytest.approx(24.2, abs=0.1)
        visual = cache_bytes(shape.language, layers, 2) - cache_bytes(shape.language, same_everywhere(shape, 60), 2)
        assert visual == tokens * 2**19


@torch.inference_mode()
def test_stages_add_up_and_leave_the_model_as_it_was(llava):
    arm = subject(llava, spec_of("divprune", keep=4))
    pruned, requests = arm.ready
    inputs, before = requests.batch(range(3)), hooks_of(llava)
    readings = []

    def now():
        readings.append(2.0 ** len(readings))  # no two differences are alike
        return readings[-1]

    seen = staged(pruned, inputs, now)
    gap = readings[-2] - readings[-3]  # between the preparation and the prefill
    assert sum(seen.spent.values()) == readings[-1] - readings[0] - gap
    assert all((seen.spent[stage] > 0) == (stage != "inside") for stage in STAGES)
    again = pruned.prepare(inputs, padding_side="left")
    assert torch.equal(seen.prepared.inputs["input_ids"], again.inputs["input_ids"])
    assert torch.equal(seen.prepared.inputs["position_ids"], again.inputs["position_ids"])
    assert hooks_of(llava) == before
    assert type(pruned.pruner).__name__ == "DivPrune"


@torch.inference_mode()
def test_an_answer_has_its_length_and_the_dense_one_is_the_stock_models(llava):
    pruned, requests = subject(llava, PruningSpec()).ready
    inputs = requests.batch(range(2))
    ours, stock = (run(pruned, inputs, 5, lambda: 0.0) for run in (generated, generated_by_stock))
    assert ours.tokens.shape == (2, 5) and torch.equal(ours.tokens, stock.tokens)


def test_every_arm_is_first_as_often_as_any_other():
    orders = [in_turn([None] * 3, number) for number in range(6)]
    assert sorted(order[0] for order in orders) == [0, 0, 1, 1, 2, 2]
    assert all(sorted(order) == [0, 1, 2] for order in orders)


@pytest.mark.parametrize(("count", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33))])
def test_the_interval_of_a_median_is_the_tables_of_order_statistics(count, ranks):
    found = Number.of(list(range(count, 0, -1)))
    assert (found.low, found.high) == ranks and found.whole and found.median == (count + 1) / 2


def test_few_rounds_have_a_range_and_no_interval():
    assert Number.of([3, 1, 2, 5, 4]) == Number(median=3, low=1, high=5, values=5, whole=False)
    assert Number.of([7.0]) == Number(median=7, low=7, high=7, values=1, whole=False)


def test_under_load_every_request_is_answered_once_by_one_thread():
    answered, threads = [], set()

    def answer(numbers):
        threads.add(threading.get_ident())
        answered.append(list(numbers))

    load = run_load(answer, clients=5, requests=23, at_most=3)
    assert sorted(number for batch in answered for number in batch) == list(range(23)) and len(threads) == 1
    assert load.batches == [len(batch) for batch in answered] and max(load.batches) <= 3
    assert len(load.waits) == 23 and 0 < load.waited(0.5) <= load.waited(0.95) <= load.seconds
    assert load.rate == 23 / load.seconds


def test_batches_fill_where_many_wait():
    gate = threading.Event()

    def answer(numbers):
        gate.wait(0.05)  # the first batch lets the others come in

    assert max(run_load(answer, clients=8, requests=24, at_most=4).batches) == 4


def test_a_failure_under_load_ends_the_round_and_is_raised():
    def answer(numbers):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_load(answer, clients=4, requests=50, at_most=2)


def test_energy_is_read_where_the_driver_tells_it(monkeypatch):
    assert energy_counter(torch.device("cpu")) == (None, "energy is measured on NVIDIA GPUs alone")
    gpu = torch.device("cuda:0")
    driver = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-1-2": 2500}[handle],
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(energy.importlib, "import_module", lambda name: driver)
    joules, why = energy_counter(gpu)
    assert (joules(), why) == (2.5, "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="3"))
    assert energy_counter(gpu)[0] is None and "the driver does not tell it" in energy_counter(gpu)[1]

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(energy.importlib, "import_module", missing)
    assert "pynvml is not installed" in energy_counter(gpu)[1]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A table with an arm that can't run, profiled once."""
    config = table(tmp_path_factory.mktemp("profiled") / "out", methods=["fastervlm", "divprune", "trim"], limit=8)
    how = Settings(sizes=(1, 2), repeats=2, warmup=0, new_tokens=3, clients=3, requests=6, at_most=2, rounds=1)
    return config, profile_table(config, how, "cpu")


def test_every_arm_of_a_table_is_measured_beside_dense(profiled, capsys):
    _, folder = profiled
    costs = read_costs(folder / "profile.json")
    (model,) = costs.models
    dense, fastervlm, divprune, trim = model.arms
    assert [arm.row for arm in model.arms] == ["dense", "fastervlm_16", "divprune_16", "trim_16"]
    assert "text tower" in trim.refused and trim.batches == [] and trim.load is None
    assert [batch.size for batch in dense.batches] == [1, 2]
    for batch in dense.batches:
        assert batch.same_as_stock and batch.over_stock["decode"].values == 2 and batch.faster == {}
    for arm in (fastervlm, divprune):
        assert [batch.kept for batch in arm.batches] == [16, 16]
        for batch, beside in zip(arm.batches, dense.batches, strict=True):
            assert beside.tokens - batch.tokens == 144 - 16
            assert set(batch.faster) == {"prefill", "first token", "decode", "end to end"} and batch.peak is None
            assert batch.flop["tower"] == beside.flop["tower"] and batch.flop["prefill"] < beside.flop["prefill"]
            assert batch.cache_measured == batch.cache == beside.cache * batch.tokens / beside.tokens
        assert arm.load.faster.values == 1 and 1 <= arm.load.batch <= 2 and arm.load.joules is None
    # The N x N similarities of 144 tokens, 128 wide, of which torch counts every product.
    assert divprune.batches[0].counted["selection"] >= 2 * 144**2 * 128
    assert fastervlm.batches[0].counted["selection"] == 0 < fastervlm.batches[0].counted["signals"]
    page = (folder / "profile.md").read_text()
    assert (
        "| fastervlm, 16 | 16 | " in page and "* trim, 16: not measured: " in page and "makes the same tokens" in page
    )
    assert any("peak memory is not measured" in note for note in costs.notes) and "| equal | - |" in page


def test_a_profile_that_was_edited_is_refused(profiled, tmp_path):
    text = (profiled[1] / "profile.json").read_text()
    edited = json.loads(text)
    edited["models"][0]["arms"][1]["batches"][0]["prefill"]["median"] = 0.1
    newer = text.replace('"format": 1', '"format": 9', 1)
    cases = ((json.dumps(edited), "was changed after it"), ("{}", "is no profile"), (newer, "has format 9, this"))
    for content, why in cases:
        (tmp_path / "profile.json").write_text(content)
        with pytest.raises(ConfigError, match=why):
            read_costs(tmp_path / "profile.json")


def test_a_table_shows_what_was_profiled_of_its_arms(profiled):
    """The table goes on in the folder that the profile began, without the arm that can't be."""
    config, folder = profiled
    own = config.model_copy(update={"methods": [method for method in config.methods if method.pruner != "trim"]})
    assert make_table(own).failed == {} and (folder / "profile.json").is_file()
    shown = read_table(folder)
    costs = read_costs(folder / "profile.json")
    for arm in costs.models[0].arms[:3]:
        row = next(row for row in shown.rows if row.method == arm.label.split(",")[0])
        assert row.costs["prefill ms"].value == arm.batches[0].prefill.median
        assert row.costs["prefill ms"].interval is None  # of two rounds there is none
        assert row.costs["KV MiB"].value == arm.batches[0].cache / 2**20
        assert row.costs["requests/s under load"].value == arm.load.rate.median and "TFLOPs" in row.costs
    assert any("measured by prunetune profile" in note for note in shown.footnotes)


def test_a_profile_says_nothing_of_other_weights_or_another_pruning(profiled):
    costs = read_costs(profiled[1] / "profile.json")
    (model,) = costs.models
    asked = (model.config, model.frozen_hash, model.arms[1].pruning)
    assert measured_columns(costs, *asked)["KV MiB"].value == model.arms[1].batches[0].cache / 2**20
    other = {0: model.config.model_copy(update={"dtype": "bfloat16"}), 1: "0" * 64, 2: spec_of("fastervlm", keep=17)}
    for place, value in other.items():
        assert measured_columns(costs, *[value if at == place else own for at, own in enumerate(asked)]) is None
    assert measured_columns(costs, *asked[:2], model.arms[3].pruning) is None  # which could not be measured
    drawn = costs.model_copy(update={"models": [model.model_copy(update={"random_weights": True})]})
    assert measured_columns(drawn, *asked) is None


def test_random_weights_need_no_data(tmp_path):
    config = table(tmp_path / "out", tasks=["pope"], methods=["fastervlm", "trim"])
    how = Settings(sizes=(2,), repeats=1, warmup=0, new_tokens=2)
    (model,) = read_costs(profile_table(config, how, "cpu", random_weights=True, text=7) / "profile.json").models
    assert model.random_weights and model.frozen_hash is None and model.arms[2].refused is not None
    assert [arm.batches[0].tokens for arm in model.arms[:2]] == [144 + 7, 16 + 7]


def test_crops_of_a_made_up_image_follow_its_size():
    requests = subject(_small_model(), PruningSpec(), text=4, side=32).requests
    batch = requests.batch([0, 1])
    assert batch["pixel_values"].shape == (2, 5, 3, 16, 16) and batch["image_sizes"].tolist() == [[32, 32]] * 2
    assert torch.equal(batch["pixel_values"], requests.batch([0, 1])["pixel_values"])


def test_the_shape_alone_gives_a_table_and_writes_nothing(tmp_path):
    config = table(tmp_path / "out", models=[{"model": {"path": "llava-hf/llava-v1.6-vicuna-7b-hf"}}],
                   methods=[{"pruner": "vispruner", "pruning": {"newline": "none"}}], budgets=[128, 32])  # fmt: skip
    page = computed_table(config, new_tokens=16, text=60, side=672)
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in page.splitlines() if line.startswith("| ")}
    assert lines["vispruner, 128"][1] == "640" and lines["vispruner, 128"][4] == "9.32"
    assert lines["vispruner, 32"][1] == "160" and lines["vispruner, 32"][4] == "2.88"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sizes", "0"], "--sizes is one batch size or several with commas, as 1,16; got '0'"),
    (["--new-tokens", "1"], "--new-tokens is at least 2, the first token and one to decode; got 1"),
    (["--clients", "-1"], "--clients is at least 0, got -1"),
])  # fmt: skip
def test_wrong_options_are_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["profile", "--config", "tables/tiny", *arguments])
    assert message in str(ended.value) + capsys.readouterr().err
