"""Letters, open answers and ANLS on random answers, against the functions of the installed lmms-eval."""

import random
import types

import pytest

from prunetune.evaluation.metrics.anls import anls
from prunetune.evaluation.metrics.letters import mmmu_letter, mmmu_open, ranked_letter

pytest.importorskip("lmms_eval", reason="`make test` installs lmms-eval without its pins, see the Makefile")

WORDS = ["A", "B", "(B)", "C.", "D:", "B)", "the answer is", "Answer is", "i choose", "cat", "dog", "BAD", "ABC", "red",
         "dark red", ",", ".", "'", '"', "?", "\n", "my answer is", "is", "correct option is", "答案是", "so", "= 3",
         "3.14159", "1,000", "-2", "1e3", "therefore", "1.5.", "Nine"]  # fmt: skip
OPTIONS = {"A": "red", "B": "dark red", "C": "cat", "D": "Dog"}


def random_answers(number, longest=9):
    random.seed(0)
    for _ in range(number):
        yield random.choice((" ", "", " ")).join(random.choices(WORDS, k=random.randint(0, longest)))


def test_letters_are_lmms_evals(monkeypatch):
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    # Where it draws an option at random, we have none.
    monkeypatch.setattr(mmmu_mcq_utils, "random", types.SimpleNamespace(choice=lambda choices: ""))
    for answer in random_answers(5000):
        assert ranked_letter(answer, "ABCD") == extract_mcq_answer(answer, choices=list("ABCD")), answer
        theirs = mmmu_mcq_utils.parse_mmmu_multi_choice_response(answer, list(OPTIONS), OPTIONS)
        assert mmmu_letter(answer, OPTIONS) == theirs, answer


def test_open_answers_are_lmms_evals():
    # Its MMMU file also imports what asks judges, which needs packages that nothing else here does.
    utils = pytest.importorskip("lmms_eval.tasks.mmmu.utils")
    for answer in random_answers(2000):
        for truth in ("3.14", "1,000", "a", "red", "Nine", "-2", "1.5"):
            assert mmmu_open(answer, truth) == utils.eval_open(truth, utils.parse_open_response(answer)), answer


def test_anls_is_lmms_evals():
    from lmms_eval.api.metrics import anls as theirs

    answers = list(random_answers(600, 4))
    for said, *right in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        assert anls(said, right) == theirs(right, [said])["anls"]
