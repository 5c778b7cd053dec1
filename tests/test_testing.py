"""The tests that outside plug-ins run: they pass where they should, and each fails for what it is there for."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from prunetune.pruning import Selection
from prunetune.pruning.methods.divprune import DivPrune
from prunetune.pruning.methods.fastervlm import FasterVLM
from prunetune.testing import PrunerContract, PrunerOracle


class TestDivPrune(PrunerContract):
    pruner = DivPrune


class TestFasterVLM(PrunerContract, PrunerOracle):
    pruner = FasterVLM

    def oracle(self, item, keep):
        looked_at = item["cls_attention"].astype(np.float32).mean(0)
        return sorted(np.argsort(-looked_at, kind="stable")[:keep].tolist())


@dataclass(frozen=True)
class First:
    """Keeps the first tokens; what breaks it is an option."""

    wrong: str = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens, keep):
        features = tokens.features if self.wrong == "nan" else tokens.finite("features")
        items = len(features)
        indices = torch.arange(keep).expand(items, -1).clone()
        if self.wrong == "count":
            indices = indices[:, : max(1, keep - 1)]
        if self.wrong == "order":
            indices = indices.flip(1)
        if self.wrong == "batch" and items > 1:
            indices = torch.arange(tokens.count - keep, tokens.count).expand(items, -1)
        if self.wrong == "input":
            features[:] = 0
        if self.wrong == "undeclared":
            tokens.require("keys")
        if self.wrong == "merges all":
            return Selection(indices, list(features[:, :keep]), list(indices))
        return Selection(indices)


def outcomes(pruner, options):
    """Run the contract on a pruner and return the tests that fail."""
    contract = type("Contract", (PrunerContract,), {"pruner": pruner, "options": options})()
    calls = {
        "every k": lambda: contract.test_it_keeps_k_distinct_ascending_positions_for_every_k((2, 3, 4), torch.float32),
        "equal": contract.test_it_keeps_k_positions_where_nothing_differs,
        "all": contract.test_keeping_all_changes_nothing,
        "independent": contract.test_items_are_pruned_independently,
        "same twice": contract.test_it_answers_the_same_twice_and_leaves_its_input_alone,
        "nan": contract.test_numbers_that_are_not_finite_are_an_error,
    }
    failed = set()
    for name, call in calls.items():
        try:
            call()
        except Exception:  # an assertion, or what the pruner raises
            failed.add(name)
    return failed


@pytest.mark.parametrize(("wrong", "expected"), [
    ("", set()),
    ("count", {"every k", "equal"}),
    ("order", {"every k", "equal", "all"}),
    ("batch", {"independent"}),
    ("input", {"same twice"}),
    ("nan", {"nan"}),
    ("undeclared", {"every k", "equal", "all", "independent", "same twice"}),
    ("merges all", {"all"}),
])  # fmt: skip
def test_each_breach_of_the_contract_is_seen(wrong, expected):
    assert expected <= outcomes(First, {"wrong": wrong})
    assert wrong or not outcomes(First, {})


def test_a_wrong_oracle_is_seen():
    class Reversed(PrunerOracle):
        pruner = First

        def oracle(self, item, keep):
            return range(1, keep + 1)

    with pytest.raises(AssertionError, match="seed 0, item 0"):
        Reversed().test_it_equals_its_oracle()
