"""What is read of a run of the LLM, and where: at supervised positions, and at text that stands behind the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prunetune.configs import ConfigError
from prunetune.pruning import PrunedModel
from prunetune.pruning.errors import PruningError
from prunetune.pruning.hooks import record_output
from prunetune.pruning.rewrite import Pruned
from prunetune.train.engine.head import Scores, wide
from prunetune.train.engine.tower import stopped


@dataclass(frozen=True)
class Reads:
    """What is read.

    Attributes:
        answers: logits at supervised positions.
        text: logits at text positions.
        hidden: hidden states at text positions, after the LLM's final norm.
        layer: the LLM layer behind which they are read, from 1; None is the last one.
        features: the mean of the visual tokens of each row with images.
    """

    answers: bool = True
    text: bool = False
    hidden: bool = False
    layer: int | None = None
    features: bool = False

    @property
    def at_text(self) -> bool:
        """Whether anything is read at text positions."""
        return self.text or self.hidden

    @property
    def layers(self) -> int | None:
        """How many of the LLM's layers have to run; None is all."""
        if self.answers or self.text:
            return None
        return self.layer if self.hidden else 0


@dataclass(frozen=True)
class Reading:
    """What was read of one batch; positions in reading order, row after row, however the batch was laid out.

    Attributes:
        targets: (n,) supervised tokens.
        answers: what scores the words at the n positions before them; None where it is not read, as below.
        text: the same at the t text positions behind an image.
        hidden: (t, D) hidden states there.
        features: (r, D) in float32, the mean of the visual tokens of each row that has images; 0 where none stays.
    """

    targets: Int[Tensor, " n"]
    answers: Scores | None = None
    text: Scores | None = None
    hidden: Float[Tensor, "t D"] | None = None
    features: Float[Tensor, "r width"] | None = None


def text_behind_images(ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], visual: Sequence[int]) -> Bool[Tensor, "B L"]:
    """Return which positions hold text that stands behind its row's first visual token.

    They depend on nothing but the text, so that they are the same of every pruner. With the placeholder 9 and no
    padding, the rows ``[1, 9, 9, 5]`` and ``[1, 5, 6, 7]`` have the last position of the first row.

    Args:
        ids: before pruning.
        mask: 0 for padding.
        visual: the placeholders' ids.
    """
    is_visual = torch.zeros_like(ids, dtype=torch.bool)
    for token in visual:
        is_visual |= ids == token
    return (is_visual.long().cumsum(dim=1) > 0) & ~is_visual & mask.bool()


def after_pruning(where: Bool[Tensor, "B L"], pruned: Pruned, mask: Tensor) -> Bool[Tensor, "B L2"]:
    """Return where positions that pruning leaves in place stand in the shortened, right-padded rows.

    Args:
        where: in the full rows; no visual token among them.
        pruned: the rewritten batch.
        mask: (B, L) of the full rows, 0 for padding.
    """
    if bool(pruned.keep.all()):
        return where
    new = (pruned.keep & mask.bool()).long().cumsum(dim=1) - 1
    row, column = where.nonzero(as_tuple=True)
    found = torch.zeros_like(pruned.inputs["input_ids"], dtype=torch.bool)
    found[row, new[row, column]] = True
    return found


def row_means(pruned: Pruned, width: int) -> Float[Tensor, "r width"]:
    """Return the mean of what reaches the LLM of the images of each row, row ends included, in float32.

    Rows without images are left out. Of a batch without any there is no row, and in training still a graph.

    Args:
        pruned: the rewritten batch.
        width: D of the LLM.
    """
    encoded = pruned.inputs.get("mm_encoder_outputs") or {}
    if not encoded:
        return torch.zeros(0, width, device=pruned.keep.device)
    sums: Any = 0.0
    numbers = torch.zeros(len(pruned.keep), device=pruned.keep.device)
    for modality, output in encoded.items():
        features = output.pooler_output
        if not isinstance(features, Tensor):
            features = torch.cat([own.flatten(0, -2) for own in features])
        features = wide(features.flatten(0, -2))
        counts = torch.tensor(pruned.kept.get(modality, []), dtype=torch.long, device=features.device)
        rows = torch.tensor(pruned.rows.get(modality, []), dtype=torch.long, device=features.device)
        owners = rows.repeat_interleave(counts)
        empty = features.new_zeros(len(numbers), features.shape[-1])
        sums = sums + empty.index_add(0, owners, features)
        numbers = numbers.index_add(0, rows, counts.to(numbers.dtype))
    there = sorted({row for rows in pruned.rows.values() for row in rows})
    means: Tensor = sums / numbers.clamp(min=1)[:, None]
    return means[torch.tensor(there, dtype=torch.long, device=means.device)]


