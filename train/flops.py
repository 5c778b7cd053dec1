"""What a step computes, in FLOP: two per weight and token in linear layers, and the products of attention.

Only matrix products are counted, as in the usual definition of MFU. The LLM is frozen: its backward pass goes to the
inputs alone and costs what the forward pass costs, not twice as much; its attention, which has no weights, costs
twice. Causal attention is counted by the pairs that see each other, half of the square. An LLM of the 7B shape costs
26.4 GFLOP a token forward and backward, and 36.5 with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from prunetune.train.shape import LanguageShape, ModelShape, TowerShape


@dataclass(frozen=True)
class Work:
    """What some samples ask for; works of several batches add up.

    Attributes:
        tokens: of the LLM after pruning, padding included where there is any.
        pairs: of tokens that see each other, n (n + 1) / 2 for a sequence of n tokens.
        logits: positions whose logits are computed.
        projected: tokens that the projector makes.
        patches: that the tower sees, of all images, those of [CLS] included.
        patch_pairs: of patches of the same item, n * n for an item of n patches.
    """

    tokens: float = 0
    pairs: float = 0
    logits: float = 0
    projected: float = 0
    patches: float = 0
    patch_pairs: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, number: float) -> Work:
        """Return the work of so many times as much."""
        return Work(*(getattr(self, field.name) * number for field in fields(self)))


@dataclass(frozen=True)
class Flops:
    """FLOP by part.

    Attributes:
        tower: forward.
        projector: forward and backward.
        llm: forward, and backward to its inputs.
        recomputed: what gradient checkpointing computes a second time.
        logits: output layer, forward and backward to its input.
        teacher: forward over all visual tokens, of runs whose objective compares with one.
    """

    tower: float = 0
    projector: float = 0
    llm: float = 0
    recomputed: float = 0
    logits: float = 0
    teacher: float = 0

    @property
    def model(self) -> float:
        """What the step needs: the numerator of MFU, without what is computed twice."""
        return self.tower + self.projector + self.llm + self.logits + self.teacher

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.model + self.recomputed

    def parts(self) -> dict[str, float]:
        """Return the parts by name; a teacher's where there is one."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.teacher:
            del found["teacher"]
        return found


def flops_of(shape: ModelShape, work: Work, checkpointing: bool = False, stop_tower: bool = True) -> Flops:
    """Return what some work costs.

    Args:
        shape: of the model, see :func:`prunetune.train.shape.shape_of`.
        work: of any number of samples.
        checkpointing: whether the LLM's activations are recomputed.
        stop_tower: whether vision layers behind the one that is read are left out.
    """
    language = shape.language
    # The projector trains: forward, to its weights, and to its inputs behind the first layer; counted as three times.
    return Flops(
        tower=_tower(shape.tower, work, stop_tower),
        projector=3 * 2 * shape.projector.linear * work.projected,
        llm=2 * 2 * language.linear * work.tokens + 3 * _attention(language, work),
        recomputed=_recomputed(language, work) if checkpointing else 0,
        logits=2 * 2 * language.head * work.logits,
    )


def forward_of(shape: ModelShape, work: Work) -> float:
    """Return the FLOP of the LLM's and its head's forward pass over some work."""
    language = shape.language
    return 2 * language.linear * work.tokens + _attention(language, work) + 2 * language.head * work.logits


def sequence(length: float) -> Work:
    """Return the LLM's work of one sequence that stands for itself, without its logits."""
    return Work(tokens=length, pairs=length * (length + 1) / 2)


def sequences(lengths: Iterable[float], shared: int = 0) -> Work:
    """Return the LLM's work of sequences that do not see each other, without its logits.

    Args:
        lengths: of each, the shared prefix left out.
        shared: tokens of a prefix whose keys and values are there, and which all of them see.
    """
    tokens = pairs = 0.0
    for length in lengths:
        tokens += length
        pairs += length * (length + 1) / 2 + length * shared
    return Work(tokens=tokens, pairs=pairs)


def layered(layers: Sequence[Iterable[float]]) -> Work:
    """Return the LLM's work of sequences that are shorter in later layers, without its logits.

    A layer's work is linear in tokens and pairs, so it is that of a mean layer.

    Args:
        layers: for each layer the length of every sequence.
    """
    total = Work()
    for lengths in layers:
        total += sequences(lengths)
    return total.times(1 / len(layers))


def image(patches: float, items: float = 1) -> Work:
    """Return the tower's work of one image of several items (crops, tiles), each of so many patches."""
    return Work(patches=patches * items, patch_pairs=patches * patches * items)


def per_token(shape: ModelShape, length: float, checkpointing: bool = False) -> float:
    """Return the FLOP of one token of the LLM, forward and backward to the inputs, in sequences of a length."""
    cost = flops_of(shape, sequence(length), checkpointing)
    return (cost.llm + cost.recomputed) / length


def _attention(language: LanguageShape, work: Work) -> float:
    """Return the forward FLOP of all layers' attention: scores and their weighted sum, 2 * width each a pair."""
    if work.tokens == 0:
        return 0
    seen = work.pairs / work.tokens  # on average
    total = 0.0
    for window in language.windows:
        total += 4 * language.query * work.tokens * (seen if window is None else min(seen, window))
    return total


def _recomputed(language: LanguageShape, work: Work) -> float:
    """Return what is computed again: the layers, each up to the last tensor that its backward pass needs.

    That lies before the layer's last linear layer, and the recomputation stops there.
    """
    return 2 * (language.linear - language.last_linear) * work.tokens + _attention(language, work)


def _tower(tower: TowerShape | None, work: Work, stop: bool) -> float:
    if tower is None:
        return 0
    layers = tower.needed if stop else tower.layers
    whole = tower.whole_of(layers)
    attention = whole * work.patch_pairs + (layers - whole) * work.patches * tower.window
    linear = layers * tower.linear + tower.embedding
    return 2 * linear * work.patches + 4 * tower.width * attention
