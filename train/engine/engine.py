"""The engine: from a batch to the summed loss of its supervised tokens, by the savings that are switched on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunetune.configs.schema import EngineConfig
from prunetune.data_recipes.formatting import supervised
from prunetune.pruning import PrunedModel
from prunetune.pruning.errors import PruningError
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.sequence import IGNORE_INDEX, counted
from prunetune.train.engine.head import FrozenHeadLoss, hidden_instead_of_logits, plain_head, summed_loss
from prunetune.train.engine.prefix import SHORTEST, begins_with, prefix_states
from prunetune.train.engine.segments import Prefix, Segments, attending_by_segments, leak_between, place
from prunetune.train.engine.tower import stopped, unread_layers
from prunetune.train.flops import Work, sequences
from prunetune.train.measured import RunNumbers


@dataclass(frozen=True)
class Choice:
    """What of the switches is done for a model, and why not where not.

    Attributes:
        packing: samples stand behind one another.
        supervised_logits: logits exist at supervised positions only.
        project_kept: the projector sees kept tokens only.
        reasons: by switch, why it is off where it was asked for or left to us.
    """

    packing: bool
    supervised_logits: bool
    project_kept: bool
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Rows:
    """What the model was called with, for the loss and for the numbers of a step.

    Attributes:
        targets: (n,) supervised tokens in reading order.
        positions: row and column of their logits among those that the model returns.
        tokens: tokens that went through the LLM, padding included.
        kept: visual tokens of each image that did.
        work: what they ask of the LLM and the projector.
    """

    targets: Int[Tensor, " n"]
    positions: tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
    tokens: int
    kept: list[int]
    work: Work


class Engine:
    """Runs a pruned model on training batches.

    The plain path, with every switch off, is the stock model on the pruned, padded batch; each switch leaves loss and
    gradient as they are but for rounding. Evaluation knows nothing of it.

    Args:
        pruned: the pruner on the model.
        config: the switches.
        prefix: what the run's prompts begin with, (P,) ids; nothing or too little of it is not shared.

    Attributes:
        choice: what of the switches is on.
        rows: of the last batch.
        numbers: gets what every batch took and held; None counts nothing.

    Raises:
        PruningError: for packing that a family can't have.
    """

    def __init__(self, pruned: PrunedModel, config: EngineConfig, prefix: Int[Tensor, " P"] | None = None) -> None:
        self.pruned = pruned
        self.config = config
        self.choice = choose_switches(pruned, config)
        shares = self.choice.packing and config.shared_prefix and prefix is not None and len(prefix) >= SHORTEST
        self.prefix_ids = prefix if shares else None
        self.rows: Rows | None = None
        self.numbers: RunNumbers | None = None
        self._choosing: AbstractContextManager[None] = nullcontext()
        self._prefix: Prefix | None = None
        self._head: nn.Linear | None = None

    @property
    def shared(self) -> int:
        """Tokens of the shared prefix, which no sample runs through the LLM."""
        return 0 if self.prefix_ids is None else len(self.prefix_ids)

    @property
    def language_model(self) -> Any:
        """The LLM."""
        return self.pruned.family.llm(self.pruned.model)

    def lines(self) -> list[str]:
        """Return what is switched on and what is not, for people."""
        on = [name for name in ("packing", "supervised_logits", "project_kept") if getattr(self.choice, name)]
        if self.shared:
            on.append(f"shared prefix of {self.shared} tokens")
        lines = [f"engine    {', '.join(on) or 'plain'}"]
        for name, reason in self.choice.reasons.items():
            lines.append(f"          no {name}: {reason}")
        return lines

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the model prunes by itself, and :meth:`summed_loss` runs it."""
        with ExitStack() as undo:
            if self.config.stop_tower:
                undo.enter_context(stopped(unread_layers(self.pruned)))
            if self.choice.packing:
                undo.enter_context(attending_by_segments(self.language_model))
            # Before the pruner's own hook, which ends with a call of _finish.
            undo.callback(self.pruned.model.register_forward_pre_hook(lambda *_: self._begin_choosing()).remove)
            undo.enter_context(self.pruned.attach(finish=self._finish, project_kept=self.choice.project_kept))
            yield
        self._prefix = None

    @contextmanager
    def own_head(self, head: nn.Linear | None) -> Iterator[None]:
        """While open, the loss is made of hidden states and this head; None leaves logits to the model.

        Args:
            head: of :func:`~prunetune.train.engine.head.plain_head`, found before DeepSpeed or a hook was there.
        """
        if head is None or not self.choice.supervised_logits:
            yield
            return
        self._head = head
        try:
            with hidden_instead_of_logits(head):
                yield
        finally:
            self._head = None

    def summed_loss(self, model: nn.Module, inputs: Mapping[str, Any], tower: Work | None = None) -> Float[Tensor, ""]:
        """Return the cross entropy of a batch, summed over its supervised tokens, in float32.

        Args:
            model: what to call: the model itself, or what a trainer wrapped around it.
            inputs: a batch of the formatter, with labels.
            tower: what its images ask of the tower, for the numbers.
        """
        with self._phase("forward"):
            output = model(**inputs)
            assert self.rows is not None  # set as the model is called
            targets = self.rows.targets
            wanted = output.logits[self.rows.positions]  # (n, V), or (n, D) of hidden states
            if self._head is None or not len(targets):
                loss = summed_loss(wanted, targets)
            else:
                loss = FrozenHeadLoss.apply(wanted, self._head.weight, self._head.bias, targets)
        if self.numbers is not None and len(targets):  # what does not count is run for nothing
            work = self.rows.work + (tower or Work())
            self.numbers.add(len(inputs["input_ids"]), self.rows.tokens, len(targets), work, self.rows.kept)
        return loss

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.numbers is None else self.numbers.phase(name)

    def _begin_choosing(self) -> None:
        """Begin to time tower and pruner, which run within the model's call."""
        self._choosing = self._phase("selection")
        self._choosing.__enter__()

    def _finish(self, pruned: Pruned) -> dict[str, Any]:
        """Return what the model is called with, and keep what its loss is made of."""
        inputs = dict(pruned.inputs)
        labels = inputs.pop("labels")
        kept = [count for counts in pruned.kept.values() for count in counts]
        if self.choice.packing:
            inputs, targets, positions, work = self._packed(inputs, labels)
        else:
            inputs, targets, positions = self._padded(inputs, labels)
            rows, columns = inputs["input_ids"].shape
            work = sequences([columns] * rows)
        work += Work(logits=len(targets), projected=sum(kept))
        self.rows = Rows(targets, positions, inputs["input_ids"].numel(), kept, work)
        inputs["use_cache"] = False
        self._choosing.__exit__(None, None, None)
        return inputs

    def _padded(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor, tuple[Tensor, Tensor]]:
        wanted = supervised(labels)  # (B, L - 1): the logits of a token are made of those before it
        if self.pruned.family.aligned:
            inputs["labels"] = labels  # the model reads from them that it trains
        targets = labels[:, 1:][wanted]
        if self.choice.supervised_logits:
            columns = wanted.any(dim=0).nonzero()[:, 0]  # (c,), where any row has a target
            inputs["logits_to_keep"] = columns
            wanted = wanted[:, columns]
        row, column = wanted.nonzero(as_tuple=True)
        return inputs, targets, (row, column)

    def _packed(
        self, inputs: dict[str, Any], labels: Tensor
    ) -> tuple[dict[str, Any], Tensor, tuple[Tensor, Tensor], Work]:
        """Put the rows behind one another, each without the shared prefix."""
        mask = inputs.pop("attention_mask").bool()  # (B, L)
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        if positions is None:
            positions = counted(mask)
        prefix = self._shared_prefix(ids, labels)
        shift = 0 if prefix is None else len(prefix)
        own = mask.clone()
        own[:, :shift] = False
        # The last token of a sample predicts nothing: its target would be another sample's first.
        following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE_INDEX)], dim=1)
        following = following[own]  # (T,)
        where = (following != IGNORE_INDEX).nonzero()[:, 0]  # (n,)
        segments = Segments(tuple(own.sum(dim=1).tolist()), prefix, ids.device)
        place(segments)
        inputs["input_ids"] = ids[own][None]
        inputs["position_ids"] = positions[:, own][:, None] if positions.ndim == 3 else positions[own][None]
        targets = following[where]
        if self.choice.supervised_logits:
            inputs["logits_to_keep"] = where
            where = torch.arange(len(where), device=where.device)
        work = sequences(segments.lengths, segments.shift)
        return inputs, targets, (torch.zeros_like(where), where), work

    def _shared_prefix(self, ids: Tensor, labels: Tensor) -> Prefix | None:
        """Return the run's prefix where every row begins with it, which is computed when it is first met."""
        if self.prefix_ids is None:
            return None
        if self._prefix is None:  # with the first batch, whatever that is: under ZeRO-3 all ranks run the LLM in step
            self._prefix = prefix_states(self.language_model, self.prefix_ids)
        return self._prefix if begins_with(ids, labels, self.prefix_ids) else None


