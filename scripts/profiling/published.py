"""How papers count, each in its own convention, apart from our own accounting; docs/profile.md compares the two.

Named functions reproduce the published tables, so that a number of ours can be put beside one of theirs. Nothing of a
profile is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Sizes of a LLaMA-like LLM without grouped keys.

    Attributes:
        layers: how many.
        width: of the residual stream, d.
        feed_forward: of the feed-forward part, m.
    """

    layers: int
    width: int
    feed_forward: int


VICUNA_7B = Decoder(32, 4096, 11008)
VICUNA_13B = Decoder(40, 5120, 13824)

TOWER_LAYERS, TOWER_WIDTH, TOWER_FEED_FORWARD, PATCH, TOWER_TOKENS = 24, 1024, 4096, 14, 577
"""CLIP ViT-L/14 at 336 pixels: 576 patches and [CLS]."""
MIB = 2**20


def tower_flops(crops: int = 1) -> float:
    """Return the FLOP of CLIP-L/336 over an image's crops: all 24 layers and the patch embedding."""
    layer = 2 * (4 * TOWER_WIDTH**2 + 2 * TOWER_WIDTH * TOWER_FEED_FORWARD) * TOWER_TOKENS
    attention = 4 * TOWER_WIDTH * TOWER_TOKENS**2
    embedding = 2 * 3 * PATCH**2 * TOWER_WIDTH * (TOWER_TOKENS - 1)
    return crops * (TOWER_LAYERS * (layer + attention) + embedding)


def layer_flops(decoder: Decoder, tokens: float) -> float:
    """Return one LLM layer's FLOP, two for a multiplication and an addition: four projections, three of the SwiGLU."""
    linear = 2 * (4 * decoder.width**2 + 3 * decoder.width * decoder.feed_forward) * tokens
    return linear + 4 * decoder.width * tokens**2


def vispruner_flops(decoder: Decoder, tokens: float, crops: int = 1) -> float:
    """Return VisPruner's FLOPs (its tables 6 to 8): the tower, and the LLM over the visual tokens alone.

    No text, no projector, no head: a prompt of their own costs more.

    Args:
        decoder: the LLM.
        tokens: visual tokens that reach it.
        crops: of the image, 5 for LLaVA-NeXT's 2,880 tokens.
    """
    return tower_flops(crops) + decoder.layers * layer_flops(decoder, tokens)


def vispruner_fastv_flops(decoder: Decoder, tokens: float, ratio: float, boundary: int = 2, crops: int = 1) -> float:
    """Return the FLOPs of the FastV rows in VisPruner's tables.

    Args:
        decoder: the LLM.
        tokens: visual tokens from layer ``boundary`` on.
        ratio: their share of all tokens; the first layers are counted with ``tokens / ratio``, which is 580 and not 576
            for 58 tokens at 10 %.
        boundary: the first layer that sees fewer.
        crops: of the image.
    """
    first = boundary * layer_flops(decoder, tokens / ratio)
    rest = (decoder.layers - boundary) * layer_flops(decoder, tokens)
    return tower_flops(crops) + first + rest


def kv_mib(decoder: Decoder, tokens: float) -> float:
    """Return the MiB of keys and values of so many tokens in half precision: 0.5 a token of the 7B LLM."""
    return 2 * decoder.layers * decoder.width * 2 * tokens / MIB


def fastv_kv_mib(decoder: Decoder, tokens: float, ratio: float, boundary: int = 2) -> float:
    """Return the same where the first layers hold ``tokens / ratio``."""
    average = (boundary * tokens / ratio + (decoder.layers - boundary) * tokens) / decoder.layers
    return kv_mib(decoder, average)


def fastv_layer(decoder: Decoder, tokens: float) -> float:
    """Return FastV's cost of a layer, 4nd² + 2n²d + 2ndm: multiplications alone, of a two-matrix feed-forward part."""
    width, feed_forward = decoder.width, decoder.feed_forward
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * feed_forward


def fastv_ratio(decoder: Decoder, visual: float, text: float, boundary: int, dropped: float) -> float:
    """Return the share of FLOPs that FastV leaves, by its paper's formula.

    Args:
        decoder: the LLM.
        visual: visual tokens that enter it.
        text: other tokens, which all stay.
        boundary: K, the first layer that sees fewer.
        dropped: R, the share of visual tokens that are dropped there.
    """
    whole = fastv_layer(decoder, visual + text)
    fewer = fastv_layer(decoder, visual * (1 - dropped) + text)
    return (boundary * whole + (decoder.layers - boundary) * fewer) / (decoder.layers * whole)


def adaptive_study_flops(decoder: Decoder, visual: float, text: float) -> float:
    """Return the FLOPs of the adaptive study's table 9: FastV's layer over visual and text tokens, without a tower."""
    return decoder.layers * fastv_layer(decoder, visual + text)
