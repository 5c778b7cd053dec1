"""What a device has to hold, by part, before anything is loaded; and the largest token budget that fits.

The LLM is frozen, and that decides what its backward pass keeps: of a linear layer nothing but its weight, and so
neither its input nor its output. What stays of a token and layer are the float32 copies that both norms make, queries,
keys, values and the output of attention, and three times the width of the feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunetune.train.shape import LanguageShape, ModelShape

GIB = 1024**3
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = {"4bit": 0.516, "8bit": 1.0}
"""Bytes a weight of the LLM takes; NF4 with quantised constants has 0.127 bits of them a weight."""
FLOAT8 = 1.0
"""Bytes a weight of the LLM takes in float8; one layer's transposed copy, which the backward pass reads, passes by."""
RUNTIME = int(1.5 * GIB)
"""What CUDA, its libraries and NCCL take beside tensors."""
SPARE = 0.07
"""Share of a device's memory that stays free for fragments and what is not counted here."""
LOGITS_AT_ONCE = 1024
"""Positions whose logits are computed together where only supervised ones are."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that one device needs.

    Attributes:
        weights: of the model, projector included.
        training: of what trains: gradients, and DeepSpeed's float32 weights with Adam's two averages.
        per_token: activations that the backward pass of the LLM needs, of one token.
        per_token_checkpointed: the same with gradient checkpointing: what enters every layer.
        one_layer: activations of one layer for one token, which checkpointing makes again.
        per_token_passing: what passes by, of one token: buffers of the layer that is being computed.
        per_visual: activations of the projector, of one token that it makes.
        per_item: what the tower holds of one of its items (an image, crop or tile) while it runs.
        per_logit: of one position whose logits are computed.
        visual_share: projected tokens for each token of the LLM.
        item_share: tower items for each token of the LLM.
        logit_share: positions with logits for each token of the LLM.
        logits_at_once: most positions whose logits are computed together; None is all of them.
    """

    weights: int
    training: int
    per_token: int
    per_token_checkpointed: int
    one_layer: int
    per_token_passing: int
    per_visual: int
    per_item: int
    per_logit: int
    visual_share: float = 0.0
    item_share: float = 0.0
    logit_share: float = 1.0
    logits_at_once: int | None = LOGITS_AT_ONCE

    @property
    def fixed(self) -> int:
        """What is there whatever the batch is."""
        return self.weights + self.training + RUNTIME

    def parts(self, tokens: int, checkpointing: bool) -> dict[str, int]:
        """Return the bytes of every part at so many tokens in a micro-batch; they are added up, never reused."""
        logits = tokens * self.logit_share
        if self.logits_at_once is not None:
            logits = min(logits, self.logits_at_once)
        if checkpointing:
            activations = self.per_token_checkpointed + self.one_layer
        else:
            activations = self.per_token
        return {
            "weights": self.weights,
            "training": self.training,
            "LLM activations": tokens * (activations + self.per_token_passing),
            "projector activations": int(tokens * self.visual_share * self.per_visual),
            "tower": int(max(tokens * self.item_share, 1) * self.per_item) if self.item_share else 0,
            "logits": int(logits * self.per_logit),
            "runtime": RUNTIME,
        }

    def needed(self, tokens: int, checkpointing: bool) -> int:
        """Return the bytes of everything at so many tokens in a micro-batch."""
        return sum(self.parts(tokens, checkpointing).values())

    def fits(self, tokens: int, device_memory: int, checkpointing: bool) -> bool:
        """Return whether a micro-batch of so many tokens fits a device, with some memory to spare."""
        return self.needed(tokens, checkpointing) <= device_memory * (1 - SPARE)

    def largest_token_budget(self, device_memory: int, checkpointing: bool = False) -> int:
        """Return the most tokens that a micro-batch may have on a device of so many bytes; 0 if nothing fits."""
        if not self.fits(1, device_memory, checkpointing):
            return 0
        low, high = 1, 2
        while self.fits(high, device_memory, checkpointing):
            low, high = high, 2 * high
        while high - low > 1:  # low fits, high does not
            middle = (low + high) // 2
            if self.fits(middle, device_memory, checkpointing):
                low = middle
            else:
                high = middle
        return low

    def needs_checkpointing(self, token_budget: int, device_memory: int) -> bool:
        """Return whether a micro-batch of ``token_budget`` tokens fits ``device_memory`` bytes only by recomputing.

        Where it fits neither way the answer is True as well: that is the best there is.
        """
        return not self.fits(token_budget, device_memory, checkpointing=False)


