"""LLaVA-1.6: crops are pruned one by one, and the rest of the model is the stock one."""

import copy
from functools import cache

import oracles
import pytest
import torch
from conftest import spec_of
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from prunetune.pruning import PrunedModel, PruningError, PruningSpec, VisualTokens, build_pruner, registered_methods
from prunetune.testing import FamilyIdentity
from prunetune.tiny_world.training.model import IMAGE, build_llava, build_tokenizer, vision_config

PINPOINTS = [[84, 168], [168, 84], [168, 168]]


@pytest.fixture(scope="module")
def next_model():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = build_llava(len(tokenizer)).config.text_config
    config = LlavaNextConfig(vision_config=vision_config(), text_config=text, image_grid_pinpoints=PINPOINTS,
                             image_token_id=IMAGE, vision_feature_layer=-2, tie_word_embeddings=True)  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.image_newline.normal_()
    return model


@pytest.fixture(scope="module")
def batch():
    """Two pictures of different shape: 3 and 5 crops, padded to one height as the processor does."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(size={"height": 84, "width": 84}, crop_size={"height": 84, "width": 84},
                                           image_grid_pinpoints=PINPOINTS, do_center_crop=False)  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    pictures = [Image.fromarray(torch.randint(0, 255, (*size, 3), generator=generator).byte().numpy())
                for size in ((70, 160), (150, 130))]  # fmt: skip
    return processor(pictures, return_tensors="pt")


def rows(model, batch):
    """Return right-padded prompts with one placeholder per packed token."""
    lengths = [len(f) for f in model.model.get_image_features(**batch, return_dict=True).pooler_output]
    ids = [torch.tensor([1, 5, 7] + [IMAGE] * n + [9, 11, 6, 7]) for n in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **batch}


def items(prepared):
    """The crops of all images."""
    (group,) = prepared.vision["image"].groups
    return group


def kept_tokens(prepared, crops):
    """The numbers of the kept tokens of some crops."""
    kept = prepared.chosen["image"].kept_tokens().view(-1, 144)
    return [crop * 144 + n for crop in crops for n in kept[crop].nonzero()[:, 0].tolist()]


def pools(prepared):
    """The tokens of each image that the LLM would see."""
    return [numbers[numbers >= 0].sort().values for numbers in prepared.vision["image"].origin]


def plug(model, name, keep=16, **fields):
    return PrunedModel(model, spec_of(name, keep, **fields), build_tokenizer())


class TestLlavaNext(FamilyIdentity):
    """The suite of every family: pictures of 3, 3 and 5 crops, one of them with padding that the model cuts away."""

    suppressed = (2, IMAGE)
    options = {"hiprune": {"object_layer": 2}}

    def make_model(self):
        return copy.deepcopy(_small_model())

    def rows(self):
        return [(((16, 30),), 6), (((32, 32), (20, 32), (32, 16)), 4), ((), 9), (((32, 13),), 3)]

    def batch(self, rows, side, labels):
        ids, pixels, sizes = [], [], []
        for pictures, words in rows:
            row = [1]
            for number, size in enumerate(pictures):
                crops, length = _packed(size)
                row += [3] + [IMAGE] * length
                sizes.append(size)
                generator = torch.Generator().manual_seed(10 * words + number)
                pixels.append(torch.randn(crops, 3, 16, 16, generator=generator))
            ids.append(row + list(range(7, 7 + words)))
        length = max(map(len, ids))
        left = side == "left"
        padded = [[0] * (length - len(row)) * left + row + [0] * (length - len(row)) * (not left) for row in ids]
        input_ids = torch.tensor(padded)
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}
        if pixels:
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
            inputs["image_sizes"] = torch.tensor(sizes)
        if labels:
            inputs["labels"] = torch.where(input_ids >= 7, input_ids, -100)
        return inputs


@cache
def _small_model():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(num_hidden_layers=4, image_size=16, patch_size=4, **shape)
    text = LlamaConfig(vocab_size=64, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **shape)
    grids = [[16, 32], [32, 16], [32, 32]]
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=grids, image_token_id=IMAGE,
                             vision_feature_layer=-2)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.image_newline.normal_()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


@cache
@torch.no_grad()
def _packed(size):
    """Return how many crops the model makes of a picture of a size, and how many tokens it packs them to."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model = _small_model()
    crops = image_size_to_num_patches(torch.tensor(size), model.config.image_grid_pinpoints, 16)
    pixels = torch.zeros(1, crops, 3, 16, 16)
    output = model.model.get_image_features(pixels, image_sizes=torch.tensor([size]), return_dict=True)
    return crops, len(output.pooler_output[0])


