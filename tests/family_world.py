"""What tests of families share: batches of words and placeholders, and models livelier than their initialisation."""

from __future__ import annotations

import torch

IMAGE, VIDEO = 5, 6
WORDS = range(7, 64)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {"vocab_size": 64, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, **SHAPE}

WITH_CLS = {"hiprune": {"object_layer": 2}}
"""Options of methods on a small tower with [CLS]."""
WITHOUT_CLS = {
    **WITH_CLS,
    "vispruner": {"saliency": "received"},
    "crisprune": {"saliency": "received", "text": "llm"},
}
"""Options of methods on a small tower without it."""


def lively(build):
    """Return a model with weights three times as large as it is initialised with, so that answers differ."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
            if "position_embedding" in name or "cls_token" in name:
                parameter.normal_(std=0.5)
    return model


def noise(seed, *shape):
    """Return random pixels, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, side, labels):
    """Return ids (B, L), the mask, and labels of words."""
    length = max(map(len, rows))
    left = side == "left"
    ids, mask = [], []
    for row in rows:
        pad = [0] * (length - len(row))
        ids.append(pad * left + row + pad * (not left))
        mask.append(pad * left + [1] * len(row) + pad * (not left))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if labels:
        inputs["labels"] = torch.where(inputs["input_ids"] >= WORDS.start, inputs["input_ids"], -100)
    return inputs


def sentence(runs, words, seed):
    """Return ids: words around one run of placeholders after another, each a (placeholder, length)."""
    generator = torch.Generator().manual_seed(100 + seed)
    own = torch.randint(WORDS.start, WORDS.stop, (words,), generator=generator).tolist()
    ids = [1, *own[:2]]
    for token, count in runs:
        ids += [3] + [token] * count + [own[0]]
    return ids + own[2:]