class States:
    """Reads the LLM's hidden states, behind the last layer or another, and leaves out the layers that nobody reads.

    Args:
        pruned: the pruner on the model.
        reads: what is read.

    Raises:
        ConfigError: for a layer that the LLM has not.
        PruningError: for an LLM whose layers or norm are not where they are looked for.
    """

    def __init__(self, pruned: PrunedModel, reads: Reads) -> None:
        self.llm: Any = pruned.family.llm(pruned.model)
        self.reads = reads
        self._seen: list[Any] = []
        layers = getattr(self.llm, "layers", None)
        self.layers: list[nn.Module] = list(layers) if isinstance(layers, nn.ModuleList) else []
        if pruned.stages is not None and reads.hidden and self._between:
            raise PruningError(
                f"objective.hidden_layer {reads.layer}: pruning.stages cut the states between layers; leave "
                "hidden_layer out, and hidden compares behind the last"
            )
        if reads.hidden and reads.layer is not None:
            self._check(pruned.family.name, reads.layer)

    @property
    def left_out(self) -> list[nn.Module]:
        """The layers that do not run."""
        needed = self.reads.layers
        return [] if needed is None else self.layers[needed:]

    @property
    def share(self) -> float:
        """How much of the LLM runs."""
        return 1 - len(self.left_out) / len(self.layers) if self.layers else 1.0

    @property
    def _between(self) -> bool:
        """Whether the states are read between layers that all run, without the final norm."""
        return self.reads.layer is not None and self.reads.layers is None and self.reads.layer < len(self.layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, what is not read does not run, and states are kept as the model runs."""
        with stopped(self.left_out):
            if not self.reads.hidden:
                yield
                return
            read = self.llm
            if self._between:
                assert self.reads.layer is not None
                read = self.layers[self.reads.layer - 1]
            with record_output(read) as self._seen:
                yield
            self._seen = []

    def forget(self) -> None:
        """Forget what was kept, of recomputed layers as well; called before a batch runs."""
        self._seen.clear()

    def at(self, positions: tuple[Tensor, Tensor]) -> Float[Tensor, "t D"]:
        """Return the states at some rows and columns of the batch that ran last, after the final norm."""
        output = self._seen[-1]  # the first may be of a shared prefix
        if self._between:
            states: Tensor = self.llm.norm(output[positions])
            return states
        return output.last_hidden_state[positions]

    def _check(self, family: str, layer: int) -> None:
        """Check on a few tokens that a layer's output with the final norm is what the LLM gives that ends with it."""
        if self.layers and layer > len(self.layers):
            raise ConfigError(
                f"objective.hidden_layer {layer}: the LLM has {len(self.layers)} layers; choose one from 1 to "
                f"{len(self.layers)}, or leave it out for the last"
            )
        if not self.layers or not isinstance(getattr(self.llm, "norm", None), nn.Module) or not self._is_plain(layer):
            raise PruningError(
                f"objective.hidden_layer {layer}: family {family!r} has an LLM whose layers are not read one by one; "
                "leave hidden_layer out, and hidden compares behind the last"
            )

    def _is_plain(self, layer: int) -> bool:
        ids = torch.arange(3, 7, device=self.llm.device)[None]
        was_training = self.llm.training
        self.llm.eval()
        try:
            with torch.no_grad():
                with record_output(self.layers[layer - 1]) as seen:
                    self.llm(input_ids=ids, use_cache=False)
                with stopped(self.layers[layer:]):
                    ended = self.llm(input_ids=ids, use_cache=False).last_hidden_state
                return isinstance(seen[0], Tensor) and torch.equal(self.llm.norm(seen[0]), ended)
        finally:
            self.llm.train(was_training)
