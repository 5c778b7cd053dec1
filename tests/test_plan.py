"""The plan of a recalibration, held against processors, saved tensors and known figures."""

import json
from functools import cache

import pytest
import torch
from conftest import ROOT
from test_flops import tiny_llava

from prunetune.cli import main
from prunetune.configs import RecalibrateConfig, load_config
from prunetune.data_recipes import load_recipe
from prunetune.models import blueprint
from prunetune.models.blueprint import formatter_without_model
from prunetune.pruning import PruningError, PruningSpec
from prunetune.scripts.planned import written
from prunetune.train.flops import Work, flops_of, image
from prunetune.train.gpus import GPUS
from prunetune.train.memory import GIB, layer_activations, memory_needs
from prunetune.train.plan import as_computed, prediction
from prunetune.train.plan import make_plan as plan_of
from prunetune.train.sampling import samples_per_step
from prunetune.train.shape import shape_of
from prunetune.train.visual import Visual, tower_work, visual_of
from prunetune.train.workload import estimated_lengths, workload_of_data

model_without_weights = cache(blueprint.model_without_weights)
LLAVA = "llava-hf/llava-1.5-7b-hf"
TINY = "recalibrate/tiny_divprune_16"
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 50}  # fmt: skip


def saved_bytes(kind, layers, dtype, tokens=128, **more):
    """Return what a frozen LLM saves of a token for the backward pass to its inputs, each storage once."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=layers, **SMALL, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held, saved = [], {}

    def pack(tensor):
        held.append(tensor)  # so that no storage is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(1, tokens, 64, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(inputs_embeds=hidden, use_cache=False)
    return model, sum(saved.values()) / tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Qwen2", {}), ("Qwen3", {"head_dim": 16})])
def test_activations_of_a_frozen_layer_are_those_that_autograd_saves(kind, more, dtype):
    from prunetune.train.shape import _language

    _, few = saved_bytes(kind, 2, dtype, **more)
    model, many = saved_bytes(kind, 4, dtype, **more)
    ours = layer_activations(_language(model, model.model), dtype.itemsize)
    # Beside it each norm keeps one number a row, which is nothing at real widths.
    assert ours <= (many - few) / 2 <= 1.02 * ours


@pytest.fixture(scope="module")
def shape():
    return shape_of(model_without_weights(LLAVA))


def test_the_largest_budget_is_where_memory_ends_and_checkpointing_begins(shape):
    needs = memory_needs(shape, "bfloat16", visual_share=0.15, item_share=1 / 420, patches=577)
    for gib in (22, 40, 80):
        largest = needs.largest_token_budget(gib * GIB)
        assert needs.fits(largest, gib * GIB, False) and not needs.fits(largest + 1, gib * GIB, False)
        assert not needs.needs_checkpointing(largest, gib * GIB) and needs.needs_checkpointing(largest + 1, gib * GIB)
        assert needs.largest_token_budget(gib * GIB, checkpointing=True) > 5 * largest
    assert needs.largest_token_budget(12 * GIB) == 0 and needs.needs_checkpointing(1, 12 * GIB)


def test_memory_by_part_is_what_dtype_and_stage_say(shape):
    plain = memory_needs(shape, "bfloat16", stage=0)
    trained = shape.projector.parameters
    assert plain.weights == 2 * (shape.parameters + trained)  # PEFT keeps the original as well
    assert plain.training == 16 * trained
    assert memory_needs(shape, "bfloat16", stage=1, ranks=4).training == 4 * trained + 12 * trained // 4
    assert memory_needs(shape, "bfloat16", stage=2, ranks=4).training == 4 * trained
    assert memory_needs(shape, "bfloat16", stage=3, ranks=4).weights < 0.26 * plain.weights
    assert memory_needs(shape, "float32").weights == 2 * plain.weights
    saved = plain.weights - memory_needs(shape, "bfloat16", quantization="8bit").weights
    assert saved == shape.language.linear
    parts = plain.parts(1000, False)
    assert sum(parts.values()) == plain.needed(1000, False)
    assert parts["logits"] == 1000 * 32064 * 12  # twice in half precision, twice in float32
    everything = memory_needs(shape, "bfloat16", supervised_logits=False)
    assert everything.parts(5000, False)["logits"] == 5 * parts["logits"] > plain.parts(5000, False)["logits"]


def test_13b_in_bfloat16_fits_one_80_gb_card():
    needs = memory_needs(shape_of(model_without_weights("llava-hf/llava-1.5-13b-hf")), "bfloat16")
    assert needs.largest_token_budget(GPUS["a100-80"].memory) > 4096


SIZES = [(480, 640), (640, 480), (375, 500), (1000, 300), (336, 336), (700, 700)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_images_are_cut_up_as_processors_do_it(height, width):
    from PIL import Image
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture = Image.new("RGB", (width, height))
    views = model_without_weights("llava-hf/llava-v1.6-vicuna-7b-hf")
    side = {"height": 336, "width": 336}
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=side,
                                           image_grid_pinpoints=views.config.image_grid_pinpoints)  # fmt: skip
    crops = processor(picture, return_tensors="pt")["pixel_values"].shape[1]
    ours = visual_of(views, height, width)
    assert (ours.items, ours.tokens, ours.patches) == (crops, 576, 577)

    area = {"shortest_edge": 3136, "longest_edge": 12845056}
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=area)
    (grid,) = processor(picture, return_tensors="pt")["image_grid_thw"]
    ours = visual_of(model_without_weights("Qwen/Qwen2.5-VL-7B-Instruct"), height, width)
    assert (ours.items, ours.patches, ours.tokens) == (1, int(grid.prod()), int(grid.prod()) // 4)

    tiles = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1,
                                     max_patches=12)(picture, return_tensors="pt")["pixel_values"]  # fmt: skip
    ours = visual_of(model_without_weights("OpenGVLab/InternVL3-8B-hf"), height, width)
    assert (ours.items, ours.tokens, ours.patches) == (len(tiles), 256, 1025)


def test_images_of_one_size_have_the_tokens_that_the_model_makes():
    assert visual_of(model_without_weights(LLAVA), 200, 300) == Visual(1, 576, 577)
    assert visual_of(tiny_llava(), 200, 300) == Visual(1, 36, 37)


def test_a_batch_has_the_tower_work_of_its_images():
    assert tower_work(tiny_llava(), {"pixel_values": torch.zeros(3, 3, 24, 24)}) == image(37, 3)
    qwen = model_without_weights("Qwen/Qwen2.5-VL-7B-Instruct")
    grids = torch.tensor([[1, 8, 12], [1, 4, 4]])
    batch = {"pixel_values": torch.zeros(112, 1176), "image_grid_thw": grids}
    assert tower_work(qwen, batch) == image(96) + image(16)
    views = model_without_weights("llava-hf/llava-v1.6-vicuna-7b-hf")
    sizes = torch.tensor([[480, 640], [300, 900]])  # of the second one crop pads the batch
    crops = [visual_of(views, *size).items for size in sizes.tolist()]
    padded = {"pixel_values": torch.zeros(2, max(crops), 3, 336, 336), "image_sizes": sizes}
    assert tower_work(views, padded) == image(577, sum(crops)) and min(crops) < max(crops)
    assert tower_work(views, {"input_ids": sizes}) == Work()


def test_a_budget_is_of_an_item_or_of_the_image():
    visual = Visual(5, 576, 577, row_ends=48, sized=True)
    assert visual.kept(PruningSpec("divprune", 128, newline="none")) == 640
    assert visual.kept(PruningSpec("divprune", 128)) == 640 + 48
    assert visual.kept(PruningSpec("divprune", 128, scope="image", newline="none")) == 128
    assert visual.kept(PruningSpec("divprune", "50%", newline="none")) == 5 * 288
    assert visual.kept(PruningSpec("divprune", 600, newline="none", small_images="keep_all")) == 5 * 576


@cache
def tiny_data():
    return load_recipe("tiny_world", max_samples=40)


def configured(*overrides):
    return load_config(RecalibrateConfig, "recalibrate/llava15_7b_prismprune_64", list(overrides))


def make_plan(config, *arguments, **options):
    return plan_of(config, *arguments, model=model_without_weights(config.model.path), **options)


def test_the_shipped_7b_configuration_costs_the_known_figure():
    """1.92e18 FLOP (issue of the engine: 180,510 samples of about 420 tokens); on one H200 60 to 80 minutes."""
    plan = make_plan(configured(), GPUS["h200"], gpus=1)
    assert plan.load.samples == 180_510 and plan.load.tokens == 420
    assert plan.cost.total == pytest.approx(1.92e18, rel=0.03) and 60 <= plan.seconds / 60 <= 80
    faster = make_plan(configured("--engine.float8", "true"), GPUS["h200"], gpus=1)
    assert faster.seconds < 0.7 * plan.seconds and faster.cost == plan.cost
    assert make_plan(configured(), GPUS["h200"], gpus=8).seconds == pytest.approx(plan.seconds / 8)


def test_every_switch_of_the_engine_costs_what_it_saves():
    plan = make_plan(configured(), GPUS["a100-80"])
    for switch, dearer in (
        ("shared_prefix", "llm"), ("supervised_logits", "logits"), ("project_kept", "projector"),
        ("stop_tower", "tower"), ("packing", "llm"),
    ):  # fmt: skip
        cost = make_plan(configured(f"--engine.{switch}", "false"), GPUS["a100-80"]).cost.parts()
        others = {name for name, value in plan.cost.parts().items() if value != pytest.approx(cost[name])}
        assert cost[dearer] > plan.cost.parts()[dearer] and others - {"logits"} <= {dearer}
    again = make_plan(configured("--engine.checkpointing", "true"), GPUS["a100-80"])
    assert again.cost.model == plan.cost.model and again.cost.recomputed == pytest.approx(
        0.39 * plan.cost.llm, rel=0.02
    )


def test_a_feature_cache_leaves_the_tower_out():
    plan = make_plan(configured(), GPUS["a100-80"])
    cached = make_plan(configured("--features", "anywhere"), GPUS["a100-80"])
    assert cached.cost.tower == 0 and cached.cost.total == plan.cost.total - plan.cost.tower
    assert cached.needs.parts(1000, False)["tower"] == 0 < plan.needs.parts(1000, False)["tower"]


def test_steps_and_shares_of_an_epoch_are_counted():
    assert make_plan(configured(), GPUS["h200"]).steps == 1411  # 180,510 / 128
    plan = make_plan(configured("--train.max_steps", "100"), GPUS["h200"])
    whole = make_plan(configured(), GPUS["h200"])
    assert plan.steps == 100 and plan.cost.total == pytest.approx(whole.cost.total * 12800 / 180_510)
    assert make_plan(configured("--data.max_samples", "20000"), GPUS["h200"]).load.samples == 20_000
    assert make_plan(configured("--train.epochs", "2.0"), GPUS["h200"]).cost.total == pytest.approx(
        2 * whole.cost.total
    )


def test_a_run_is_predicted_by_the_steps_that_are_left():
    config = load_config(RecalibrateConfig, TINY)
    model = model_without_weights(config.model.path)
    load = workload_of_data(config, model, tiny_data(), [100] * 40)
    whole, half = (prediction(config, model, load, 2, GPUS["l4"], steps) for steps in (200, 100))
    assert whole == pytest.approx(2 * half) and prediction(config, model, load, 2, None, 100) is None
    cost = flops_of(shape_of(model), as_computed(config, load)).total / 40 * 100 * samples_per_step(config.train, 2)
    assert half == pytest.approx(cost / 121e12 / 0.45 / 2)


def test_data_that_is_here_is_counted_and_not_assumed():
    config = load_config(RecalibrateConfig, TINY, ["--data.max_samples", "40"])
    model = model_without_weights(config.model.path)
    data = tiny_data()
    load = workload_of_data(config, model, data)
    assert load.measured and load.samples == 40 and {source.visual for source in load.sources} == {16}
    # As the formatter makes them, but for the image's own tokens.
    batch = formatter_without_model(config.model, data.images).training_batch([data[n] for n in range(40)])
    text = int(batch["attention_mask"].sum()) - 144 * 40
    assert load.work.tokens == text + 16 * 40
    assert load.work.logits == pytest.approx(int((batch["labels"] >= 0).sum()), rel=0.5)
    lengths = list(range(100, 140))
    load = workload_of_data(config, model, data, lengths)
    assert load.work.tokens == sum(lengths) + 16 * 40 and load.longest == 139 + 16
    assert load.work.pairs == sum((n + 16) * (n + 17) / 2 for n in lengths)
    assert load.tokens == pytest.approx(load.work.tokens / 40) and load.work.projected == 16 * 40
    longer = [row["turns"][0]["question"].count(" ") for row in data.rows]
    estimated = estimated_lengths(data)
    assert estimated[longer.index(max(longer))] >= estimated[longer.index(min(longer))]


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(
        [
            "plan",
            "--config",
            "recalibrate/llava15_7b_prismprune_64",
            "--gpus",
            "1",
            "--gpu",
            "h100",
            "--write",
            str(file),
        ]
    )
    printed = capsys.readouterr().out
    for word in ("vg", "86,417", "largest token budget", "planned, not measured", "assumed: MFU 45%", "GiB", str(file)):
        assert word in printed
    plan = json.loads(file.read_text())
    assert plan["gpu"] == "h100" and plan["samples"] == 180_510
    assert plan["flop"]["total"] == pytest.approx(plan["predicted_seconds"] * 989e12 * 0.45, rel=1e-3)
    assert plan["largest_token_budget"]["h200"]["plain"] > plan["largest_token_budget"]["a100-80"]["plain"] > 8192


@pytest.mark.parametrize(("options", "message"), [
    (["--gpu", "h20"], "unknown GPU 'h20', did you mean 'h200'?; there are b200, h200"),
    (["--engine.token_budget", "300"], "engine.token_budget 300 is smaller than one sample: a sample of recipe"),
    (["--model.path", "{tmp}"], "holds no config.json"),
    (["--model.path", "{tmp}/nowhere"], "no config.json of a vision-language model could be read"),
    (["--data.recipe", "custom"], "can't be planned without its data"),
    (["--data.file", "{tmp}/no.json"], "no.json does not exist"),
    (["--pruning.keep", "600"], "asks for 600 visual tokens, but each item has only 576"),
    (["--gpus", "0"], "--gpus is at least 1"),
    (["--mfu", "0"], "--mfu is a share above 0"),
])  # fmt: skip
def test_what_can_not_be_planned_is_told_in_one_line(options, message, tmp_path):
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    with pytest.raises(SystemExit) as stopped:
        main(
            ["plan", "--config", "recalibrate/llava15_7b_prismprune_64", "--write", str(tmp_path / "p.json"), *options]
        )
    assert message in str(stopped.value) and "\n" not in str(stopped.value) and not (tmp_path / "p.json").exists()


def test_a_plan_needs_a_configuration():
    with pytest.raises(SystemExit, match="Missing option '--config'"):
        main(["plan"])


def test_a_config_file_is_enough_of_a_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((ROOT / "assets/tiny_vlm/config.json").read_text())
    main(["plan", "--config", TINY, "--model.path", str(folder), "--data.max_samples", "8",
          "--write", str(tmp_path / "plan.json")])  # fmt: skip
    assert json.loads((tmp_path / "plan.json").read_text())["samples"] == 8


def test_headers_and_the_page_hold_what_is_planned():
    """Written by ``python -m prunetune.scripts.planned``."""
    for file, text in written():
        assert file.read_text() == text, file


def test_a_plan_is_written_over_nothing(tmp_path):
    (tmp_path / "plan.json").write_text("mine")
    with pytest.raises(SystemExit, match="is there already; a plan is never written over anything"):
        main(["plan", "--config", "recalibrate/tiny_divprune_16", "--write", str(tmp_path / "plan.json")])
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_a_plan_counts_what_each_layer_processes():
    """Of 144 tokens and three layers: 56 a layer are 144 in the first and 12 in the others."""
    stages = ["--pruning.pruner", "identity", "--pruning.keep", "100%", "--data.max_samples", "40"]
    config = load_config(RecalibrateConfig, TINY, stages)
    inside = load_config(
        RecalibrateConfig, TINY, [*stages, "--pruning.stages", "[{name: fastv, boundaries: [1], average: 56}]"]
    )
    few = load_config(RecalibrateConfig, TINY, ["--pruning.keep", "12", "--data.max_samples", "40"])
    gpu = GPUS["h200"]
    dense, staged, pruned = (plan_of(one, gpu, 1) for one in (config, inside, few))
    assert staged.load.inside == (144, 12, 12) and dense.load.inside == ()
    works = [plan.load.work for plan in (dense, staged, pruned)]
    for part in ("tokens", "pairs"):
        whole, own, least = (getattr(work, part) for work in works)
        assert own == pytest.approx((whole + 2 * least) / 3)
    assert staged.load.tokens == dense.load.tokens and staged.load.longest == dense.load.longest
    assert "144 enter the LLM, 56.0 a layer, 12 in the last" in staged.to_text()
    several = ["--pruning.stages", "[{name: fastv, boundaries: [1]}]", "--elastic.averages", "[56, 96]"]
    mixed = load_config(RecalibrateConfig, TINY, [*stages, *several, "--elastic.dense", "0.5"])
    # 96 a layer are 72 behind the first; a quarter each, and half of the samples keep all.
    assert plan_of(mixed, gpu, 1).load.inside == (144, 93, 93)
    least = load_config(
        RecalibrateConfig, TINY, [*stages, "--pruning.stages", "[{name: fastv, boundaries: [1], average: 20}]"]
    )
    with pytest.raises(PruningError, match="an average of 20 .* process 48 already"):
        plan_of(least, gpu, 1)
