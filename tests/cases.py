"""Random inputs of pruners, for Hypothesis."""

import torch
from hypothesis import strategies as st

from prunetune.testing import make_tokens


@st.composite
def cases(draw, side=7):
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, side)), draw(st.integers(1, side))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 10**6))
    tokens = make_tokens(batch, rows, columns, heads=draw(st.integers(1, 4)), seed=seed, dtype=dtype)
    return tokens, draw(st.integers(1, rows * columns))
