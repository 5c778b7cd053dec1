"""What every pruner keeps, and a comparison with a slow version of itself."""

from __future__ import annotations

import pickle
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from prunetune.pruning import PruningError, Selection, VisualTokens
from prunetune.pruning.registry import check_contract
from prunetune.pruning.signals import signal_of
from prunetune.testing.tokens import make_tokens, only, reading

SHAPES = ((1, 1, 1), (2, 3, 4), (3, 6, 5))
"""Items, rows and columns."""


def expected_count(pruner: Any, tokens: VisualTokens, keep: int) -> int:
    """Return how many tokens of each item a pruner has to keep: the budget, or what it keeps at least.

    A method for videos that keeps some frames whole says so in ``least(frames, per_frame)``.
    """
    least = getattr(pruner, "least", None)
    return keep if least is None else max(keep, least(tokens.frames, tokens.per_frame))


def check_selection(tokens: VisualTokens, keep: int, selection: Selection) -> None:
    """Check that a selection is K distinct ascending positions of every item, with K finite features where it merges.

    Raises:
        AssertionError: naming the item.
    """
    for item in range(len(tokens.features)):
        kept = selection.of(item).tolist()
        assert len(kept) == keep, f"item {item}: {len(kept)} positions, asked for {keep}"
        assert kept == sorted(set(kept)), f"item {item}: positions are not distinct and ascending: {kept}"
        assert kept[0] >= 0 and kept[-1] < tokens.count, f"item {item}: positions outside 0 to {tokens.count - 1}"
        if selection.merged is not None:
            merged = selection.merged[item]
            assert merged.shape == (keep, tokens.features.shape[-1]), f"item {item}: merged {tuple(merged.shape)}"
            assert torch.isfinite(merged).all(), f"item {item}: merged features are not finite"
            assert selection.origin is not None, "merged features come with the tokens they were made around"
            assert len(selection.origin[item]) == keep, f"item {item}: {len(selection.origin[item])} origins"
        if selection.mixing is not None:
            mixing = selection.mixing[item]
            assert mixing.shape == (keep, tokens.count), f"item {item}: mixing {tuple(mixing.shape)}"
            assert torch.isfinite(mixing).all(), f"item {item}: weights of mixing are not finite"
            assert selection.merged is None, "tokens are merged before the projector or after it"
            assert selection.origin is not None, "mixed tokens come with the tokens they were made around"


class PrunerContract:
    """What the rest of the library takes for granted of a pruner.

    Attributes:
        pruner: the class.
        options: fields that are not at their default.
        frames: how many frames an item has, for methods for videos.
    """

    pruner: ClassVar[Any]
    options: ClassVar[Mapping[str, Any]] = {}
    frames: ClassVar[int] = 1

    def build(self) -> Any:
        """Return the pruner with its options."""
        return type(self).pruner(**self.options)

    def tokens(self, items: int, rows: int, columns: int, **fields: Any) -> VisualTokens:
        """Return random tokens with nothing but what the pruner needs."""
        return reading(make_tokens(items, rows, columns, frames=self.frames, **fields), self.build().needs)

    def check(self, tokens: VisualTokens, keep: int) -> None:
        """Check what is kept, and how much of it."""
        pruner = self.build()
        check_selection(tokens, expected_count(pruner, tokens, keep), pruner(tokens, keep))

    def test_it_is_a_frozen_dataclass_whose_needs_are_signals(self) -> None:
        check_contract(type(self).pruner.__name__, type(self).pruner)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_keeps_k_distinct_ascending_positions_for_every_k(self, shape: Any, dtype: torch.dtype) -> None:
        tokens = self.tokens(*shape, dtype=dtype)
        for keep in range(1, tokens.count + 1):
            self.check(tokens, keep)

    def test_it_keeps_k_positions_where_nothing_differs(self) -> None:
        """Equal tokens, zero vectors: ties are broken, and nothing is divided by zero."""
        for fill in (1.0, 0.0):
            tokens = self.tokens(2, 4, 5).map(lambda values, fill=fill: torch.full_like(values, fill))  # type: ignore[misc]
            for keep in (1, 7, tokens.count):
                self.check(tokens, keep)

    def test_keeping_all_changes_nothing(self) -> None:
        tokens = self.tokens(2, 3, 4)
        selection = self.build()(tokens, tokens.count)
        assert selection.of(0).tolist() == selection.of(1).tolist() == list(range(tokens.count))
        unmerged = selection.merged is None and selection.mixing is None
        assert unmerged, "with K = N the features have to stay the model's own, so nothing is merged"

    def test_items_are_pruned_independently(self) -> None:
        tokens = self.tokens(3, 5, 5, dtype=torch.bfloat16)
        together = self.build()(tokens, 9)
        for item in range(3):
            alone = self.build()(only(tokens, item), 9)
            assert torch.equal(together.of(item), alone.of(0)), f"item {item} keeps others alone than in a batch"

    def test_it_answers_the_same_twice_and_leaves_its_input_alone(self) -> None:
        tokens = self.tokens(2, 5, 4)
        before = pickle.dumps(tokens)
        first, second = self.build()(tokens, 7), self.build()(tokens, 7)
        assert all(torch.equal(first.of(item), second.of(item)) for item in range(2))
        assert pickle.dumps(tokens) == before

    def test_numbers_that_are_not_finite_are_an_error(self) -> None:
        """`tokens.finite(signal)` does it; a pruner that reads `tokens.features` itself has to."""
        pruner = self.build()
        read = [signal_of(need).name for need in pruner.needs] or ["features", "projected"]
        refused = []
        for signal in read:
            tokens = self.tokens(1, 4, 4)
            value = tokens.require(signal)
            if value.is_floating_point():
                value.view(-1)[3] = float("nan")
                try:
                    pruner(tokens, tokens.count // 4)
                except PruningError:
                    refused.append(signal)
            else:  # an integer has no NaN
                refused.append(signal)
        assert refused, f"NaN in {' and '.join(read)} goes unnoticed"


class PrunerOracle:
    """A comparison with a slow, independent version: NumPy, float64, one item at a time.

    Attributes:
        pruner: the class.
        options: fields that are not at their default.
        cases: how many random inputs.
    """

    pruner: ClassVar[Any]
    options: ClassVar[Mapping[str, Any]] = {}
    cases: ClassVar[int] = 40

    @abstractmethod
    def oracle(self, item: Mapping[str, np.ndarray], keep: int) -> Sequence[int]:
        """Return the kept positions of one item, ascending.

        Args:
            item: "features" (N, C), "projected" (N, D) and every signal that the pruner needs, without the items' axis,
                as float64.
            keep: K.
        """

    def test_it_equals_its_oracle(self) -> None:
        pruner = type(self).pruner(**self.options)
        random = np.random.default_rng(0)
        for seed in range(self.cases):
            rows, columns = random.integers(1, 7, size=2).tolist()
            keep = int(random.integers(1, rows * columns + 1))
            tokens = reading(make_tokens(2, rows, columns, seed=seed), pruner.needs)
            selection = pruner(tokens, keep)
            for item in range(2):
                known = {"features": tokens.features, "projected": tokens.require("projected"), **tokens.signals}
                arrays = {name: value[item].double().numpy() for name, value in known.items()}
                expected = [int(index) for index in self.oracle(arrays, keep)]
                where = f"seed {seed}, item {item}, {keep} of {rows} x {columns}"
                assert selection.of(item).tolist() == expected, where
