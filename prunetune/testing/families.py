"""Identity of a family: unpruned it is the stock model bit for bit, and pruning is nothing but dropping tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunetune.models import load_projector, wrap_projector, write_adapter
from prunetune.models.adapter import projector_state
from prunetune.pruning import PrunedModel, PruningError, PruningSpec, Vision, registered_methods

Batch = dict[str, Any]


class Words:
    """A tokenizer of two words, for methods that read the instruction."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Return two ids."""
        return {"input_ids": [7 + len(text) % 11, 9]}


class FamilyIdentity:
    """The identity suite over every method that the family serves.

    A subclass gives a small float32 model, built from a configuration, and batches of it. Methods are those that the
    model offers the signals for; :attr:`options` are what they need on a small model.

    Attributes:
        keep: visual tokens that methods keep of an item; less than any item has.
        options: of methods whose defaults do not fit the model, by name.
        suppressed: token ids that generation must not produce: placeholders, and the end of text.
    """

    keep: ClassVar[int] = 4
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    suppressed: ClassVar[Sequence[int]] = ()
    new_tokens: ClassVar[int] = 3

    @abstractmethod
    def make_model(self) -> Any:
        """Return a new stock model in eval mode, the same weights in every call."""

    @abstractmethod
    def rows(self) -> list[Any]:
        """Return samples, at least two of different length with images, and one of text alone."""

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

    @pytest.fixture
    def model(self) -> Any:
        """A model of its own for each test."""
        return self.make_model()

    @pytest.fixture
    def methods(self, model: Any) -> list[str]:
        """The methods that the model offers the signals for."""
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

    def plug(self, model: Any, name: str, keep: Any = None, **fields: Any) -> PrunedModel:
        """Return the model under a method."""
        self.forget(model)
        spec = PruningSpec(name, self.keep if keep is None else keep, dict(self.options.get(name, {})), **fields)
        words: Any = Words()  # has what is called of a tokenizer
        return PrunedModel(model, spec, words)

    def asked(self, rows: Sequence[Any], side: str = "right", labels: bool = True) -> Batch:
        """Return a batch with an instruction per row."""
        return {**self.batch(rows, side, labels), "instructions": [f"question {number}" for number in range(len(rows))]}

    def alone(self, rows: Sequence[Any], number: int, side: str = "right", labels: bool = True) -> Batch:
        """Return one of the rows in a batch of its own."""
        return {**self.batch([rows[number]], side, labels), "instructions": [f"question {number}"]}

    def settings(self) -> dict[str, Any]:
        """Return how everything is generated."""
        count = self.new_tokens
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return {**options, "suppress_tokens": list(self.suppressed)} if self.suppressed else options

    # ---- the tests ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_keep_all_is_bit_identical_to_stock(self, model: Any, methods: list[str]) -> None:
        rows = self.rows()
        inputs, prompts = self.batch(rows, "right", True), self.batch(rows, "left", False)
        self.forget(model)
        stock = model(**inputs)
        self.forget(model)
        answers = model.generate(**prompts, **self.settings())[:, prompts["input_ids"].shape[1] :]
        for name in ["identity", *methods]:
            pruned = self.plug(model, name, "100%")
            ours = pruned.forward(**self.asked(rows))
            assert torch.equal(ours.logits, stock.logits) and torch.equal(ours.loss, stock.loss), name
            self.forget(model)
            assert torch.equal(pruned.generate(**self.asked(rows, "left", False), **self.settings()).tokens, answers), (
                name
            )

    @torch.no_grad()
    def test_pruned_equals_the_full_run_with_dropped_tokens_hidden(self, model: Any, methods: list[str]) -> None:
        """The full sequence with original positions, where the dropped tokens are hidden from everything else."""
        rows = self.rows()
        for name in methods:
            if registered_methods()[name].merges:
                continue  # their features are not the full run's
            policies = self.plug(model, name).family.position_policies
            policy = "original" if "original" in policies else "auto"
            for number in range(len(rows)):
                pruned = self.plug(model, name, position_policy=policy)
                inputs = self.alone(rows, number, labels=False)
                prepared = pruned.prepare(inputs)
                ours = model(**prepared.inputs).logits[0]
                self.forget(model)
                full = self.plug(model, "identity", "100%", position_policy=policy).prepare(inputs).inputs
                positions = pruned.family.positions(model, inputs)
                length, visible = inputs["input_ids"].shape[1], prepared.keep[0]
                mask = self.as_mask((self.sees(inputs) & visible[None, :] | torch.eye(length).bool())[None, None])
                theirs = model(**{**full, "attention_mask": mask, "position_ids": positions}).logits
                apart = (ours - theirs[0, visible]).abs().max()
                assert apart < 1e-4 * (1 + ours.abs().max()), f"{name}, row {number}: logits differ by {apart:g}"
                self.forget(model)

    @torch.no_grad()
    def test_a_batch_equals_each_of_its_rows_alone(self, model: Any, methods: list[str]) -> None:
        rows = self.rows()
        for name in methods:
            together = self.plug(model, name).prepare(self.asked(rows))
            logits = model(**together.inputs).logits
            for number in range(len(rows)):
                inputs = self.alone(rows, number)
                alone = self.plug(model, name).prepare(inputs)
                length = inputs["input_ids"].shape[1]
                assert torch.equal(together.keep[number, :length], alone.keep[0]), f"{name}, row {number}"
                real = together.inputs["attention_mask"][number].bool()
                own = model(**alone.inputs).logits[0]
                torch.testing.assert_close(logits[number, real], own, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_generating_equals_step_by_step(self, model: Any, methods: list[str]) -> None:
        rows = self.rows()
        for name in methods:
            generated = self.plug(model, name).generate(**self.asked(rows, "left", False), **self.settings()).tokens
            for number in range(len(rows)):
                own = self.alone(rows, number, labels=False)
                ids = own["input_ids"]
                for step in range(self.new_tokens):
                    logits = self.plug(model, name).forward(**self.grown(own, ids)).logits[0, -1]
                    logits[list(self.suppressed)] = float("-inf")
                    assert int(logits.argmax()) == int(generated[number, step]), f"{name}, row {number}, step {step}"
                    ids = torch.cat([ids, generated[number : number + 1, step : step + 1]], dim=1)

    def test_gradients_reach_the_projector_alone(self, model: Any, methods: list[str]) -> None:
        projectors = self.plug(model, "identity", "100%").family.projectors
        model.requires_grad_(False)
        for projector in projectors:
            model.base_model.get_submodule(projector).requires_grad_(True)
        model.train()
        try:
            for name in methods:
                model.zero_grad()
                with self.plug(model, name).attach():
                    model(**self.asked(self.rows())).loss.backward()
                touched = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
                assert touched, f"{name}: no gradient"
                assert all(any(f"{p}." in t for p in projectors) for t in touched), f"{name}: {touched}"
        finally:
            model.eval().requires_grad_(True)
            model.zero_grad()

    @torch.no_grad()
    def test_the_same_is_kept_in_training_and_inference(self, model: Any, methods: list[str]) -> None:
        for name in methods:
            inputs = self.asked(self.rows())
            at_rest = self.plug(model, name).prepare(inputs).keep
            model.train()
            try:
                assert torch.equal(self.plug(model, name).prepare(inputs).keep, at_rest), name
            finally:
                model.eval()

    @torch.no_grad()
    def test_images_from_disk_give_the_same_logits(self, model: Any, methods: list[str], tmp_path: Path) -> None:
        for name in methods:
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
