"""Random visual tokens with every signal there is."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from prunetune.pruning import VisualTokens
from prunetune.pruning.signals import signal_of


def make_tokens(batch, rows, columns, channels=12, heads=3, seed=0, dtype=torch.float32) -> VisualTokens:
    g = torch.Generator().manual_seed(seed)
    count = rows * columns

    def normal(*shape):
        return torch.randn(batch, *shape, generator=g)

    def attention(*shape):
        return normal(*shape, count + 1).mul(2).softmax(-1)[..., 1:].contiguous()

    words = normal(5, channels + 4)
    words[:, 3 + seed % 2 :] = 0  # padding
    pieces = normal(2, 6)
    pieces[::2, 1] = 0
    cls_attention = attention(heads)
    return VisualTokens(
        features=normal(count, channels).to(dtype),
        projected=normal(count, channels + 4).to(dtype),
        signals={
            "cls_attention": cls_attention,
            "received_attention": attention(heads),
            "object_attention": attention(heads),
            "keys": normal(count, 7),
            "cls_feature": normal(channels),
            "reader_attention": attention(),
            "reader_keys": normal(count, channels),
            "image_embeds": normal(count, 6),
            "text_embeds": pieces,
            "general_embeds": normal(3, 6),
            "text_token_embeds": words,
            "general_token_embeds": normal(3, channels + 4),
            "image_key": torch.randint(0, 2**31 - 1, (batch,), generator=g),
        },
        grid=(rows, columns),
    )


def only(tokens: VisualTokens, item: int) -> VisualTokens:
    """One item of a batch, in float32."""

    def one(values):
        values = values[item : item + 1]
        return values.float() if values.is_floating_point() else values

    return tokens.map(one)


def reading(tokens: VisualTokens, needs, **fields) -> VisualTokens:
    """The same tokens with nothing but the signals in ``needs``."""
    signals = {signal_of(need).name: tokens.require(signal_of(need).name) for need in needs}
    return replace(tokens, signals=signals, **fields)


@st.composite
def cases(draw, side=7):
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, side)), draw(st.integers(1, side))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 10**6))
    tokens = make_tokens(batch, rows, columns, heads=draw(st.integers(1, 4)), seed=seed, dtype=dtype)
    return tokens, draw(st.integers(1, rows * columns))
