"""LLaVA-1.6: crops are pruned one by one, and the rest of the model is the stock one."""

import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from pruning import PrunedModel, PruningSpec
from train.tiny_vlm.model import IMAGE, build_llava, build_tokenizer, vision_config

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


@torch.no_grad()
@pytest.mark.parametrize("name", ["identity", "fastervlm", "divprune"])
def test_keep_all_is_bit_identical_to_stock(next_model, batch, name):
    inputs = rows(next_model, batch)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE, -100)
    stock, ours = next_model(**inputs), PrunedModel(next_model, PruningSpec(name)).forward(**inputs)
    assert torch.equal(stock.logits, ours.logits) and torch.equal(stock.loss, ours.loss)


@torch.no_grad()
@pytest.mark.parametrize("newline", ["rows", "all", "none"])
def test_each_crop_keeps_its_own_tokens_at_their_place(next_model, batch, newline):
    inputs = rows(next_model, batch)
    prepared = PrunedModel(next_model, PruningSpec("fastervlm", 20, newline=newline)).prepare(inputs)
    attention = prepared.encoded.tokens.cls_attention.mean(1)
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
        assert len(kept) == prepared.kept[image] == int((prepared.inputs["input_ids"][image] == IMAGE).sum())


@torch.no_grad()
@pytest.mark.parametrize("name", ["divprune", "downsample"])
def test_batch_equals_each_picture_alone(next_model, batch, name):
    inputs = rows(next_model, batch)
    pruned = PrunedModel(next_model, PruningSpec(name, 16))
    together = pruned.prepare(inputs)
    logits = next_model(**together.inputs).logits
    for row, crops in enumerate((3, 5)):
        length = int(inputs["attention_mask"][row].sum())
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length],
                 "attention_mask": inputs["attention_mask"][row : row + 1, :length],
                 "pixel_values": batch["pixel_values"][row : row + 1, :crops],
                 "image_sizes": batch["image_sizes"][row : row + 1]}  # fmt: skip
        real = together.inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], pruned.forward(**alone).logits[0], rtol=1e-4, atol=1e-4)


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
