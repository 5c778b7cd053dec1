"""MME: yes/no questions in pairs about a picture, 10 subtasks of perception and 4 of cognition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.data_recipes.images import FolderImages
from prunetune.evaluation.errors import MissingFile
from prunetune.evaluation.predictions import Prediction
from prunetune.evaluation.tasks.base import SHORT_ANSWER, Item, Pair, Task, TaskError, register_task

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (MME_Benchmark_release)"
YES_OR_NO = "Please answer yes or no."
_PICTURES = (".jpg", ".png", ".jpeg")


def read_items(data: Path) -> list[Item]:
    """Return the questions of all subtasks, by subtask and picture; ids are ``SUBTASK/PICTURE/QUESTION``.

    A question that a file holds twice is one question.

    Raises:
        TaskError: if there is no subtask, a line is not a question, a tab and yes or no, or a question has two answers.
    """
    root = _root(data)
    items: dict[str, Item] = {}
    for subtask in (*PERCEPTION, *COGNITION):
        folder = root / subtask
        questions = folder / "questions_answers_YN"
        pictures = folder / "images" if questions.is_dir() else folder
        for path in sorted((questions if questions.is_dir() else folder).glob("*.txt")):
            picture = next((path.stem + end for end in _PICTURES if (pictures / (path.stem + end)).is_file()), None)
            image = (pictures / (picture or f"{path.stem}.jpg")).relative_to(data).as_posix()
            for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if text.strip():
                    question, answer = _split(text, f"{path}, line {line}")
                    name = f"{subtask}/{path.stem}/{plain(question)}"
                    if name in items and items[name].answer != answer:
                        raise TaskError(f"{path}, line {line}: the question has another answer above")
                    items[name] = Item(name, subtask, image, f"{plain(question)}\n{SHORT_ANSWER}", answer)
    return list(items.values())


def _root(data: Path) -> Path:
    """Return the folder that holds the subtasks' folders, anywhere below ``data``."""
    if any((data / name).is_dir() for name in (*PERCEPTION, *COGNITION)):
        return data
    found = {
        path.parent for name in ("existence", "code_reasoning", "OCR") for path in data.rglob(name) if path.is_dir()
    }
    if not found:
        raise MissingFile(
            f"{data} holds none of MME's subtasks ({', '.join(PERCEPTION[:3])}, ...); get it from {SOURCE}"
        )
    if len(found) > 1:
        raise TaskError(f"{data} holds MME's subtasks several times: {', '.join(map(str, sorted(found)))}; name one")
    return found.pop()


def _split(text: str, where: str) -> tuple[str, str]:
    parts = text.strip().split("\t")
    if len(parts) != 2 or parts[1].strip().lower() not in ("yes", "no"):
        raise TaskError(f"{where}: expected a question, a tab, and Yes or No, got {text!r}")
    return parts[0], parts[1].strip().lower()


def plain(question: str) -> str:
    """Return a question without the two answer formats, single-spaced."""
    return " ".join(question.replace(SHORT_ANSWER, "").replace(YES_OR_NO, "").split())


def says(prediction: str) -> str:
    """Return "yes", "no" or "other", from the first four characters."""
    head = prediction.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def score(prediction: str, item: Item) -> float:
    """Return 1 if yes or no is right."""
    return float(says(prediction) == item.answer)


def metrics(pairs: list[Pair]) -> dict[str, Any]:
    """Return the score of every subtask (accuracy plus accuracy over whole pictures, in percent) and the two sums.

    Sums are over the subtasks that are there; the others are listed.
    """
    subtasks: dict[str, dict[str, float]] = {}
    for subtask in (*PERCEPTION, *COGNITION):
        own = [(prediction, item) for prediction, item in pairs if item.source == subtask]
        if own:
            right: dict[str, list[float]] = {}
            for prediction, item in own:
                right.setdefault(item.id.split("/")[1], []).append(score(prediction, item))
            accuracy = 100 * sum(sum(values) for values in right.values()) / len(own)
            plus = 100 * sum(all(values) for values in right.values()) / len(right)
            subtasks[subtask] = {"score": accuracy + plus, "accuracy": accuracy, "accuracy_plus": plus}
    sums = {
        kind: sum(subtasks[name]["score"] for name in names if name in subtasks)
        for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    missing = [name for name in (*PERCEPTION, *COGNITION) if name not in subtasks]
    return {**sums, "total": sum(sums.values()), "subtasks": subtasks, "missing_subtasks": missing}


def key(prediction: Prediction, where: str) -> str:
    """Return the item of a prediction; LLaVA's id is ``SUBTASK/FILE`` and its prompt says which question it was."""
    parts = prediction.id.split("/")
    if len(parts) > 2 and not parts[1].endswith(_PICTURES) and parts[1] != "images":
        return prediction.id
    if not prediction.prompt:
        raise TaskError(f"{where}: no prompt, so it can't be told which of the picture's questions was answered")
    return f"{parts[0]}/{parts[-1].rsplit('.', 1)[0]}/{plain(prediction.prompt)}"


register_task(
    Task(
        name="mme",
        protocol="llava",
        prompt="question, short answer",
        read=read_items,
        images=FolderImages,
        score=score,
        metrics=metrics,
        key=key,
        first_counts=True,
        notes=(
            "questions are paired by subtask, picture and text, not by their order in the files",
            "of a question that was answered several times the first answer counts, as in LLaVA's conversion",
        ),
        about="MME: perception and cognition (accuracy + accuracy over pictures)",
    )
)
