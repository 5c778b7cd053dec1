"""CHAIR: which objects a caption names that are not in the picture (equation 5 of the adaptive pruning study)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import inflect

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_ANIMALS = "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, animal, cub"
_VEHICLES = "jet, train"
_PAIRS = """
motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, stop sign,
parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog, cell phone,
mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate, train track
"""


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


@lru_cache(maxsize=1)
def _grammar() -> inflect.engine:
    return inflect.engine()


class Objects:
    """The object words of COCO.

    Args:
        lines: of the published ``synonyms.txt``: one object per line, its name first, then other words for it.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.names: dict[str, str] = {}
        for line in lines:
            words = [word.strip().lower() for word in line.split(",") if word.strip()]
            self.names |= dict.fromkeys(words, words[0])
        # Two words that are one thing, and not the thing that either is alone.
        self.pairs = {pair: pair for pair in _listed(_PAIRS)}
        self.pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _listed(_ANIMALS)}
        self.pairs |= {f"passenger {vehicle}": vehicle for vehicle in _listed(_VEHICLES)}
        self.pairs |= {"bow tie": "tie", "toilet seat": "toilet"}

    def of(self, text: str) -> list[str]:
        """Return the objects that a text names, in order and as often as it names them."""
        words = [self._singular(word) for word in _WORD.findall(text.lower())]
        found, place = [], 0
        while place < len(words):
            pair = " ".join(words[place : place + 2])
            if pair in self.pairs:
                word, place = self.pairs[pair], place + 2
            else:
                word, place = words[place], place + 1
            if word in self.names:
                found.append(self.names[word])
        return found

    def _singular(self, word: str) -> str:
        """Return a word's singular where it is needed to know the word."""
        if word in self.names:
            return word
        single = _grammar().singular_noun(word)  # type: ignore[arg-type]
        return single if isinstance(single, str) and (single in self.names or single in _LAST) else word


_LAST = {pair.split()[1] for pair in _listed(_PAIRS)}


def chair(captions: Mapping[str, str], truth: Mapping[str, set[str]], objects: Objects) -> dict[str, float | None]:
    """Return C_S, C_I and recall in percent, and the mean number of words of a caption.

    Args:
        captions: one per picture.
        truth: the objects that are in each picture.
        objects: the vocabulary.
    """
    named = invented = wrong = known = found = words = 0
    for picture, text in captions.items():
        mentioned = objects.of(text)
        false = [name for name in mentioned if name not in truth[picture]]
        named, invented, wrong = named + len(mentioned), invented + len(false), wrong + bool(false)
        known, found = known + len(truth[picture]), found + len(set(mentioned) & truth[picture])
        words += len(text.split())
    return {
        "C_S": 100 * wrong / len(captions),
        "C_I": 100 * invented / named if named else None,
        "recall": 100 * found / known if known else None,
        "length": words / len(captions),
    }
