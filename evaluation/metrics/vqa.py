"""VQA accuracy by three published rules: answers are normalised, then compared with ten people's."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
# Dropped before comparing: "a dog" and "the dog" are the answer "dog".
_ARTICLES = ("a", "an", "the")
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_AT_MOST = 32
"""The published processor passes a flag where the number of replacements belongs; 32 periods is what that comes to."""

# Words that people write without their apostrophe, here as they should be.
_SIMPLE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
you've
"""
# With two apostrophes, either may be missing; a bare form that is another word (wed've) keeps one.
_DOUBLE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _without(word: str, number: int) -> str:
    """Return ``word`` without its ``number``-th apostrophe."""
    parts = word.split("'")
    return "'".join([*parts[:number], parts[number] + parts[number + 1], *parts[number + 2 :]])


def _contractions() -> dict[str, str]:
    """Return what people write, and the form that is compared."""
    table = {}
    for word in _SIMPLE.split():
        table[word.replace("'", "")] = word
    for word in _DOUBLE.split():
        for number in (0, 1):
            table[_without(word, number)] = word
    # The two words of the published table with three apostrophes.
    for word in ("y'all'd've", "'ow's'at"):
        for number in (0, 1, 2):
            table[_without(word, number)] = word
    # Published this way round, so the correct form is the one that loses its apostrophe.
    table["somebody'd"] = "somebodyd"
    return table


_CONTRACTIONS = _contractions()


def normalize(answer: str) -> str:
    """Return an answer as the challenge compares it.

    Lower case; ``,`` and ``?`` dropped and ``'s`` split off; a punctuation mark is removed if it stands next to a space
    anywhere, or if digits are grouped by commas, and else becomes a space; periods not followed by a digit go; number
    words become digits, articles go, and missing apostrophes are put back.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_without_marks(text.replace("\n", " ").replace("\t", " ").strip()))


def _without_marks(text: str) -> str:
    """Return a text without punctuation marks: each is removed, or becomes a space."""
    # Never so in normalize, where the commas are gone by now: LLaVA's copy of the processor has it in this order.
    grouped = _COMMA_BETWEEN_DIGITS.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        # Neighbours are looked up in the text as it was, while marks leave the result: one mark next to a space
        # anywhere decides for all of its kind ("black -white-red" becomes "black whitered").
        remove = grouped or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if remove else " ")
    return _PERIOD.sub("", result, count=_PERIODS_AT_MOST)


def _words(text: str) -> str:
    """Return a text's words in lower case, without articles, number words as digits, apostrophes put back."""
    words = []
    for word in text.lower().split():
        word = _DIGITS.get(word, word)
        # Articles before contractions, as published: what a contraction becomes is no article.
        if word not in _ARTICLES:
            words.append(_CONTRACTIONS.get(word, word))
    return " ".join(words)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of a prediction, from 0 to 1.

    Each person is left out in turn; the prediction scores ``min(1, matches / 3)`` against the others, and the mean over
    people counts.

    Args:
        prediction: raw text.
        answers: what people answered, usually ten; not empty.
    """
    return _left_out(normalize(prediction), [normalize(answer) for answer in answers])


def vqav2_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of a prediction as lmms-eval's VQAv2 has it, from 0 to 1.

    Both sides go through the challenge's processor, and not through the steps before it: ``'s`` stays where it is, and
    a comma between words becomes a space.
    """
    return _left_out(_processed(prediction), [_processed(answer) for answer in answers])


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of a prediction that LLaVA converts and the official vqaEval scores, from 0 to 1.

    The prediction is normalised by the conversion and processed again by vqaEval. People's answers stay as they are
    where all agree; where they do not, their marks go, and nothing else: an article, a number word, a capital or a
    possessive of theirs is matched by no prediction.
    """
    if len(set(answers)) > 1:
        answers = [_without_marks(answer) for answer in answers]
    return _left_out(_processed(normalize(prediction)), answers)


def _processed(answer: str) -> str:
    return _words(_without_marks(answer.replace("\n", " ").replace("\t", " ").strip()))


def _left_out(said: str, answers: Sequence[str]) -> float:
    """Return the mean of min(1, matches / 3), each person left out in turn."""
    same = sum(answer == said for answer in answers)
    others = len(answers) - same
    # Two kinds of people can be left out: one who agrees, so that one match fewer remains, or one who does not.
    return (same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)) / len(answers)
