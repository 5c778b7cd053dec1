"""What pruners read of the tower and of the text: equal to the model's own eager numbers, and only when asked for."""

import pytest
import torch
from conftest import TINY_VLM, scene_sample, spec_of
from transformers import AutoTokenizer, CLIPModel, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from prunetune.data_recipes import Formatter, Sample, Turn
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, registered_methods
from prunetune.pruning.signals import signal_of
from prunetune.pruning.text import TextReader, instruction_text
from prunetune.tiny_world.recipe import SceneImages

CLIP = str(TINY_VLM / "clip")


@pytest.fixture
def eager(untrained_folder):
    return LlavaForConditionalGeneration.from_pretrained(untrained_folder, attn_implementation="eager").eval()


def encoded(model, processor, reading, samples, name, **options):
    spec = spec_of(name)
    spec = PruningSpec(name, 16, {**spec.options, **options}, text_tower=CLIP)
    with torch.no_grad():
        prepared = PrunedModel(model, spec, processor.tokenizer).prepare(reading.training_batch(samples))
    (tokens,) = prepared.vision["image"].groups
    return tokens


# ---- vision ----------------------------------------------------------------------------------------------------


def test_attention_signals_equal_the_eager_attention_weights(eager, processor, reading, samples):
    pixels = reading.training_batch(samples)["pixel_values"]
    with torch.no_grad():
        out = eager.model.vision_tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    close = {"rtol": 1e-5, "atol": 1e-6}
    # The feature layer is hidden_states[-2], the output of the second-last layer, whose own attention this is.
    ours = encoded(eager, processor, reading, samples, "fastervlm")
    torch.testing.assert_close(ours.signals["cls_attention"], out.attentions[-2][:, :, 0, 1:], **close)
    assert torch.equal(ours.features, out.hidden_states[-2][:, 1:])
    ours = encoded(eager, processor, reading, samples, "hiprune", object_layer=2)
    torch.testing.assert_close(ours.signals["received_attention"], out.attentions[-2].mean(2)[:, :, 1:], **close)
    torch.testing.assert_close(ours.signals["object_attention"], out.attentions[1].mean(2)[:, :, 1:], **close)
    ours = encoded(eager, processor, reading, samples, "vscan", shallow_layer=2)
    torch.testing.assert_close(ours.signals["cls_attention"], out.attentions[-2][:, :, 0, 1:], **close)
    torch.testing.assert_close(ours.signals["shallow_attention"], out.attentions[1][:, :, 0, 1:], **close)
    ours = encoded(eager, processor, reading, samples, "visionzip")
    assert torch.equal(ours.signals["cls_feature"], out.hidden_states[-2][:, 0])


