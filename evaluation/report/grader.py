"""An optional grader for open answers: any OpenAI-compatible endpoint. Off unless its address is given."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.evaluation.errors import TaskError
from prunetune.reading import one_line

INSTRUCTION = (
    "You grade answers to questions about videos. Compare the predicted answer with the correct one: do they mean the "
    "same? Synonyms and paraphrases count. Reply with a JSON object only, with the keys pred, yes or no, and score, an "
    "integer from 0 (wrong) to 5 (fully right)."
)

CHOICE = (
    "You read answers to multiple-choice questions. Given a question, its options and somebody's answer, say which "
    "option the answer means. You need not know which option is right. Reply with its letter alone, or with NONE if "
    "the answer means none of them or several."
)


@dataclass(frozen=True)
class Grader:
    """Asks a language model whether an answer is right.

    Attributes:
        endpoint: address of an OpenAI-compatible API, for example http://localhost:8000/v1.
        model: name of the model there.
        key_variable: environment variable that holds the key; it may be unset for local servers.
        timeout: seconds per question.
    """

    endpoint: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0

    def grade(self, triples: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
        """Return accuracy in percent and the mean score of (question, correct answer, predicted answer) triples.

        Raises:
            TaskError: if the endpoint can't be reached or does not answer as asked.
        """
        from tqdm import tqdm

        grades = []
        for triple in tqdm(list(triples), desc="grading", unit="answer", dynamic_ncols=True):
            grades.append(self.ask(*triple))
        return {
            "graded_accuracy": 100 * sum(right for right, _ in grades) / len(grades),
            "graded_score": sum(score for _, score in grades) / len(grades),
            # Grades of two models can't be compared, so the name belongs to the number.
            "grader": self.model,
        }

    def ask(self, question: str, correct: str, predicted: str) -> tuple[bool, int]:
        """Return whether the prediction is right, and its score from 0 to 5."""
        content = f"Question: {question}\nCorrect answer: {correct}\nPredicted answer: {predicted}"
        return read_grade(self._reply(INSTRUCTION, content))

    def choose(self, question: str, options: Mapping[str, str], predicted: str) -> str:
        """Return the letter of the option that an answer means, or nothing if it means none.

        Raises:
            TaskError: if the endpoint can't be reached or does not answer as asked.
        """
        listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        content = f"Question: {question}\nOptions:\n{listed}\nAnswer: {predicted}"
        return read_choice(self._reply(CHOICE, content), options)

    def _reply(self, instruction: str, content: str) -> str:
        """Return what the model says; raises TaskError if it does not."""
        body = {
            "model": self.model,
            "temperature": 0,  # the same answers get the same grades when they are graded again
            "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": content}],
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:  # local servers want none, and some refuse an empty one
            # From the environment and never from an option: command lines are logged.
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.endpoint.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        # One failed answer stops it all: a mean over those that came back would be of other questions.
        # ValueError: the address is none, or the reply is no JSON; the others: it is JSON of another shape.
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TaskError(f"the grader at {url} did not answer: {one_line(error)}") from error


def read_choice(text: str, options: Mapping[str, str]) -> str:
    """Return the letter in a reply, nothing for NONE; raises TaskError if it is neither."""
    words = re.findall(r"[A-Za-z]+", text)
    letters = {word for word in words if word in options}
    if len(letters) == 1:
        return letters.pop()
    if not letters and "NONE" in words:
        return ""
    raise TaskError(f"the grader replied {text!r}, expected one letter of {', '.join(options)}, or NONE")


def read_grade(text: str) -> tuple[bool, int]:
    """Return the grade in a reply; raises TaskError if there is none."""
    # Models like to say a sentence first, and to write a Python dictionary where JSON was asked for.
    found = re.search(r"\{[^{}]*\}", text)
    try:
        grade = json.loads(found.group(0).replace("'", '"')) if found else {}
        right = str(grade["pred"]).strip().lower() == "yes"
        score = max(0, min(5, int(grade["score"])))  # some answer 10 of 5
        return right, score
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise TaskError(f"the grader replied {text!r}, expected a JSON object with pred and score") from None
