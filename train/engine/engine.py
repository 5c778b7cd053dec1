"""The engine: from a batch to what its loss is made of, by the savings that are switched on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prunetune.configs.schema import EngineConfig
from prunetune.data_recipes.formatting import supervised
from prunetune.pruning import PrunedModel
from prunetune.pruning.errors import PruningError
from prunetune.pruning.rewrite import Pruned
from prunetune.pruning.sequence import IGNORE_INDEX, counted
from prunetune.pruning.stages.plan import Plan
from prunetune.train.engine.head import Scores, hidden_instead_of_logits, plain_head
from prunetune.train.engine.prefix import SHORTEST, begins_with, prefix_states
from prunetune.train.engine.reading import Reading, Reads, States, after_pruning, row_means, text_behind_images
from prunetune.train.engine.segments import Prefix, Segments, attending_by_segments, leak_between, place
from prunetune.train.engine.tower import stopped, unread_layers
from prunetune.train.flops import Work, layered, sequences
from prunetune.train.measured import RunNumbers

Places = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]
"""Rows and columns."""


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
        text: row and column of the text positions among the LLM's hidden states; None where nothing is read there.
        text_logits: the same among the logits; None where none are read there.
        features: of :func:`~prunetune.train.engine.reading.row_means`; None where they are not read.
    """

    targets: Int[Tensor, " n"]
    positions: Places
    tokens: int
    kept: list[int]
    work: Work
    text: Places | None = None
    text_logits: Places | None = None
    features: Float[Tensor, "r width"] | None = None


@dataclass(frozen=True)
class _Laid:
    """How a pruned batch was laid out; the fields are those of :class:`Rows`."""

    inputs: dict[str, Any]
    targets: Tensor
    positions: Places
    text: Places | None
    text_logits: Places | None
    work: Work