def test_keys_are_those_of_the_layers_they_name(eager, processor, reading, samples):
    layers = eager.model.vision_tower.encoder.layers
    pixels = reading.training_batch(samples)["pixel_values"]
    with torch.no_grad():
        hidden = eager.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        before, after = layers[-2].layer_norm1(hidden[-3]), layers[-1].layer_norm1(hidden[-2])
        keys = layers[-2].self_attn.k_proj(before)[:, 1:].unflatten(-1, (4, -1)).mean(2)
        reader = layers[-1].self_attn
        query, wide = reader.q_proj(after[:, :1]), reader.k_proj(after)
        attention = (query @ wide.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(encoded(eager, processor, reading, samples, "tome").signals["keys"], keys)
    ours = encoded(eager, processor, reading, samples, "prumerge")
    torch.testing.assert_close(ours.signals["reader_keys"], wide[:, 1:])
    torch.testing.assert_close(ours.signals["reader_attention"], attention)


FOR_IMAGES = [name for name, method in registered_methods().items() if name != "identity" and not method.video]


@pytest.mark.parametrize("name", FOR_IMAGES)
def test_signals_are_computed_only_when_asked_for(model, processor, reading, samples, name):
    tokens = encoded(model, processor, reading, samples, name)
    pruner = PrunedModel(model, spec_of(name), processor.tokenizer).pruner
    assert set(tokens.signals) == {signal_of(need).name for need in pruner.needs}


def test_a_layer_that_the_tower_lacks_is_named(model, processor, reading, samples):
    with pytest.raises(PruningError, match="vision layer 9 was asked for, but the tower has layers 1 to 5"):
        encoded(model, processor, reading, samples, "hiprune", object_layer=9)


def test_nan_in_the_tower_names_its_layer(model, processor, reading, samples):
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[-2].self_attn.q_proj.bias[3] = float("nan")
    with pytest.raises(PruningError, match=r"`cls_attention` of vision_tower\.encoder\.layers\.3 holds NaN"):
        encoded(model, processor, reading, samples, "fastervlm")


# ---- towers without what a method reads --------------------------------------------------------------------------


@pytest.fixture
def without_cls(model):
    """The tiny LLM behind a SigLIP tower, which has no [CLS]."""
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                                image_size=84, patch_size=7)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=model.config.text_config, image_token_id=4,
                         vision_feature_layer=-2, vision_feature_select_strategy="full")  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def test_a_method_that_needs_cls_says_which_methods_work_without(without_cls):
    with pytest.raises(PruningError, match="siglip_vision_model") as error:
        PrunedModel(without_cls, PruningSpec("fastervlm", 16))
    works = str(error.value).split("default options: ")[1].split(", ")
    assert {"divprune", "hiprune", "trimtokenator", "cdpruner", "tome", "random", "downsample"} <= set(works)
    assert not {"fastervlm", "vispruner", "prismprune", "prumerge", "visionzip", "adaptive"} & set(works)


