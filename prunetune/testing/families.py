"""Identity of a family: unpruned it is the stock model bit for bit, and pruning is nothing but dropping tokens."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunetune.configs import EngineConfig
from prunetune.models import load_projector, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.pruning import (
    PrunedModel,
    PruningError,
    PruningSpec,
    Selection,
    Vision,
    VisualTokens,
    registered_methods,
)
from prunetune.pruning.hooks import record_keywords, record_output
from prunetune.train.engine.engine import Engine, head_of
from prunetune.train.engine.prefix import common_prefix

Batch = dict[str, Any]

SMALL_MODELS: Mapping[str, Mapping[str, Any]] = {
    "hiprune": {"object_layer": 2},
    "vscan": {"shallow_layer": 2},
}
"""Options of methods that name a layer which small models do not have."""

PLAIN_ENGINE = EngineConfig(
    packing=False, supervised_logits=False, shared_prefix=False, project_kept=False, stop_tower=False
)

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
both_sides = pytest.mark.parametrize("side", ["right", "left"])


class Words:
    """A tokenizer of two words, for methods that read the instruction."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Return two ids."""
        return {"input_ids": [7 + len(text) % 11, 9]}


class Uneven:
    """Keeps of every item its first tokens, as many as its own features say, and of some none."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return 0 to ``keep`` positions of each item."""
        counts = (tokens.features > 0).flatten(1).sum(dim=1) % (keep + 1)
        return Selection([torch.arange(int(count)) for count in counts])


class NothingOfTheFirst:
    """Keeps nothing of the first item, and the first tokens of the others."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return ``keep`` positions of each item but the first."""
        kept = [torch.arange(keep) for _ in tokens.features]
        return Selection([torch.arange(0), *kept[1:]])


