"""CrisPrune: a determinantal point process whose quality joins visual saliency and relevance to the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prunetune.pruning.errors import PruningError
from prunetune.pruning.fitting import Choice
from prunetune.pruning.ops.greedy import pick_determinantal
from prunetune.pruning.ops.indexing import ascending
from prunetune.pruning.ops.relevance import instruction_relevance
from prunetune.pruning.ops.similarity import cosine_similarity
from prunetune.pruning.options import check_choice, check_share
from prunetune.pruning.registry import register_pruner
from prunetune.pruning.types import Selection, VisualTokens

GENERAL_PROMPTS = (
    "All objects in the image",
    "Salient regions in the image",
    "Visible text and numbers in the image",
)


@register_pruner(
    "crisprune",
    paper="CrisPrune, equations 2-8",
    exact=False,
    fits=[Choice("relevance_sign", counts=lambda pruner: pruner.alpha > 0, values=(-1, 1))],
)
@dataclass(frozen=True)
class CrisPrune:
    """Greedy MAP of ``diag(q) S diag(q)`` with ``q = alpha s_sem + (1 - alpha) s_vis`` (equations 6-7).

    s_vis is the attention, min-max scaled with its 0.98 quantile as upper bound (equation 2). s_sem is the larger of
    the relevance to the instruction and ``decay`` times that to the best general prompt, each min-max scaled per item
    (equations 3-5, algorithm 1). S is the cosine of visual features.

    A reconstruction: no code was published. Section 3.4 compares projected features h, algorithm 1 the X that it
    compares with the text, which for paired encoders is CLIP's space: ``similarity`` chooses. Whether CLIP similarities
    are negated, as in its sibling CDPruner, is not said; ``relevance_sign`` takes them as written.

    Attributes:
        alpha: weight of the text; 0 is saliency alone, 1 the paper's TextPrune.
        decay: lambda, weight of the general prompts; 0 leaves them out.
        quantile: tau, upper bound of the saliency; 1 is the plain min-max scaling.
        eps: added to the denominators.
        saliency: "cls" attention, or "received" for towers without [CLS].
        text: "clip" for paired encoders, "llm" to compare projected tokens with mean LLM token embeddings.
        relevance_sign: 1 as the paper writes it, -1 as CDPruner's code does.
        similarity: what S compares: "projected" (section 3.4), "aligned", the features that are compared with the text
            (algorithm 1: in CLIP's space, or projected with ``text: llm``), or "features" before the projector.
        general_prompts: T_gen.
    """

    alpha: float = 0.5
    decay: float = 0.5
    quantile: float = 0.98
    eps: float = 1e-6
    saliency: str = "cls"
    text: str = "clip"
    relevance_sign: int = 1
    similarity: str = "projected"
    general_prompts: tuple[str, ...] | list[str] = GENERAL_PROMPTS

    def __post_init__(self) -> None:
        """Check the options."""
        check_share("alpha", self.alpha)
        check_share("decay", self.decay)
        check_share("quantile", self.quantile)
        check_choice("relevance_sign", self.relevance_sign, (1, -1))
        check_choice("saliency", self.saliency, ("cls", "received"))
        check_choice("text", self.text, ("clip", "llm"))
        check_choice("similarity", self.similarity, ("projected", "aligned", "features"))
        if not self.general_prompts:
            raise PruningError("general_prompts is empty; set decay to 0 to leave them out")

    @property
    def needs(self) -> frozenset[str]:
        """Attention, and the text in the space that ``text`` names; what has weight 0 is not read."""
        needs: set[str] = set()
        if self.alpha < 1:
            needs.add(f"{self.saliency}_attention")
        if self._compared == "image_embeds":
            needs.add("image_embeds")
        # Text is only read where it counts: alpha 0 runs without a text tower.
        if self.alpha > 0 and self.text == "clip":
            needs |= {"image_embeds", "text_embeds"}
            if self.decay > 0:
                needs.add("general_embeds")
        elif self.alpha > 0:
            needs.add("text_token_embeds")
            if self.decay > 0:
                needs.add("general_token_embeds")
        return frozenset(needs)

    @property
    def _compared(self) -> str:
        """The features or signal whose cosines are S."""
        if self.similarity != "aligned":
            return self.similarity
        return "image_embeds" if self.text == "clip" else "projected"

    def __call__(self, tokens: VisualTokens, keep: int) -> Selection:
        """Return K positions (B, K): salient or relevant, and diverse."""
        # A side of weight 0 is left out and not multiplied: its signals were not computed.
        quality = tokens.features.new_zeros(tokens.features.shape[:2], dtype=torch.float32)
        if self.alpha > 0:
            quality = quality + self.alpha * self._semantic(tokens)
        if self.alpha < 1:
            quality = quality + (1 - self.alpha) * self._visual(tokens)
        similarity = cosine_similarity(tokens.finite(self._compared))  # (B, N, N)
        picks = pick_determinantal(similarity, quality, keep)
        return Selection(ascending(picks))

    def _visual(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Return s_vis (B, N), equation 2."""
        attention = tokens.finite(f"{self.saliency}_attention").mean(dim=1)  # (B, N)
        # The quantile as upper bound keeps a few sinks from pressing all other tokens against 0.
        low = attention.amin(dim=1, keepdim=True)
        high = attention.quantile(self.quantile, dim=1, keepdim=True)
        return (torch.minimum(attention, high) - low) / (high - low + self.eps)

    def _semantic(self, tokens: VisualTokens) -> Float[Tensor, "B N"]:
        """Return s_sem (B, N), equations 3-5."""
        relevance = instruction_relevance(tokens, self.text)
        instruction = self._scaled(self.relevance_sign * relevance)
        if self.decay == 0:
            return instruction
        if self.text == "clip":
            visual, prompts = tokens.finite("image_embeds"), tokens.finite("general_embeds")
        else:
            visual, prompts = tokens.finite("projected"), tokens.finite("general_token_embeds")
        similarity = cosine_similarity(visual, prompts)  # (B, N, P)
        general = (self.relevance_sign * similarity).amax(dim=-1)  # (B, N), of the best prompt
        return torch.maximum(instruction, self.decay * self._scaled(general))

    def _scaled(self, values: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
        return (values - low) / (high - low + self.eps)