class Engine:
    """Runs a pruned model on training batches.

    The plain path, with every switch off, is the stock model on the pruned, padded batch; each switch leaves loss and
    gradient as they are but for rounding. Evaluation knows nothing of it.

    Args:
        pruned: the pruner on the model.
        config: the switches.
        prefix: what the run's prompts begin with, (P,) ids; nothing or too little of it is not shared.
        reads: what the loss is made of; logits at supervised positions by default.

    Attributes:
        choice: what of the switches is on.
        rows: of the last batch.
        numbers: gets what every batch took and held; None counts nothing.

    Raises:
        PruningError: for packing that a family can't have, or hidden states of a layer that are not read.
        ConfigError: for a layer that the LLM has not.
    """

    def __init__(
        self,
        pruned: PrunedModel,
        config: EngineConfig,
        prefix: Int[Tensor, " P"] | None = None,
        reads: Reads | None = None,
    ) -> None:
        self.pruned = pruned
        self.config = config
        self.reads = Reads() if reads is None else reads
        self.states = States(pruned, self.reads)
        self.visual = pruned.family.token_ids(pruned.model)
        self.choice = choose_switches(pruned, config)
        shares = self.choice.packing and config.shared_prefix and prefix is not None and len(prefix) >= SHORTEST
        self.prefix_ids = prefix if shares else None
        self.rows: Rows | None = None
        self.numbers: RunNumbers | None = None
        self._choosing: AbstractContextManager[None] = nullcontext()
        self._prefix: Prefix | None = None
        self._head: nn.Linear | None = None
        self._full: tuple[Tensor, Tensor] | None = None  # text positions of the batch before pruning, and its mask

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
        if left_out := len(self.states.left_out):
            lines.append(f"          no LLM layers behind {len(self.states.layers) - left_out}, nothing reads them")
        for name, reason in self.choice.reasons.items():
            lines.append(f"          no {name}: {reason}")
        return lines

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the model prunes by itself, and :meth:`read` runs it."""
        with ExitStack() as undo:
            if self.config.stop_tower:
                undo.enter_context(stopped(unread_layers(self.pruned)))
            undo.enter_context(self.states.attached())
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
        read = self.read(model, inputs, tower)
        assert read.answers is not None, "the engine reads no logits of answers"
        with self.phase("forward"):
            return read.answers.cross_entropy(read.targets)

    def read(
        self, model: nn.Module, inputs: Mapping[str, Any], tower: Work | None = None, counts: bool = True
    ) -> Reading:
        """Run a batch, and return what its loss is made of.

        Args:
            model: what to call: the model itself, or what a trainer wrapped around it.
            inputs: a batch of the formatter, with labels.
            tower: what its images ask of the tower, for the numbers.
            counts: whether its samples are trained on, for the numbers.
        """
        with self.phase("forward"), self._noting() as plans:
            if self.reads.at_text:
                mask = inputs["attention_mask"]
                self._full = text_behind_images(inputs["input_ids"], mask, self.visual), mask
            self.states.forget()
            output = model(**inputs)
            rows = self.rows
            assert rows is not None  # set as the model is called
            reading = Reading(
                rows.targets,
                Scores(output.logits[rows.positions], self._head) if self.reads.answers else None,
                Scores(output.logits[rows.text_logits], self._head) if rows.text_logits is not None else None,
                self.states.at(rows.text) if self.reads.hidden and rows.text is not None else None,
                rows.features,
            )
            self.states.forget()
        # What does not count is run for nothing.
        if self.numbers is not None and counts and (len(rows.targets) or not self.reads.answers):
            work = rows.work + (tower or Work())
            inside = [counts.layers for plan in plans for counts in plan.counts if counts.entering]
            if plans:
                work += layered(_lengths(plans[0])).times(self.states.share)
            self.numbers.add(len(inputs["input_ids"]), rows.tokens, len(rows.targets), work, rows.kept, inside)
        return reading

    @contextmanager
    def _noting(self) -> Iterator[list[Plan]]:
        """While open, collect what stages inside the LLM decide, if there are any."""
        if self.pruned.stages is None:
            yield []
            return
        with self.pruned.stages.noted() as plans:
            yield plans

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time what runs within, where anything is timed."""
        return nullcontext() if self.numbers is None else self.numbers.phase(name)

    def _begin_choosing(self) -> None:
        """Begin to time tower and pruner, which run within the model's call."""
        self._choosing = self.phase("selection")
        self._choosing.__enter__()

    def _finish(self, pruned: Pruned) -> dict[str, Any]:
        """Return what the model is called with, and keep what its loss is made of."""
        inputs = dict(pruned.inputs)
        labels = inputs.pop("labels")
        kept = [count for counts in pruned.kept.values() for count in counts]
        text = None if self._full is None else after_pruning(self._full[0], pruned, self._full[1])
        laid = self._packed(inputs, labels, text) if self.choice.packing else self._padded(inputs, labels, text)
        work = Work(logits=len(laid.targets), projected=sum(kept))
        if self.pruned.stages is None:  # with stages it is known when the model has run
            work += laid.work.times(self.states.share)
        embeddings: Any = self.pruned.model.get_input_embeddings()
        features = row_means(pruned, embeddings.embedding_dim) if self.reads.features else None
        tokens = laid.inputs["input_ids"].numel()
        self.rows = Rows(laid.targets, laid.positions, tokens, kept, work, laid.text, laid.text_logits, features)
        laid.inputs["use_cache"] = False
        self._choosing.__exit__(None, None, None)
        return laid.inputs

    def _padded(self, inputs: dict[str, Any], labels: Tensor, text: Tensor | None) -> _Laid:
        wanted = supervised(labels)  # (B, L - 1): the logits of a token are made of those before it
        if self.pruned.family.aligned:
            inputs["labels"] = labels  # the model reads from them that it trains
        targets = labels[:, 1:][wanted]
        positions = _places(wanted)
        at_text = None if text is None else _places(text)
        text_logits = at_text if self.reads.text else None
        if self.choice.supervised_logits:
            read = torch.zeros_like(labels, dtype=torch.bool)
            if self.reads.answers:
                read[:, :-1] |= wanted
            if text is not None and self.reads.text:
                read |= text
            columns = read.any(dim=0).nonzero()[:, 0]  # (c,), where any row is read
            inputs["logits_to_keep"] = columns
            place_of = torch.zeros_like(labels[0]).index_copy(0, columns, torch.arange(len(columns)).to(columns))
            positions = positions[0], place_of[positions[1]]
            if text_logits is not None:
                text_logits = text_logits[0], place_of[text_logits[1]]
        rows, columns_of_all = inputs["input_ids"].shape
        return _Laid(inputs, targets, positions, at_text, text_logits, sequences([columns_of_all] * rows))

    def _packed(self, inputs: dict[str, Any], labels: Tensor, text: Tensor | None) -> _Laid:
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
        at_text = None if text is None else text[own].nonzero()[:, 0]  # (t,); no prefix reaches up to an image
        segments = Segments(tuple(own.sum(dim=1).tolist()), prefix, ids.device)
        place(segments)
        inputs["input_ids"] = ids[own][None]
        inputs["position_ids"] = positions[:, own][:, None] if positions.ndim == 3 else positions[own][None]
        targets = following[where]
        text_logits = at_text if self.reads.text else None
        if self.choice.supervised_logits:
            answers = where if self.reads.answers else where[:0]
            inputs["logits_to_keep"] = answers if text_logits is None else torch.cat([answers, text_logits])
            where = torch.arange(len(where), device=where.device)
            if text_logits is not None:
                text_logits = torch.arange(len(text_logits), device=where.device) + len(answers)
        work = sequences(segments.lengths, segments.shift)
        return _Laid(inputs, targets, _in_row(where), _in_row(at_text), _in_row(text_logits), work)

    def _shared_prefix(self, ids: Tensor, labels: Tensor) -> Prefix | None:
        """Return the run's prefix where every row begins with it, which is computed when it is first met."""
        if self.prefix_ids is None:
            return None
        if self._prefix is None:  # with the first batch, whatever that is: under ZeRO-3 all ranks run the LLM in step
            self._prefix = prefix_states(self.language_model, self.prefix_ids)
        return self._prefix if begins_with(ids, labels, self.prefix_ids) else None


def _lengths(plan: Plan) -> list[list[int]]:
    """Return for each layer how many tokens every row of a batch has there, padding included."""
    found = []
    for layer in range(plan.schedule.layers):
        rows = zip(plan.text, plan.counts, strict=True)
        found.append([max(text + counts.layers[layer] for text, counts in rows)] * len(plan.text))
    return found


def _places(where: Tensor) -> Places:
    row, column = where.nonzero(as_tuple=True)
    return row, column


@overload
def _in_row(columns: Tensor) -> Places: ...
@overload
def _in_row(columns: None) -> None: ...
def _in_row(columns: Tensor | None) -> Places | None:
    """Return places in a batch of one row."""
    return None if columns is None else (torch.zeros_like(columns), columns)


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
        asked = pruned.reading_projector() if family.projects_tokens else []  # of others a method can't be asked
        names = ", ".join(asked) or pruned.spec.pruner
        reasons["project_kept"] = f"{names} chooses by the projector's output, or {family.name!r} pools it"
    return Choice(packing, logits, kept, reasons)


def _leak(pruned: PrunedModel) -> str | None:
    """Return how samples in one row would see each other in a model; None if they do not."""
    family = pruned.family
    if pruned.stages is not None:
        return "pruning.stages cut each sample inside the LLM, and need it in a row of its own"
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
