"""What a benchmark is: readers, one per layout that its files come in, and a scorer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetune.evaluation.errors import MissingFile, TaskError
from prunetune.evaluation.metrics.averages import Average, average
from prunetune.evaluation.metrics.intervals import bootstrap_interval
from prunetune.evaluation.metrics.metric import Metric, Tally, intervals, share, tallied
from prunetune.evaluation.records import TaskSummary
from prunetune.names import nearest
from prunetune.plugins import import_folder, load_installed, named
from prunetune.reading import one_line, shown

if TYPE_CHECKING:
    from prunetune.data_recipes.images import ImageOpener
    from prunetune.evaluation.readers import Reader

# LLaVA-1.5's own two sentences, to the letter: it was trained with them, and its published numbers are reached with
# them. A comma more is another prompt, and another number.
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question about at most one image, and what the scorer compares the prediction with (JSON values).

    Attributes:
        id: names it within its benchmark.
        source: which part of the benchmark it belongs to, see :attr:`Benchmark.source_is`.
        image: reference of its image; None asks about text alone.
        question: the prompt.
        answer: JSON values.
        kinds: further kinds of question that it is one of, by what they tell apart: ``{"semantic": "attr"}``.
    """

    id: str
    source: str
    image: str | None
    question: str
    # Any: a list of ten answers, a letter with its options, or nothing at all. Its scorer alone reads it.
    answer: Any
    kinds: Mapping[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """Return the item as one line, for hashing."""
        # A list, so that no field's name is part of the hash: hashes stand in manifests, and must stay what they are.
        # Without the kinds, by which answers are only told apart: they decide no answer and no score.
        return json.dumps([self.id, self.source, self.image, self.question, self.answer], ensure_ascii=False)


@dataclass(frozen=True)
class Prediction:
    """One saved answer, as its file has it.

    Attributes:
        id: the question's id in that file, which need not be an item's.
        text: what the model said.
        prompt: what it was asked, empty if the file does not say.
        line: line of the file, from 1.
    """

    id: str
    text: str
    prompt: str
    line: int


@dataclass(frozen=True)
class Scored:
    """A prediction with its item and the score it got when it was made or read; nothing scores it again."""

    prediction: str
    item: Item
    score: float | None


def averaged(scored: Sequence[Scored]) -> Average:
    """Return the mean scores in percent, over all items and over those of each source."""
    return average([one.score for one in scored], [one.item.source for one in scored])


def accuracy(scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the mean score in percent as the only metric."""
    return {"accuracy": averaged(scored).overall}


def unit_of(item: Item) -> str:
    """Return what the bootstrap draws as a whole: an item's image, or the item where it asks about text alone."""
    return str(item.image or item.id)


def tally_scores(scored: Sequence[Scored]) -> Tally:
    """Return the sum of scores and the number of items, by image."""
    return tallied([unit_of(one.item) for one in scored], [(one.score or 0.0, 1.0) for one in scored])


ACCURACY = Metric(
    name="accuracy",
    unit="%",
    about="mean score of the questions; images are drawn",
    tally=tally_scores,
    value=lambda counts: 100 * share(counts[..., 0], counts[..., 1]),
)


def accuracy_of(source: str, name: str, about: str) -> Metric:
    """Return the mean score in percent of the questions of one source alone."""

    def tally(scored: Sequence[Scored]) -> Tally:
        rows = []
        for one in scored:
            own = one.item.source == source
            rows.append(((one.score or 0.0) * own, float(own)))
        return tallied([unit_of(one.item) for one in scored], rows)

    return Metric(name, "%", about, tally, lambda counts: 100 * share(counts[..., 0], counts[..., 1]))


def score_as_a_set(prediction: str, item: Item) -> None:
    """Return no score: of some metrics, such as CIDEr, only a whole set has one."""
    # A function like any other, so that nothing that scores has to ask whether there is one.
    return


Choose = Callable[[str, Mapping[str, str], str], str]
"""A judge that returns the letter of the option that an answer means, given question, options and answer; or nothing"""


@dataclass(frozen=True)
class Scorer:
    """Compares predictions with answers.

    Attributes:
        score: compares one prediction with its item, from 0 to 1; None where only a whole set has a score.
        summarise: computes all metrics of scored predictions, from the scores that they carry.
        metrics: those that tables have columns for, each with an interval of its own; papers print the first.
        notes: where numbers are defined otherwise than by the published scorer, on purpose.
        judged: returns the answers with the scores that a judge gives those which the rules can't read; None where a
            judge only says whether open answers are right.
    """

    score: Callable[[str, Item], float | None]
    summarise: Callable[[Sequence[Scored]], dict[str, Any]] = accuracy
    metrics: Sequence[Metric] = (ACCURACY,)
    notes: Sequence[str] = ()
    judged: Callable[[Sequence[Scored], Choose], list[Scored]] | None = None


@dataclass(frozen=True)
class Pairing:
    """How saved predictions, which other programs may have written, find their items.

    Attributes:
        ids: returns each prediction's item id, given the folder of the benchmark's files and the name of the
            predictions for messages; None takes the predictions' own ids.
        failed: the text that stands for a missing prediction, where the published scorer counts it as wrong; None
            makes a missing prediction an error.
        first_counts: whether of several predictions of one question the first counts, as the published scorer has it;
            otherwise a repeated prediction is an error.
        subset: whether items without a prediction are left out, where papers take some of them.
    """

    # All predictions at once, not one by one: POPE's need a file that is read for all of them.
    ids: Callable[[list[Prediction], Path, str], list[str]] | None = None
    failed: str | None = None
    first_counts: bool = False
    subset: bool = False


@dataclass(frozen=True)
class Questions:
    """A benchmark's items, and the reader that found them in a folder."""

    items: list[Item]
    reader: Reader
    data: Path

    def open_images(self) -> ImageOpener:
        """Return what opens the items' images."""
        return self.reader.open_images(self.data)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: the name of the command line.
        protocol: whose rules it scores by.
        prompt: which variant of the question is asked, in words.
        about: one line for ``prunetune list tasks``.
        readers: the layouts its files come in, the one to ask for first.
        scorer: compares predictions with answers; None where the answers are hidden, so that only the benchmark's
            server can score.
        others: scorers by other rules, by the protocol's name, see :meth:`under`.
        upload: writes the file that the server takes into a folder, and returns its path.
        unasked: reads from a folder the questions that are not asked, but without which the server takes no upload:
            their answers there are empty.
        judge: asks a language model about predictions where only one can compare them, given what asks it (a system's
            and a user's message, answered by a text); returns metrics.
        pairing: how saved predictions find their items.
        notes: where numbers are defined otherwise than by the published scorer, on purpose.
        source_is: what an item's source tells apart: "category", "subtask", "answer type".
        video: whether it asks about videos: an item's ``image`` is a video's reference then.
        albums: whether an item may ask about several images at once.
    """

    name: str
    protocol: str
    prompt: str
    about: str
    readers: Sequence[Reader]
    scorer: Scorer | None
    upload: Callable[[Sequence[Scored], Path], Path] | None = None
    judge: Callable[[Callable[[str, str], str], Sequence[Scored]], dict[str, Any]] | None = None
    pairing: Pairing = Pairing()
    notes: Sequence[str] = ()
    source_is: str = "source"
    video: bool = False
    albums: bool = False
    others: Mapping[str, Scorer] = field(default_factory=dict)
    unasked: Callable[[Path], list[Item]] | None = None

    @property
    def storable(self) -> bool:
        """Whether a feature cache can hold what it asks about: single images."""
        return not self.video and not self.albums

    @property
    def hidden(self) -> bool:
        """Whether the answers are hidden."""
        return self.scorer is None

    def under(self, protocol: str | None) -> Benchmark:
        """Return the benchmark scored by another protocol's rules, called ``NAME@PROTOCOL``; None is its own.

        Raises:
            TaskError: if it can't be scored by them.
        """
        if protocol in (None, self.protocol):
            return self
        if protocol not in self.others:
            known = " or ".join(repr(name) for name in (self.protocol, *self.others))
            raise TaskError(f"{self.name} is scored by protocol {known}, not {protocol!r}")
        # Under a name of its own: its scores are other numbers, and nothing may take the one for the other.
        return replace(self, name=f"{self.name}@{protocol}", protocol=protocol, scorer=self.others[protocol], others={})

    def open(self, data: Path, answers_only: bool = False) -> Questions:
        """Return the items in a folder, by the first reader whose files are there.

        Args:
            data: folder of the benchmark's files.
            answers_only: whether saved predictions are to be scored, which may take fewer files.

        Raises:
            TaskError: for missing or foreign files, or an id that is there twice.
        """
        # By trying: which files a layout needs is known to the code that reads them, and a second list of their names
        # would have to be kept equal to it.
        missing: MissingFile | None = None
        for reader in self.readers:
            try:
                items = reader.read_answers(data) if answers_only else reader.read(data)
            except MissingFile as error:
                missing = missing or error  # the first layout's, which says where to get the files
                continue
            except KeyError as error:  # a record of a file that is not what it is called
                raise TaskError(
                    f"a record of {self.name}'s files in {data} has no {shown(error.args[0])}; are they the published "
                    "ones?"
                ) from None
            except (TypeError, AttributeError, IndexError) as error:  # a list where an object was expected, and so on
                raise TaskError(
                    f"a record of {self.name}'s files in {data} is not as published: {one_line(error)}"
                ) from error
            self._check_ids(items, data)
            return Questions(items, reader, data)
        raise missing or TaskError(f"{self.name} has no reader")

    def read(self, data: Path) -> list[Item]:
        """Return all items in their fixed order, see :meth:`open`."""
        return self.open(data).items

    def read_answers(self, data: Path) -> list[Item]:
        """Return the items to score saved predictions against, see :meth:`open`."""
        return self.open(data, answers_only=True).items

    def score(self, prediction: str, item: Item) -> Scored:
        """Return a prediction with its score, which is None where the answers are hidden or a set has one score."""
        score = None if self.scorer is None else self.scorer.score(prediction, item)
        return Scored(prediction, item, score)

    def kinds(self, item: Item) -> dict[str, str]:
        """Return the kinds of question that an item is one of, for breakdowns: its source, and its further kinds.

        Where all items are of one kind there is nothing to break down.
        """
        return {self.source_is: item.source, **item.kinds}

    def summarise(self, scored: Sequence[Scored]) -> TaskSummary:
        """Return all metrics, none of them where the answers are hidden, and the interval of the mean score.

        Metrics other than the mean score have an interval of their own, in ``intervals`` by their names.
        """
        metrics = {} if self.scorer is None else dict(self.scorer.summarise(scored))
        own = [] if self.scorer is None else [one for one in self.scorer.metrics if one.value is not ACCURACY.value]
        if own and scored:
            metrics["intervals"] = intervals(own, scored)
        scores = []
        images = []
        for one in scored:
            if one.score is not None:
                scores.append(one.score)
                images.append(unit_of(one.item))  # a question about text alone hangs with no other
        # Over part of the items it would be the interval of another number than the accuracy beside it.
        if not scores or len(scores) < len(scored):
            return TaskSummary(metrics=metrics, interval_95=None)
        return TaskSummary(metrics=metrics, interval_95=list(bootstrap_interval(scores, images)))

    def _check_ids(self, items: list[Item], data: Path) -> None:
        """Check that no two items share their id: one of their answers would be counted for both."""
        times = Counter(item.id for item in items)
        for name, number in times.most_common(1):
            if number > 1:
                raise TaskError(f"{self.name}: question {name!r} is in the files in {data} {number} times")


_TASKS: dict[str, Benchmark] = {}


def register_task(task: Benchmark) -> Benchmark:
    """Add a benchmark; raises TaskError if its name is taken."""
    # Taking the later one would change a benchmark for everybody who imported the earlier.
    if task.name in _TASKS:
        raise TaskError(f"two tasks are called {task.name!r}")
    _TASKS[task.name] = task
    return task


def tasks() -> dict[str, Benchmark]:
    """Return all benchmarks by name: those of ``evaluation/tasks/`` and of plug-ins."""
    import prunetune.evaluation.tasks as package

    # Here and not when the package is imported: the files import this module, and whoever needs one benchmark's
    # functions alone (a test, a notebook) need not import them all.
    import_folder(package)
    load_installed()
    return dict(sorted(_TASKS.items()))


def get_task(name: str) -> Benchmark:
    """Return the benchmark of a name, or the object that ``package.module:NAME`` names.

    Args:
        name: ``vqav2``, or ``vqav2@official`` for the rules of another protocol than its own.

    Raises:
        TaskError: if there is none, with the nearest name, or no such protocol.
        PluginError: if its module can't be imported.
    """
    name, _, protocol = name.partition("@")
    return _named(name).under(protocol or None)


def _named(name: str) -> Benchmark:
    if ":" in name:
        task = named(name)
        if not isinstance(task, Benchmark):
            raise TaskError(f"{name!r} is no benchmark but {type(task).__name__}; it is what register_task returns")
        return task
    known = tasks()
    if name not in known:
        raise TaskError(f"unknown task {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


UNSET = Path("<data is not set>")
"""Stands for the folder of tasks that need none; what a task that needs one says is missing there."""


def task_folder(data: str | Path | None, name: str) -> Path:
    """Return the folder of a task's files: ``data/NAME``, its first word ``data/textvqa`` for textvqa_no_ocr, or data.

    Without ``data`` it is :data:`UNSET`, where nothing is found.

    Raises:
        TaskError: if ``data`` is set and no folder.
    """
    # The tiny world reads no files; every other benchmark says which of its own it misses, in a folder of this name.
    if data is None:
        return UNSET
    root = Path(data)
    name = name.partition("@")[0]  # whose rules score the answers says nothing about the files
    if not root.is_dir():
        raise TaskError(f"data folder {str(root)!r} does not exist; set data to the folder of the benchmarks' files")
    # Variants of one benchmark share its files: vqav2_testdev lies with vqav2.
    for part in (name, name.split("_")[0]):
        if (root / part).is_dir():
            return root / part
    return root


def items_hash(items: list[Item]) -> str:
    """Return a SHA-256 of items in their order."""
    # In their order: arms are compared question by question.
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.key().encode() + b"\n")
    return digest.hexdigest()
