"""The contract that every pruner keeps, and an oracle in NumPy."""

import numpy as np
from my_pruning.norm import Norm

from prunetune.testing import PrunerContract, PrunerOracle


class TestNorm(PrunerContract, PrunerOracle):
    pruner = Norm

    def oracle(self, item, keep):
        norms = np.linalg.norm(item["features"].astype(np.float32), axis=-1)
        return sorted(np.argsort(-norms, kind="stable")[:keep].tolist())


class TestSumOfMagnitudes(PrunerContract):
    pruner = Norm
    options = {"power": 1.0}