QUESTIONS = ["where is the circle ?", "red ring"]


GRIDS = ("downsample", "hiprune", "gridprune", "vscan")  # these need the grid of one crop
FOR_IMAGES = [name for name, method in registered_methods().items() if name != "identity" and not method.video]
PER_METHOD = [(name, "item") for name in FOR_IMAGES]
PER_METHOD += [(name, "image") for name, _ in PER_METHOD if name not in ("visionzip", "prunesid", *GRIDS)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "scope"), [*PER_METHOD, ("identity", "item"), ("identity", "image")])
def test_keep_all_is_bit_identical_to_stock(next_model, batch, name, scope):
    inputs = rows(next_model, batch)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE, -100)
    stock = next_model(**inputs)
    ours = plug(next_model, name, "100%", scope=scope).forward(**inputs, instructions=QUESTIONS)
    assert torch.equal(stock.logits, ours.logits) and torch.equal(stock.loss, ours.loss)


@torch.no_grad()
@pytest.mark.parametrize("newline", ["rows", "all", "none"])
def test_each_crop_keeps_its_own_tokens_at_their_place(next_model, batch, newline):
    inputs = rows(next_model, batch)
    prepared = PrunedModel(next_model, PruningSpec("fastervlm", 20, newline=newline)).prepare(inputs)
    attention = items(prepared).signals["cls_attention"].mean(1)
    assert len(attention) == 3 + 5
    packed = next_model.model.get_image_features(**batch, return_dict=True).pooler_output
    newline_token = next_model.model.image_newline
    for image, crops in enumerate([attention[:3], attention[3:]]):
        # the base view comes first and is packed whole
        base = crops[0].topk(20).indices.sort().values
        kept = prepared.inputs["mm_encoder_outputs"]["image"].pooler_output[image]
        assert torch.equal(kept[:20], packed[image][:144][base])
        newlines = (kept == newline_token).all(-1)
        rows_in_all = (packed[image] == newline_token).all(-1).sum()
        if newline == "none":
            assert newlines.sum() == 0
            assert len(kept) <= 20 * len(crops)
        elif newline == "all":
            assert newlines.sum() == rows_in_all
        else:
            assert 0 < newlines.sum() <= rows_in_all
            assert not (newlines[1:] & newlines[:-1]).any()  # never two row ends with nothing between
        tokens = {tuple(t) for t in packed[image].tolist()}
        assert all(tuple(t) in tokens for t in kept.tolist())
        assert len(kept) == prepared.kept["image"][image] == int((prepared.inputs["input_ids"][image] == IMAGE).sum())


@torch.no_grad()
@pytest.mark.parametrize(("name", "scope"), PER_METHOD)
def test_batch_equals_each_picture_alone(next_model, batch, name, scope):
    inputs = rows(next_model, batch) | {"instructions": QUESTIONS}
    pruned = plug(next_model, name, scope=scope)
    together = pruned.prepare(inputs)
    logits = next_model(**together.inputs).logits
    for row, crops in enumerate((3, 5)):
        length = int(inputs["attention_mask"][row].sum())
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length],
                 "attention_mask": inputs["attention_mask"][row : row + 1, :length],
                 "pixel_values": batch["pixel_values"][row : row + 1, :crops],
                 "image_sizes": batch["image_sizes"][row : row + 1],
                 "instructions": QUESTIONS[row : row + 1]}  # fmt: skip
        real = together.inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], pruned.forward(**alone).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastervlm", "divprune", "prumerge", "trim"])
def test_a_budget_per_image_chooses_over_all_crops(next_model, batch, name):
    """Exactly K tokens of each picture reach the LLM; none of them from the padding that the model cuts away."""
    inputs = rows(next_model, batch) | {"instructions": QUESTIONS}
    pruned = plug(next_model, name, 40, scope="image", newline="none")
    prepared = pruned.prepare(inputs)
    assert prepared.kept["image"] == [40, 40]
    tokens = items(prepared)
    per_crop = prepared.chosen["image"].kept_tokens().view(-1, 144).sum(1).tolist()
    assert [sum(per_crop[:3]), sum(per_crop[3:])] == [40, 40] and len(set(per_crop)) > 1
    for pool, crops in zip(pools(prepared), ([0, 1, 2], [3, 4, 5, 6, 7]), strict=True):
        kept = kept_tokens(prepared, crops)
        assert set(kept) <= set(pool.tolist())
        if name == "fastervlm":
            score = tokens.signals["cls_attention"].mean(1).flatten()
            assert set(kept) == set(pool[score[pool].topk(40).indices].tolist())
        if name == "divprune":
            pooled = VisualTokens(tokens.features, tokens.projected.flatten(0, 1)[pool][None])
            assert kept == pool[torch.tensor(oracles.divprune(pooled, 0, 40))].tolist()