def choose_switches(pruned: PrunedModel, config: EngineConfig) -> Choice:
    """Return which switches are on for a model.

    Raises:
        PruningError: for packing that was asked for and that the family can't have.
    """
    reasons: dict[str, str] = {}
    family = pruned.family
    packing = config.packing is not False
    if packing and (leak := _leak(pruned)):
        if config.packing is True:
            raise PruningError(f"samples of family {family.name!r} can't be packed: {leak}; leave engine.packing off")
        packing, reasons["packing"] = False, leak
    logits = config.supervised_logits
    if logits and family.aligned:
        logits = False
        reasons["supervised_logits"] = f"family {family.name!r} reads the labels beside all logits"
    kept = config.project_kept and pruned.can_project_kept()
    if config.project_kept and not kept:
        reasons["project_kept"] = f"{pruned.spec.pruner} chooses by the projector's output, or {family.name!r} pools it"
    return Choice(packing, logits, kept, reasons)


def _leak(pruned: PrunedModel) -> str | None:
    """Return how samples in one row would see each other in a model; None if they do not."""
    family = pruned.family
    if family.aligned:
        return f"by {', '.join(family.aligned)} tokens of family {family.name!r} would see those of another sample"
    return leak_between(family.llm(pruned.model))


def head_of(pruned: PrunedModel, config: EngineConfig, partitioned: bool) -> nn.Linear | None:
    """Return the head whose loss is made a piece at a time; None where the model makes its logits itself.

    It does where they are more than the head's output, in float16, whose loss is scaled before it is rounded, and where
    ZeRO-3 holds the head in pieces.

    Args:
        pruned: the pruner on the model, before DeepSpeed has it.
        config: the switches.
        partitioned: whether ZeRO-3 will hold the weights in pieces.
    """
    if not config.supervised_logits or pruned.family.aligned or pruned.model.dtype == torch.float16 or partitioned:
        return None
    return plain_head(pruned.model)