def memory_needs(
    shape: ModelShape,
    dtype: str,
    *,
    quantization: str | None = None,
    float8: bool = False,
    stage: int = 1,
    ranks: int = 1,
    visual_share: float = 0.0,
    item_share: float = 0.0,
    patches: int = 0,
    logit_share: float = 1.0,
    supervised_logits: bool = True,
) -> MemoryNeeds:
    """Return what one of ``ranks`` devices needs.

    Args:
        shape: of the model, see :func:`prunetune.train.shape.shape_of`.
        dtype: of the model while it runs.
        quantization: of the LLM's linear layers, as ``model.quantization``.
        float8: whether they are computed in float8, as ``engine.float8``.
        stage: of ZeRO; 0 is none.
        ranks: devices that the states are spread over.
        visual_share: projected tokens for each token of the LLM, all of the tower's where not only kept ones are.
        item_share: tower items for each token of the LLM.
        patches: of one item.
        logit_share: positions with logits for each token of the LLM.
        supervised_logits: whether they are computed in pieces, as ``engine.supervised_logits``.
    """
    size = SIZES[dtype]
    language, projector = shape.language, shape.projector
    if float8:
        linear = FLOAT8
    elif quantization is not None:
        linear = QUANTISED[quantization]
    else:
        linear = size
    weights = int(language.linear * linear + (shape.parameters - language.linear) * size)
    if stage == 3:
        weights //= ranks
    weights += projector.parameters * size  # PEFT keeps the original beside the one that trains
    gradients = projector.parameters * 4  # DeepSpeed adds them up in float32
    states = projector.parameters * (4 + 8)
    training = gradients // (ranks if stage >= 2 else 1) + states // (ranks if stage >= 1 else 1)
    per_layer = layer_activations(language, size)
    tower = shape.tower
    per_item = 0
    if tower is not None:
        # All layers' outputs are handed back, and pruners read signals of some; one layer's parts pass by.
        per_item = patches * size * (tower.width * (tower.layers + 8) + 2 * tower.feed_forward)
    return MemoryNeeds(
        weights=weights,
        training=training,
        per_token=per_layer * language.layers,
        per_token_checkpointed=language.hidden * size * language.layers,
        one_layer=per_layer,
        # Embeddings, the residual stream, gradients of it and of the feed-forward part, and the final norm.
        per_token_passing=size * (6 * language.hidden + 3 * language.feed_forward) + 4 * language.hidden,
        per_visual=projector.width * size,
        per_item=per_item,
        # Logits, their float32 copy, its log-softmax, and the gradient in the model's dtype.
        per_logit=language.vocabulary * (2 * size + 4 + 4),
        visual_share=visual_share,
        item_share=item_share,
        logit_share=logit_share,
        logits_at_once=LOGITS_AT_ONCE if supervised_logits else None,
    )


def layer_activations(language: LanguageShape, size: int) -> int:
    """Return the bytes that one frozen layer of the LLM saves of a token for the backward pass to its inputs.

    Args:
        language: the LLM.
        size: bytes of a number in the model's dtype.
    """
    norms = 4 * language.norms  # what a norm normalises is in float32
    attention = size * (2 * language.query + 2 * language.key) + 4 * language.heads  # queries, output, keys, values
    feed_forward = size * language.feed_forward * (3 if language.gated else 1)
    return norms + attention + feed_forward
