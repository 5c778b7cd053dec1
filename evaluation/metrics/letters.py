"""Which letter an answer chooses, by the rules of two published scorers; :mod:`.choices` has our own.

They go by capital letters anywhere in a text, in an order of what is surest. "A" is also a word, so they err; a number
that is to be compared with published ones needs the same errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_ENDS = (",", ".", "!", "?", ";", ":", "'")
"""What is taken from both ends of an answer, one after another and each once: "A,." keeps its comma."""

# By rank: a letter with which the answer begins or ends is surer than one behind "the answer is", and so on.
_BEGINS, _CLOSES, _SAID, _ANYWHERE = 10, 9, 7, 0
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))

_PHRASES = [f"{which}{noun} is" for noun in ("answer", "option") for which in ("the correct ", "correct ")]
_PHRASES += [f"{which}{noun} is" for noun in ("answer", "option") for which in ("the best ", "best ")]
_PHRASES += ["the answer is", "answer is", "my answer is", "the choice is", "choice is", "my choice is"]
_PHRASES += ["the correct choice is", "correct choice is", "i choose", "i select", "i pick"]
_PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def ranked_letter(answer: str, letters: Sequence[str]) -> str:
    """Return the letter that lmms-eval reads from an answer: of the surest form, the last; nothing if there is none.

    ``"(B)"``, ``"B. a dog"`` and ``"The answer is B"`` give ``"B"``; so does ``"Not A but B"``, which ends with it.
    """
    bare = _stripped(answer.strip(), (*_ENDS, '"'))
    if not bare.strip():
        return ""
    text = f" {bare} "
    found: list[tuple[int, int, str]] = []  # rank, position, letter
    for letter in letters:
        for form, rank in _FORMS:
            found.append((rank, text.rfind(form.format(letter)), letter))
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            if start >= 0:
                found.append((_SAID, text.find(letter, start + len(phrase)), letter))
        found.append((_ANYWHERE, text.rfind(letter), letter))
    found = [one for one in found if one[1] >= 0]
    inner = bare.strip()
    if inner[0] in letters and not inner[1:2].isalpha():
        found.append((_BEGINS, 0, inner[0]))
    if inner[-1] in letters and not inner[-2:-1].isalpha():
        found.append((_CLOSES, 0, inner[-1]))
    return max(found)[2] if found else ""


def mmmu_letter(answer: str, options: Mapping[str, str]) -> str:
    """Return the letter that MMMU's scorer reads from an answer; nothing if it names no option.

    Letters in brackets come first, then those before a space, then those before a full stop, and in answers of more
    than five words the options' own texts. Of several letters the last counts.
    """
    text = f" {_stripped(answer, _ENDS)} "
    for form in ("({})", "{} ", "{}."):
        held = [letter for letter in options if form.format(letter) in text]
        if held:
            # Between words alone, where there are no brackets: a letter that ends a word has no place, and is first.
            last = "({})" if form == "({})" else " {} "
            return max(held, key=lambda letter: text.rfind(last.format(letter)))
    if len(text.split()) <= 5:
        return ""
    lower = text.lower()
    held = [letter for letter, option in options.items() if option.lower() in lower]
    return max(held, key=lambda letter: lower.rfind(options[letter].lower()), default="")


def mmmu_open(answer: str, truth: str) -> bool:
    """Return whether MMMU's scorer finds the right answer to an open question in what a model said.

    It looks at what follows "is", "so", "answer", "=" and the like in each sentence, and at all numbers in that: a
    number has to be equal after rounding to two digits, a text to be held.
    """
    right = _comparable(truth)
    said: list[str | float] = []
    parts = _conclusions(answer)
    for part in parts:
        for one in (part, *_numbers(part)):
            said += _comparable(one)
    for found in said:
        for true in right:
            if isinstance(found, str) and isinstance(true, str) and true in found:
                return True
            if isinstance(found, float) and found == true:
                return True
    return False


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def _conclusions(answer: str) -> list[str]:
    """Return what each sentence comes to: its shortest end behind an indicator; the whole answer if there is none."""
    text = answer.strip().strip(".").lower()
    # The published scorer splits at full stops before capitals, of which a lower-cased text has none; lines remain.
    lines = text.split("\n")
    ends = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        tails = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        # An empty end is passed over for the next one, which may be longer.
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            ends.append(shortest)
    return ends or [text]


_NUMBER_FORMS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1000, 1.5, .5
)


def _numbers(text: str) -> list[str]:
    return [number for form in _NUMBER_FORMS for number in form.findall(text)]


def _comparable(text: str) -> list[str | float]:
    """Return a number rounded to two digits, or a text in lower case; a single letter needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _stripped(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.strip(mark)
    return text
