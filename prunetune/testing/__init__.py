"""Tests for pruners, families and benchmarks that live outside this repository; the built-in ones pass the same.

Subclass one of the classes in a test file of your own; pytest collects its tests::

    from prunetune.testing import PrunerContract, PrunerOracle

    class TestNorm(PrunerContract, PrunerOracle):
        pruner = Norm

        def oracle(self, item, keep):
            norms = np.linalg.norm(item["features"], axis=-1)
            return sorted(np.argsort(-norms, kind="stable")[:keep])
"""

from prunetune.testing.benchmarks import BenchmarkContract
from prunetune.testing.families import FamilyIdentity
from prunetune.testing.pruners import PrunerContract, PrunerOracle, check_selection, expected_count
from prunetune.testing.tokens import make_tokens, only, reading

__all__ = [
    "BenchmarkContract",
    "FamilyIdentity",
    "PrunerContract",
    "PrunerOracle",
    "check_selection",
    "expected_count",
    "make_tokens",
    "only",
    "reading",
]
