"""Random visual tokens with every signal there is."""

from dataclasses import fields, replace

import torch
from hypothesis import strategies as st

from pruning import VisualTokens


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
    return VisualTokens(
        cls_attention=attention(heads),
        features=normal(count, channels).to(dtype),
        projected=normal(count, channels + 4).to(dtype),
        received_attention=attention(heads),
        object_attention=attention(heads),
        keys=normal(count, 7),
        cls_feature=normal(channels),
        reader_attention=attention(),
        reader_keys=normal(count, channels),
        image_embeds=normal(count, 6),
        text_embeds=pieces,
        general_embeds=normal(3, 6),
        text_token_embeds=words,
        general_token_embeds=normal(3, channels + 4),
        image_key=torch.randint(0, 2**31 - 1, (batch,), generator=g),
        grid=(rows, columns),
    )


def only(tokens: VisualTokens, item: int) -> VisualTokens:
    """One item of a batch, in float32."""
    parts = {}
    for field in fields(tokens):
        value = getattr(tokens, field.name)
        if isinstance(value, torch.Tensor):
            value = value[item : item + 1]
            parts[field.name] = value.float() if value.is_floating_point() else value
    return replace(tokens, **parts)


@st.composite
def cases(draw, side=7):
    batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, side)), draw(st.integers(1, side))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 10**6))
    tokens = make_tokens(batch, rows, columns, heads=draw(st.integers(1, 4)), seed=seed, dtype=dtype)
    return tokens, draw(st.integers(1, rows * columns))
