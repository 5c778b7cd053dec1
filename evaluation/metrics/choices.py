"""Which of several options an answer chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What models write before the letter, up to where it follows; "an answer" itself holds an A.
_LEAD = re.compile(r"^.*?\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*", re.IGNORECASE | re.DOTALL)
LONG = 10
"""Words of an answer that is prose: a letter of it is no choice unless it stands alone."""


def first_letter(prediction: str, letters: str) -> str:
    """Return the first of ``letters`` that stands alone in an answer; nothing if there is none.

    ``"The best answer is: (B)."`` gives ``"B"``, ``"C. a red ball"`` gives ``"C"``, ``"A dog and a cat"`` ``"A"``.
    """
    text = prediction.strip()
    lead = _LEAD.match(text)
    after = text[lead.end() :] if lead else text
    for part in (after, text):
        found = re.search(rf"(?<![A-Za-z])([{letters}])(?![A-Za-z'])", part)
        if found and (len(part.split()) <= LONG or found.start() <= 1):
            return found.group(1)
    return ""


def chosen_letter(prediction: str, options: Mapping[str, str]) -> str:
    """Return the letter of the option that an answer chooses: by its letter at the start, or by its text alone.

    Of ``{"A": "red", "B": "dark red"}``, ``"(B)"`` and ``"dark red"`` choose B, and ``"red"`` chooses A.
    """
    text = prediction.strip()
    same = [letter for letter, option in options.items() if _plain(option) == _plain(text)]
    if len(same) == 1:
        return same[0]
    # "A" may also begin a sentence: as a letter it stands alone, in brackets, or before a full stop or colon.
    letters = "".join(options)
    start = re.match(rf"^(?:best option:?\s*|answer:?\s*)?(?:\(([{letters}])\)?|([{letters}])(?:[.):,]|$))", text, re.I)
    if start:
        return (start.group(1) or start.group(2)).upper()
    held = [letter for letter, option in options.items() if _plain(option) and _plain(option) in _plain(text)]
    # "dark red" holds "red" too: the longest counts, if the others are parts of it.
    held.sort(key=lambda letter: -len(options[letter]))
    if held and all(_plain(options[other]) in _plain(options[held[0]]) for other in held):
        return held[0]
    return ""


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