@pytest.mark.parametrize(
    "spec",
    [
        PruningSpec("divprune", 16),
        PruningSpec("hiprune", 16, {"object_layer": 1}),
        PruningSpec("vispruner", 16, {"saliency": "received"}),
        PruningSpec("tome", 16),
        PruningSpec("trimtokenator", 16),
        PruningSpec("crisprune", 16, {"saliency": "received", "text": "llm"}),
    ],
    ids=lambda spec: spec.pruner,
)
def test_towers_without_cls_are_pruned_by_what_they_have(without_cls, processor, reading, samples, spec):
    processor_batch = reading.training_batch(samples)
    with torch.no_grad():
        prepared = PrunedModel(without_cls, spec, processor.tokenizer).prepare(processor_batch)
        logits = without_cls(**prepared.inputs).logits
        out = without_cls.model.vision_tower(
            pixel_values=processor_batch["pixel_values"], output_hidden_states=True
        ).hidden_states
    assert prepared.kept["image"] == [16, 16, 16] and torch.isfinite(logits).all()
    (tokens,) = prepared.vision["image"].groups
    if spec.pruner in ("hiprune", "crisprune"):
        attention = without_cls.model.vision_tower.encoder.layers[-2].self_attn
        hidden = without_cls.model.vision_tower.encoder.layers[-2].layer_norm1(out[-3])
        q, k = (p(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        expected = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean(2)
        torch.testing.assert_close(tokens.signals["received_attention"], expected, rtol=1e-5, atol=1e-6)


def test_clip_texts_are_not_compared_with_a_tower_of_another_kind(model, processor):
    """As wide as CLIP's, and still in another space."""
    vision = SiglipVisionConfig(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                image_size=84, patch_size=7)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=model.config.text_config, image_token_id=4,
                         vision_feature_layer=-2, vision_feature_select_strategy="full")  # fmt: skip
    with pytest.raises(PruningError, match="vision tower is a 'siglip_vision_model', whose features do not lie"):
        PrunedModel(
            LlavaForConditionalGeneration(config),
            PruningSpec("cdpruner", 16, text_tower=CLIP),
            processor.tokenizer,
        )


def test_no_layer_after_the_features_means_no_reader(model):
    model.config.vision_feature_layer = -1
    with pytest.raises(PruningError, match=r"reads reader_attention, reader_keys.*fastervlm"):
        PrunedModel(model, PruningSpec("prumerge", 16))


# ---- text ------------------------------------------------------------------------------------------------------


def test_clip_embeddings_are_clips_own(model, processor):
    clip, tokenizer = CLIPModel.from_pretrained(CLIP, dtype=torch.float32), AutoTokenizer.from_pretrained(CLIP)
    reader = TextReader(model, processor.tokenizer, CLIP)
    texts = ["where is the red ring ?", "what number is shown ?"]
    with torch.no_grad():
        for row, text in enumerate(texts):
            own = clip.get_text_features(**tokenizer(f"<s> {text} </s>", return_tensors="pt")).pooler_output
            torch.testing.assert_close(reader.text_embeds(texts)[row], own)
        hidden = torch.randn(2, 9, 128)
        embeds = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
        torch.testing.assert_close(reader.image_embeds(hidden), embeds)


def test_long_instructions_are_cut_into_pieces_with_their_own_ends(model, processor):
    reader = TextReader(model, processor.tokenizer, CLIP)  # 64 positions, so 62 words a piece
    long, short = " ".join(["red", "ring"] * 40), "blue square"
    embeds = reader.text_embeds([short, long])
    assert embeds.shape[:2] == (2, 2) and not embeds[0, 1].any()
    words = long.split()
    for piece, part in enumerate((words[:62], words[62:])):
        torch.testing.assert_close(embeds[1, piece], reader.text_embeds([" ".join(part)])[0, 0])


def test_token_embeddings_are_those_of_the_instruction(model, processor):
    reader = TextReader(model, processor.tokenizer)
    embeds = reader.token_embeds(["where is the ring ?", "red"])
    table = model.get_input_embeddings().weight
    ids = processor.tokenizer("where is the ring ?", add_special_tokens=False)["input_ids"]
    assert torch.equal(embeds[0], table[ids]) and not embeds[1, 1:].any()


def test_each_picture_meets_the_question_of_its_own_row(model, processor, reading, monkeypatch):
    """Rows with a picture, without one, and with another: text signals follow the rows, not the order of pictures."""
    from prunetune.pruning.methods.trimtokenator import TrimTokenator

    seen = []
    plain = TrimTokenator.__call__
    monkeypatch.setattr(TrimTokenator, "__call__", lambda self, t, keep: (seen.append(t), plain(self, t, keep))[1])
    text = Sample("t", "text", None, (Turn("what color is the blue star ?", "red"),))
    samples = [scene_sample(10_000_001, "where is the circle ?"), text, scene_sample(10_000_003, "red ring")]
    with torch.no_grad():
        pruned = PrunedModel(model, PruningSpec("trimtokenator", 16), processor.tokenizer)
        pruned.prepare(reading.training_batch(samples))
    own = TextReader(model, processor.tokenizer).token_embeds(["where is the circle ?", "red ring"])
    assert len(seen) == 1
    words = seen[0].signals["text_token_embeds"]
    assert torch.equal(words[:, : own.shape[1]], own) and not words[:, own.shape[1] :].any()


@pytest.mark.parametrize("name", ["trim", "cdpruner", "crisprune", "trimtokenator", "gridprune"])
def test_the_question_decides_what_is_kept(model, processor, reading, name):
    spec = spec_of(name)
    if name == "trimtokenator":  # in an untrained LLM's space all distances are about equal
        spec = PruningSpec(name, 16, {"stages": "align", "alignment_metric": "cosine"})
    pruned = PrunedModel(model, spec, processor.tokenizer)
    kept = []
    with torch.no_grad():
        for question in ("where is the circle ?", "what number is shown ?"):
            batch = reading.prompt_batch([scene_sample(10_000_001, question, None)])
            kept.append(pruned.prepare(batch).selections["image"][0].of(0))
    assert not torch.equal(*kept)


def test_the_instruction_is_what_the_user_says_without_answer_formats():
    suffix = "\nAnswer the question using a single word or phrase."
    assert instruction_text([f"What is red?{suffix}"]) == "What is red?"
    assert instruction_text(["How many?\nAnswer the question with a single word."]) == "How many?"  # ChartQA's
    assert instruction_text(["One?", f"Two?{suffix}"]) == "One?"  # later questions give earlier answers away
    assert instruction_text(["Which?\nAnswer with the option's letter from the given choices directly."]) == "Which?"


def test_training_and_inference_read_the_same_text(processor):
    formatter = Formatter(processor, SceneImages(), instructions=instruction_text)
    sample = scene_sample(10_000_002, "where is the circle ?", "northwest")
    prompt = Sample(sample.id, sample.source, sample.image, (Turn("where is the circle ?", None),))
    train, ask = formatter.training_batch([sample]), formatter.prompt_batch([prompt])
    assert train["instructions"] == ask["instructions"] == ["where is the circle ?"]


def test_what_is_missing_for_text_is_named(model, processor, formatter, reading, samples, tmp_path, untrained_folder):
    with pytest.raises(PruningError, match=r"set pruning.text_tower.*openai/clip-vit-large-patch14-336"):
        PrunedModel(model, PruningSpec("cdpruner", 16), processor.tokenizer)
    with pytest.raises(PruningError, match="give PrunedModel the model's tokenizer"):
        PrunedModel(model, PruningSpec("trimtokenator", 16))
    with pytest.raises(PruningError, match="neither a folder nor a checkpoint"):
        PrunedModel(model, PruningSpec("cdpruner", 16, text_tower=str(tmp_path / "none")))
    with pytest.raises(PruningError, match="is a 'llava', not a CLIP checkpoint"):
        PrunedModel(model, PruningSpec("cdpruner", 16, text_tower=str(untrained_folder)))
    model.config.vision_config.hidden_size = 96
    with pytest.raises(PruningError, match="width 128, this model's is 96 wide"):
        PrunedModel(model, PruningSpec("cdpruner", 16, text_tower=CLIP))
    model.config.vision_config.hidden_size = 128
    pruned = PrunedModel(model, PruningSpec("trimtokenator", 16), processor.tokenizer)
    with pytest.raises(PruningError, match=r"pass `instructions`, one text per row \(3 rows, 0 texts\)"):
        pruned.prepare(formatter.training_batch(samples))


# ---- signals of one's own ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_signal_is_a_record_and_is_read_wherever_its_source_is(model, without_cls, processor, reading, samples):
    """What everything accepts is recorded: no rule by spelling decides."""
    from dataclasses import dataclass
    from typing import ClassVar

    from prunetune.pruning import Selection, Signal, register_pruner, register_signal, registry, signals
    from prunetune.pruning.ops import ascending, top_k

    def sharpness(attention):
        return attention.query().norm(dim=-1)[..., attention.skip :]

    register_signal(Signal("sharpness", axes="B H N", source="attention", read=sharpness, about="norm of each query"))

    @register_pruner("sharpest", paper="test")
    @dataclass(frozen=True)
    class Sharpest:
        needs: ClassVar[frozenset] = frozenset({"sharpness", "sharpness@1"})

        def __call__(self, tokens, keep):
            return Selection(ascending(top_k(tokens.finite("sharpness").mean(dim=1), keep)))

    try:
        batch = reading.training_batch(samples)
        for own in (model, without_cls):
            prepared = PrunedModel(own, PruningSpec("sharpest", 16)).prepare(batch)
            layer = own.model.vision_tower.encoder.layers[0]
            out = own.model.vision_tower(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states
            query = layer.self_attn.q_proj(layer.layer_norm1(out[0])).unflatten(-1, (4, -1)).transpose(1, 2)
            expected = query.norm(dim=-1)[..., -144:]
            (tokens,) = prepared.vision["image"].groups
            torch.testing.assert_close(tokens.signals["sharpness"], expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(PruningError, match="two signals are called 'keys'"):
            register_signal(Signal("keys", axes="B N C", source="attention", read=sharpness, about="again"))
    finally:
        del registry._METHODS["sharpest"], signals._SIGNALS["sharpness"]


def test_a_pruner_that_needs_what_no_signal_is_called_is_refused():
    from dataclasses import dataclass
    from typing import ClassVar

    from prunetune.pruning import register_pruner

    with pytest.raises(PruningError, match="wishful needs 'wish': there is no signal 'wish'; there are cls_attention"):

        @register_pruner("wishful", paper="test")
        @dataclass(frozen=True)
        class Wishful:
            needs: ClassVar[frozenset] = frozenset({"wish"})
