"""Tests for pruners, families and benchmarks that live outside this repository; the built-in ones pass the same.

Subclass one of the classes in a test file of your own; pytest collects its tests::

    from prunetune.testing import PrunerContract, PrunerOracle

    class TestNorm(PrunerContract, PrunerOracle):
        pruner = Norm

        def oracle(self, item, keep):
            norms = np.linalg.norm(item["features"], axis=-1)
            return sorted(np.argsort(-norms, kind="stable")[:keep])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunetune.lazy import importer

if TYPE_CHECKING:
    from prunetune.testing.benchmarks import BenchmarkContract as BenchmarkContract
    from prunetune.testing.families import FamilyIdentity as FamilyIdentity
    from prunetune.testing.pruners import PrunerContract as PrunerContract
    from prunetune.testing.pruners import PrunerOracle as PrunerOracle
    from prunetune.testing.pruners import check_selection as check_selection
    from prunetune.testing.tokens import make_tokens as make_tokens
    from prunetune.testing.tokens import only as only
    from prunetune.testing.tokens import reading as reading

# A name is imported when it is first used: the plugin that writes reports needs none of them.
_HOMES = {
    "BenchmarkContract": "benchmarks",
    "FamilyIdentity": "families",
    "PrunerContract": "pruners",
    "PrunerOracle": "pruners",
    "check_selection": "pruners",
    "make_tokens": "tokens",
    "only": "tokens",
    "reading": "tokens",
}

__all__ = list(_HOMES)
__getattr__ = importer(__name__, _HOMES)