class FamilyIdentity:
    """The identity suite over every method that the family serves.

    A subclass gives a small float32 model, built from a configuration, and batches of it. Methods are those that the
    model offers the signals for; :attr:`options` are what they need on a small model. All of them run where the answer
    could be another for each, and one of each kind elsewhere.

    ``python -m pytest -p prunetune.testing.report --families-report FILE`` writes what passed to a file.

    Attributes:
        keep: visual tokens that methods keep of an item; less than any item has.
        options: of methods whose defaults do not fit the model, by name.
        suppressed: token ids that generation must not produce: placeholders, and the end of text.
        new_tokens: how many tokens are generated.
        can_be_stored: whether encoded images can be stored, and be projected again when they are read.
    """

    in_report: ClassVar[bool] = True  # read by prunetune.testing.report, which imports no class

    keep: ClassVar[int] = 4
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    suppressed: ClassVar[Sequence[int]] = ()
    new_tokens: ClassVar[int] = 3
    can_be_stored: ClassVar[bool] = True

    @abstractmethod
    def make_model(self) -> Any:
        """Return a new stock model in eval mode, the same weights in every call."""

    @abstractmethod
    def rows(self) -> list[Any]:
        """Return samples of different length: one of text alone, one with an image or a clip, one with three."""

    @abstractmethod
    def batch(self, rows: Sequence[Any], side: str, labels: bool) -> Batch:
        """Return samples as the processor would: padded on a side, with ``labels`` (B, L) if asked for."""

    def grown(self, inputs: Batch, ids: Tensor) -> Batch:
        """Return one row's inputs with answer tokens behind its ids (1, L), for generation step by step."""
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def sees(self, inputs: Batch) -> Tensor:
        """Return which positions each position of one row sees, (L, L): causal, or with blocks that see both ways."""
        length = inputs["input_ids"].shape[1]
        return torch.ones(length, length).tril().bool()

    def as_mask(self, visible: Tensor) -> Any:
        """Return what the stock model takes as ``attention_mask`` for one row's (1, 1, L, L) boolean mask."""
        return visible

    def forget(self, model: Any) -> None:
        """Clear what the stock model remembers of its last batch."""
        if hasattr(model.base_model, "rope_deltas"):
            model.base_model.rope_deltas = None

    # ---- what the tests share ----------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    def models(self) -> dict[torch.dtype, Any]:
        """One model for all tests of the class, by dtype; building it takes longer than most of them."""
        model = self.make_model()
        return {torch.float32: model, torch.bfloat16: copy.deepcopy(model).to(torch.bfloat16)}

    @pytest.fixture
    def model(self, models: dict[torch.dtype, Any]) -> Iterator[Any]:
        """The float32 model, left as it was found."""
        model = models[torch.float32]
        yield model
        model.eval().requires_grad_(True)
        model.zero_grad()

    @pytest.fixture(scope="class")
    def methods(self, models: dict[torch.dtype, Any]) -> list[str]:
        """The methods that the model offers the signals for."""
        model = models[torch.float32]
        found = []
        for name in registered_methods():
            try:
                self.plug(model, name)
            except PruningError:
                continue
            if name != "identity":  # has no budget but all
                found.append(name)
        assert len(found) > 3, f"only {found} can run on this model"
        return found

    @pytest.fixture
    def some_methods(self, model: Any, methods: list[str]) -> list[str]:
        """One method that compares features, one that merges, one that reads attention, one that reads the text."""
        found: dict[str, str] = {}
        for name in ("divprune", *methods):
            method = registered_methods()[name]
            needs = self.plug(model, name).pruner.needs
            kind = "merges" if method.merges else "text" if any("text" in need for need in needs) else "features"
            if any("attention" in need for need in needs):
                kind += " and attention"
            found.setdefault(kind, name)
        return sorted(set(found.values()))

    @pytest.fixture(autouse=True)
    def _for_the_report(self, model: Any, methods: list[str], record_property: Any) -> None:
        """Say of which family and of what inputs a test is, where a report is written."""
        pruned = self.plug(model, "identity", "100%")
        inputs = self.batch(self.rows(), "right", False)
        there = [modality for modality, name in pruned.family.pixels.items() if inputs.get(name) is not None]
        record_property("family", pruned.family.name)
        record_property("modality", " and ".join(there))
        record_property("methods", len(methods))

    def plug(self, model: Any, name: str, keep: Any = None, **fields: Any) -> PrunedModel:
        """Return the model under a method."""
        self.forget(model)
        options = {**SMALL_MODELS.get(name, {}), **self.options.get(name, {})}
        spec = PruningSpec(name, self.keep if keep is None else keep, options, **fields)
        words: Any = Words()  # has what is called of a tokenizer
        return PrunedModel(model, spec, words)

    def under(self, model: Any, pruner: Any, **fields: Any) -> PrunedModel:
        """Return the model under a pruner that is no method."""
        pruned = self.plug(model, "identity", self.keep, **fields)
        pruned.pruner = pruner
        return pruned

    def original(self, model: Any) -> str:
        """Return the position policy under which the kept tokens stay where they were."""
        return "original" if "original" in self.plug(model, "identity").family.position_policies else "auto"

    def asked(self, rows: Sequence[Any], side: str = "right", labels: bool = True) -> Batch:
        """Return a batch with an instruction per row."""
        return {**self.batch(rows, side, labels), "instructions": [f"question {number}" for number in range(len(rows))]}

    def alone(self, rows: Sequence[Any], number: int, side: str = "right", labels: bool = True) -> Batch:
        """Return one of the rows in a batch of its own."""
        return {**self.batch([rows[number]], side, labels), "instructions": ["question " + str(number)]}

    def texts(self) -> list[Any]:
        """Return the rows of text alone."""
        return [row for row in self.rows() if not _has_pixels(self.batch([row], "right", False))]

    def settings(self) -> dict[str, Any]:
        """Return how everything is generated."""
        count = self.new_tokens
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return {**options, "suppress_tokens": list(self.suppressed)} if self.suppressed else options

    def train_projector(self, model: Any) -> dict[str, Tensor]:
        """Put a model in training mode with the projector alone trainable, and return its parameters."""
        model.requires_grad_(False)
        projector = projector_state(model, keep_vars=True)
        for parameter in projector.values():
            parameter.requires_grad_(True)
        model.train()
        return projector

    def check_against_hidden(self, model: Any, pruned: PrunedModel, inputs: Batch, what: str) -> None:
        """Compare one row, without labels, with its full run in which the dropped tokens are hidden from all others."""
        policy = pruned.position_policy
        prepared = pruned.prepare(inputs)
        ours = model(**prepared.inputs).logits[0]
        self.forget(model)
        full = self.plug(model, "identity", "100%", position_policy=policy).prepare(inputs).inputs
        positions = pruned.family.positions(model, inputs)
        length, visible = inputs["input_ids"].shape[1], prepared.keep[0]
        mask = self.as_mask((self.sees(inputs) & visible[None, :] | torch.eye(length).bool())[None, None])
        theirs = model(**{**full, "attention_mask": mask, "position_ids": positions}).logits
        apart = (ours - theirs[0, visible]).abs().max()
        assert apart < 1e-4 * (1 + ours.abs().max()), f"{what}: logits differ by {apart:g}"
        self.forget(model)

    def check_against_language_model(self, model: Any, pruned: PrunedModel, inputs: Batch, what: str) -> None:
        """Compare one row, without labels, with the language model alone on the embeddings of its kept rows."""
        language_model = pruned.family.llm(model)
        prepared = pruned.prepare(inputs)
        self.forget(model)
        stock = {name: value for name, value in inputs.items() if name != "instructions"}
        with record_keywords(language_model) as calls, record_output(language_model) as outputs:
            model(**stock)
            model(**prepared.inputs)
        given, kept = calls[0], prepared.keep[0]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(len(kept))[None]  # as the language model counts by itself
        positions = positions[:, : int(kept.sum())]
        written = calls[1].get("position_ids")
        assert written is None or torch.equal(written, positions), what
        theirs = language_model(
            inputs_embeds=given["inputs_embeds"][:, kept],
            attention_mask=self.as_mask(self.sees(inputs)[kept][:, kept][None, None]),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        ran: Any = outputs[1]
        ours = ran.last_hidden_state
        assert ours.shape == theirs.shape, what
        apart = (ours - theirs).abs().max()
        assert apart < 1e-4 * (1 + ours.abs().max()), f"{what}: hidden states differ by {apart:g}"
        self.forget(model)

    # ---- the tests ---------------------------------------------------------------------------------------------

    def test_rows_hold_none_one_and_several_images(self, model: Any) -> None:
        counts = []
        for row in self.rows():
            visions = self.plug(model, "identity", "100%").encode(self.batch([row], "right", False))
            counts.append(sum(len(vision.slots) for vision in visions.values()))
        # Of images that are cut into tiles, each tile is one.
        assert 0 in counts and max(counts) >= 3 and len(set(counts)) >= 3, f"images per row: {counts}"

    @torch.no_grad()
    @both_dtypes
    def test_keep_all_is_bit_identical_to_stock(
        self, models: dict[torch.dtype, Any], methods: list[str], some_methods: list[str], dtype: torch.dtype
    ) -> None:
        model, rows = models[dtype], self.rows()
        expected = {}
        for side in ("right", "left"):
            self.forget(model)
            expected[side] = model(**_as(self.batch(rows, side, True), dtype))
        prompts = _as(self.batch(rows, "left", False), dtype)
        self.forget(model)
        answers = model.generate(**prompts, **self.settings())[:, prompts["input_ids"].shape[1] :]
        for name in ["identity", *methods]:
            pruned = self.plug(model, name, "100%")
            for side, stock in expected.items():
                ours = pruned.forward(**_as(self.asked(rows, side), dtype))
                assert torch.equal(ours.logits, stock.logits) and torch.equal(ours.loss, stock.loss), (name, side)
                self.forget(model)
            if name in some_methods:
                asked = _as(self.asked(rows, "left", False), dtype)
                assert torch.equal(pruned.generate(**asked, **self.settings()).tokens, answers), name

    @torch.no_grad()
    def test_pruned_equals_the_full_run_with_dropped_tokens_hidden(self, model: Any, methods: list[str]) -> None:
        """The full sequence with original positions, where the dropped tokens are hidden from everything else."""
        rows, policy = self.rows(), self.original(model)
        for name in methods:
            if registered_methods()[name].merges:
                continue  # their features are not the full run's
            pruned = self.plug(model, name, position_policy=policy)
            for number in range(len(rows)):
                inputs = self.alone(rows, number, labels=False)
                self.check_against_hidden(model, pruned, inputs, f"{name}, row {number}")

    @torch.no_grad()
    def test_pruned_and_numbered_anew_equals_the_language_model_on_the_kept_rows(
        self, model: Any, methods: list[str]
    ) -> None:
        """The stock run's embeddings, of which the kept ones go into the LLM at the stock run's first positions."""
        rows, family = self.rows(), self.plug(model, "identity").family
        if "compact" not in family.position_policies:
            pytest.skip("the family's positions count rows and columns, and can't be numbered anew")
        for name in methods:
            if registered_methods()[name].merges:
                continue  # their features are not the full run's
            pruned = self.plug(model, name, position_policy="compact")
            for number in range(len(rows)):
                inputs = self.alone(rows, number, labels=False)
                self.check_against_language_model(model, pruned, inputs, f"{name}, row {number}")

    @torch.no_grad()
    def test_an_item_of_which_nothing_is_kept_is_a_hidden_one(self, model: Any) -> None:
        rows = self.rows()
        dropped = 0
        for number in range(len(rows)):
            pruned = self.under(model, NothingOfTheFirst(), position_policy=self.original(model))
            inputs = self.alone(rows, number, labels=False)
            dropped += sum(0 in counts for counts in pruned.prepare(inputs).kept.values())
            self.check_against_hidden(model, pruned, inputs, f"row {number}")
        assert dropped or self.plug(model, "identity").family.item != "image"  # a crop is a part of an image

    @torch.no_grad()
    @both_sides
    def test_a_batch_equals_each_of_its_rows_alone(self, model: Any, some_methods: list[str], side: str) -> None:
        rows = self.rows()
        for name in some_methods:
            batch = self.asked(rows, side)
            together = self.plug(model, name).prepare(batch, padding_side=side)
            logits = model(**together.inputs).logits
            for number in range(len(rows)):
                inputs = self.alone(rows, number)
                alone = self.plug(model, name).prepare(inputs)
                there = batch["attention_mask"][number].bool()
                assert torch.equal(together.keep[number, there], alone.keep[0]), f"{name}, row {number}"
                real = together.inputs["attention_mask"][number].bool()
                own = model(**alone.inputs).logits[0]
                torch.testing.assert_close(logits[number, real], own, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    @both_dtypes
    def test_what_is_kept_depends_on_the_row_alone(
        self, models: dict[torch.dtype, Any], methods: list[str], dtype: torch.dtype
    ) -> None:
        """In a batch or alone, padded on either side."""
        model, rows = models[dtype], self.rows()
        for name in methods:
            pruned = self.plug(model, name)
            kept = []
            for number in range(len(rows)):
                kept.append(pruned.prepare(_as(self.alone(rows, number, labels=False), dtype)).keep[0])
            for side in ("right", "left"):
                inputs = _as(self.asked(rows, side, False), dtype)
                together = pruned.prepare(inputs).keep
                for number, own in enumerate(kept):
                    there = inputs["attention_mask"][number].bool()
                    assert torch.equal(together[number, there], own), f"{name}, row {number}, padded on the {side}"

    @torch.no_grad()
    def test_generating_equals_step_by_step(self, model: Any, some_methods: list[str]) -> None:
        rows = self.rows()
        for name in some_methods:
            generated = self.plug(model, name).generate(**self.asked(rows, "left", False), **self.settings()).tokens
            for number in range(len(rows)):
                own = self.alone(rows, number, labels=False)
                ids = own["input_ids"]
                for step in range(self.new_tokens):
                    logits = self.plug(model, name).forward(**self.grown(own, ids)).logits[0, -1]
                    logits[list(self.suppressed)] = float("-inf")
                    assert int(logits.argmax()) == int(generated[number, step]), f"{name}, row {number}, step {step}"
                    ids = torch.cat([ids, generated[number : number + 1, step : step + 1]], dim=1)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("options", "copies"),
        [({"num_beams": 3}, 1), ({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, 2)],
        ids=["beams", "samples"],
    )
    def test_beams_and_samples_equal_each_row_alone(self, model: Any, options: dict[str, Any], copies: int) -> None:
        """Also where rows keep unequally many tokens, of some images none."""
        rows, settings = self.rows(), {**self.settings(), **options}
        for pruned in (self.plug(model, "divprune"), self.under(model, Uneven())):
            together = pruned.generate(**self.asked(rows, "left", False), **settings).tokens
            for number in range(len(rows)):
                alone = pruned.generate(**self.alone(rows, number, "left", False), **settings).tokens
                own = together[number * copies : (number + 1) * copies]
                assert torch.equal(own, alone), f"{type(pruned.pruner).__name__}, row {number}"

    def test_gradients_reach_the_whole_projector_alone(self, model: Any, some_methods: list[str]) -> None:
        projector = self.train_projector(model)
        for name in some_methods:
            model.zero_grad()
            with self.plug(model, name).attach():
                model(**self.asked(self.rows())).loss.backward()
            touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            assert touched == set(projector), f"{name}: {sorted(touched ^ set(projector))}"

    def test_the_engine_changes_neither_loss_nor_gradients(
        self, model: Any, some_methods: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every saving at once, also with the few tokens that small prompts begin with, against none."""
        monkeypatch.setattr("prunetune.train.engine.engine.SHORTEST", 1)
        self.check_engine(model, some_methods, self.asked(self.rows()))

    def test_the_engine_trains_on_text_alone(self, model: Any, some_methods: list[str]) -> None:
        self.check_engine(model, some_methods, self.asked(self.texts()))

    def check_engine(self, model: Any, methods: list[str], batch: Batch) -> None:
        """Compare loss and gradients of a batch with every saving and without any."""
        projector = self.train_projector(model)
        visual = self.plug(model, "identity").family.token_ids(model)
        prefix = common_prefix(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), visual)
        for name in methods:
            pruned = self.plug(model, name)
            found = []
            for switches in (PLAIN_ENGINE, EngineConfig()):
                model.zero_grad()
                engine, head = Engine(pruned, switches, prefix), head_of(pruned, switches, partitioned=False)
                with engine.attached(), engine.own_head(head):
                    loss = engine.summed_loss(model, batch)
                    loss.backward()
                gradients = [parameter.grad for parameter in projector.values() if parameter.grad is not None]
                found.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
            (loss, gradient), (other, others) = found
            torch.testing.assert_close(other, loss, rtol=1e-5, atol=0, msg=name)
            assert (others - gradient).norm() <= 1e-5 * gradient.norm(), name

    def test_text_alone_is_stock_with_a_gradient_of_zero(self, model: Any, some_methods: list[str]) -> None:
        rows = self.texts()
        self.forget(model)
        expected = model(**self.batch(rows, "right", True)).loss
        projector = self.train_projector(model)
        for name in some_methods:
            model.zero_grad()
            with self.plug(model, name).attach():
                loss = model(**self.asked(rows)).loss
            loss.backward()
            assert torch.equal(loss, expected), name
            for parameter in projector.values():
                assert parameter.grad is not None and not parameter.grad.any(), name

    def test_ranks_without_an_image_encode_a_blank_of_every_modality(
        self, model: Any, some_methods: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Under ZeRO-3: text alone, as a rank trains on it whose weights are in pieces."""
        monkeypatch.setattr("prunetune.pruning.preparing.is_partitioned", lambda _: True)
        rows = self.texts()
        self.forget(model)
        expected = model(**self.batch(rows, "right", True)).loss
        projector = self.train_projector(model)
        for name in some_methods:
            model.zero_grad()
            pruned = self.plug(model, name)
            encoded = pruned.prepare(self.asked(rows)).inputs["mm_encoder_outputs"]
            assert set(encoded) == set(pruned.family.pixels), name
            with pruned.attach():
                loss = model(**self.asked(rows)).loss
            loss.backward()
            assert torch.equal(loss, expected), name
            for parameter in projector.values():
                assert parameter.grad is not None and not parameter.grad.any(), name

    @torch.no_grad()
    def test_text_alone_is_generated_as_stock(self, model: Any) -> None:
        rows = self.texts()
        prompts = self.batch(rows, "left", False)
        self.forget(model)
        answers = model.generate(**prompts, **self.settings())[:, prompts["input_ids"].shape[1] :]
        ours = self.plug(model, "divprune").generate(**prompts, **self.settings()).tokens
        assert torch.equal(ours, answers)

    @torch.no_grad()
    def test_images_and_placeholders_that_disagree_are_refused(self, model: Any) -> None:
        pruned = self.plug(model, "divprune")
        inputs = self.batch(self.rows(), "right", False)
        word = int(self.batch(self.texts(), "right", False)["input_ids"][0, 0])
        for modality in pruned.encode(inputs):
            token = pruned.family.token_id(model, modality)
            where = (inputs["input_ids"] == token).nonzero()[-1]
            fewer = inputs["input_ids"].clone()
            fewer[tuple(where)] = word  # one token less
            with pytest.raises(PruningError, match="placeholder"):
                pruned.prepare({**inputs, "input_ids": fewer})
            with pytest.raises(PruningError, match="placeholder"):  # the images of several, the placeholders of none
                pruned.prepare({**inputs, "input_ids": fewer.masked_fill(fewer == token, word)})

    @torch.no_grad()
    def test_the_same_is_kept_in_training_and_inference(self, model: Any, some_methods: list[str]) -> None:
        for name in some_methods:
            inputs = self.asked(self.rows())
            at_rest = self.plug(model, name).prepare(inputs).keep
            model.train()
            assert torch.equal(self.plug(model, name).prepare(inputs).keep, at_rest), name
            model.eval()

    @torch.no_grad()
    def test_images_from_disk_give_the_same_logits(self, model: Any, some_methods: list[str], tmp_path: Path) -> None:
        if not self.can_be_stored:
            pytest.skip("encoded images of this family can't be stored")
        for name in some_methods:
            inputs, pruned = self.asked(self.rows()), self.plug(model, name)
            fresh = model(**pruned.prepare(inputs).inputs).logits
            stored = {}
            for modality, vision in pruned.encode(inputs).items():
                vision.save(tmp_path / modality)
                stored[modality] = Vision.load(tmp_path / modality)
            without = {key: value for key, value in inputs.items() if key not in pruned.family.pixels.values()}
            self.forget(model)
            assert torch.equal(model(**pruned.prepare(without, vision=stored).inputs).logits, fresh), name

    @torch.no_grad()
    def test_a_step_zero_adapter_is_training_free_and_a_tuned_one_differs_in_the_projector(
        self, tmp_path: Path
    ) -> None:
        model, wrapped = self.make_model(), wrap_projector(self.make_model())
        inputs = self.asked(self.rows())
        untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        training_free = self.plug(model, "divprune").forward(**inputs).logits
        projector = projector_state(model)
        write_adapter(tmp_path / "zero", projector, wrapped, {"frozen_hash": ""})
        write_adapter(tmp_path / "tuned", {n: t + 0.1 for n, t in projector.items()}, wrapped, {"frozen_hash": ""})
        load_projector(model, tmp_path / "zero")
        assert torch.equal(self.plug(model, "divprune").forward(**inputs).logits, training_free)
        load_projector(model, tmp_path / "tuned")
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, untouched[name])}
        assert changed == set(projector)
        assert not torch.equal(self.plug(model, "divprune").forward(**inputs).logits, training_free)


def _as(inputs: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch whose pixels have a dtype."""
    cast = {}
    for name, value in inputs.items():
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        cast[name] = value.to(dtype) if is_float else value
    return cast


def _has_pixels(inputs: Batch) -> bool:
    return any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())