def test_a_ratio_per_image_counts_what_the_model_shows(next_model, batch):
    inputs = rows(next_model, batch)
    with torch.no_grad():
        pruned = plug(next_model, "fastervlm", "10%", scope="image", newline="none")
        prepared = pruned.prepare(inputs)
    sizes = [len(pool) for pool in pools(prepared)]
    assert prepared.kept["image"] == [round(0.1 * size) for size in sizes] and sizes[0] < 3 * 144  # padding was cut


@pytest.mark.parametrize(("name", "scope"), [("prumerge", "item"), ("trim", "item"), ("prumerge", "image"),
                                             ("tome", "image"), ("bat", "image")])  # fmt: skip
def test_merged_features_sit_where_they_were_made(next_model, batch, name, scope):
    """An output replaces its own patch: what is in the picture is not cut away with somebody else's padding."""
    inputs = rows(next_model, batch) | {"instructions": QUESTIONS}
    sizes = [384, 624]
    with torch.no_grad():
        for keep in (20, sizes[0]) if scope == "image" else (20,):  # one picture kept whole, the other merged
            prepared = plug(next_model, name, keep, scope=scope, newline="none").prepare(inputs)
            places, merged = prepared.chosen["image"].merged_tokens()
            if not len(places):
                continue
            made = dict(zip(places.tolist(), next_model.model.multi_modal_projector(merged), strict=True))
            projected = items(prepared).projected.flatten(0, 1)
            for image, crops in enumerate(([0, 1, 2], [3, 4, 5, 6, 7])):
                features = prepared.inputs["mm_encoder_outputs"]["image"].pooler_output[image]
                kept = set(kept_tokens(prepared, crops))
                order = [n for n in prepared.vision["image"].origin[image].tolist() if n in kept]  # as they are packed
                assert len(features) == len(order)
                if scope == "image":
                    assert len(features) == keep
                expected = torch.stack([made.get(number, projected[number]) for number in order])
                torch.testing.assert_close(features, expected)


def test_text_alone_fits_a_budget_larger_than_the_blank_picture(next_model):
    ids = torch.tensor([[1, 5, 7, 9, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stock = next_model(**inputs).loss
    next_model.train()
    try:
        for name in ("fastervlm", "prumerge"):
            with plug(next_model, name, 300, scope="image").attach():
                assert torch.equal(next_model(**inputs).loss, stock)
    finally:
        next_model.eval()


def test_methods_that_can_not_pool_crops_say_so(next_model, batch):
    inputs = rows(next_model, batch) | {"instructions": QUESTIONS}
    with torch.no_grad():
        with pytest.raises(PruningError, match="cls_feature.*set pruning.scope to item"):
            plug(next_model, "visionzip", scope="image").prepare(inputs)
        for name in GRIDS:
            with pytest.raises(PruningError, match="scope: item"):
                plug(next_model, name, scope="image").prepare(inputs)
        with pytest.raises(ValueError, match="Input should be 'item' or 'image'"):
            plug(next_model, "fastervlm", scope="picture")


def test_crops_of_an_image_share_its_statistics(next_model, batch):
    """CDPruner scales relevance over all crops of a picture, and each picture by itself."""
    inputs = rows(next_model, batch) | {"instructions": QUESTIONS}
    with torch.no_grad():
        together = plug(next_model, "cdpruner").prepare(inputs)
    tokens = items(together)
    assert tokens.image is None  # the family does not say so; the plug tells the pruner
    reader = plug(next_model, "cdpruner").text
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    signals = {
        "image_embeds": reader.image_embeds(tokens.features),
        "text_embeds": reader.text_embeds(QUESTIONS)[owner],
    }
    full = VisualTokens(tokens.features, tokens.projected, signals=signals, image=owner)
    expected = build_pruner("cdpruner")(full, 16)
    for crop in range(8):
        assert torch.equal(together.selections["image"][0].of(crop), expected.of(crop))


def test_text_alone_reaches_the_projector_in_training(next_model):
    ids = torch.tensor([[1, 5, 7, 9, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stock = next_model(**inputs).loss
    next_model.train()
    next_model.zero_grad()
    try:
        with PrunedModel(next_model, PruningSpec("divprune", 16)).attach():
            loss = next_model(**inputs).loss
        loss.backward()
        assert torch.equal(loss, stock)
        assert next_model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() == 0
    finally:
        next_model.eval()
        next_model.zero_grad()


@torch.no_grad()
def test_a_row_end_stays_only_with_a_token_of_its_own_row(next_model, batch):
    """Kept tokens of the base view, which comes before the grid, do not hold the grid's first row."""
    from prunetune.pruning.rewrite import staying_slots

    vision = PrunedModel(next_model, PruningSpec("fastervlm", 20)).encode(rows(next_model, batch))["image"]
    kept = torch.zeros(vision.total, dtype=torch.bool)
    kept[: 144 // 2] = True  # of the first picture's base view alone
    stays = staying_slots(vision, kept, "rows").split(vision.lengths)
    assert int(stays[0].sum()) == 72 and not stays[1].any()
    second_row = vision.origin[0][144:][13:26]  # 12 tokens of a row, after one row and its end
    kept[int(second_row[second_row >= 0][3])] = True
    stays = staying_slots(vision, kept, "rows").split(vision.lengths)
    ends = (vision.origin[0] < 0).nonzero()[:, 0]
    width = int(ends[1] - ends[0])
    row_of_kept = int((vision.origin[0][144:] == int(second_row[second_row >= 0][3])).nonzero()[0, 0]) // width
    assert stays[0][ends].nonzero()[:, 0].tolist() == [row_of_kept]


@torch.no_grad()
@pytest.mark.parametrize("newline", ["rows", "all"])
@pytest.mark.parametrize("size", [(840, 6), (6, 840), (84, 84), (1000, 7)])
def test_extreme_shapes_are_identical_to_stock_when_all_is_kept(next_model, size, newline):
    """Of a portrait narrower than a token the model cuts every column away: rows of nothing but their end are left."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    crops = image_size_to_num_patches(torch.tensor(size), PINPOINTS, 84)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(1, crops, 3, 84, 84, generator=generator)
    inputs = rows(next_model, {"pixel_values": pixels, "image_sizes": torch.tensor([size])})
    ours = PrunedModel(next_model, PruningSpec("divprune", "100%", newline=newline)).forward(**inputs)
    assert torch.equal(ours.logits, next_model(**inputs).logits)
    few = PrunedModel(next_model, PruningSpec("divprune", 9, newline=newline)).prepare(inputs)
    assert few.kept["image"][0] == int((few.inputs["input_ids"] == IMAGE).sum())


def test_a_small_picture_under_one_budget_is_named(next_model, batch):
    inputs = rows(next_model, batch) | {"sample_ids": ["vg/1", "vg/2"]}
    with torch.no_grad():
        with pytest.raises(PruningError, match="^sample 'vg/1': keep=500 asks for 500 visual tokens.*only 384"):
            plug(next_model, "fastervlm", 500, scope="image").prepare(inputs)
        kept = plug(next_model, "fastervlm", 500, scope="image", small_images="keep_all", newline="none").prepare(
            inputs
        )
    assert kept.kept["image"] == [384, 500]


@torch.no_grad()
def test_sizes_that_were_met_before_are_not_packed_again(next_model, batch, monkeypatch):
    """Where tokens are packed is that of numbers sent through the model's own packing, in any order of images."""
    packed = []
    own = type(next_model.model).pack_image_features

    def listening(self, features, sizes, **options):
        packed.append(len(sizes))
        return own(self, features, sizes, **options)

    monkeypatch.setattr(type(next_model.model), "pack_image_features", listening)
    pruned = PrunedModel(next_model, PruningSpec("divprune", 9))
    for images, crops in (([0, 1], [3, 5]), ([1, 0], [5, 3]), ([0, 0, 1], [3, 3, 5])):
        pixels, sizes = batch["pixel_values"][images], batch["image_sizes"][images]
        before = len(packed)
        vision = pruned.encode({"pixel_values": pixels, "image_sizes": sizes})["image"]
        if images != [0, 1]:
            assert packed[before:] == [len(images)]  # the stock model's own call
        numbers = torch.arange(sum(crops) * 144, dtype=torch.float64).view(-1, 144, 1)
        expected, _ = own(next_model.model, numbers.split(crops), sizes, vision_feature_select_strategy="default",
                          image_newline=torch.full((1,), -1.0, dtype=torch.float64))  # fmt: skip
        for origin, theirs, row in zip(vision.origin, expected, vision.row, strict=True):
            assert torch.equal(origin, theirs[:, 0].long())
            ends = origin == -1  # after the base view, each end is the last of its row
            assert torch.equal(row[144:], ends[144:].cumsum(0) - ends[144:].long()) and (row[:144] == -1).all()
