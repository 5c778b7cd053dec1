"""CHAIR: which objects a caption names that are not in the image (equation 5 of the adaptive pruning study)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import inflect

# Words as NLTK's word_tokenize cuts them, which the published script runs: these marks stand alone, and so does a full
# stop behind a word. Hyphens and slashes hold words together: a "bus-stop" names no bus, and "man/woman" nobody.
_MARKS = re.compile(r"[;@#$%&*?!\[\](){}<>\"“”«»`\u2013\u2014]|--+|\.\.\.|[,:](?!\d)")
_ENDING = re.compile(r"(?<=.)(?:n't|'(?:s|m|d|ll|re|ve)|')$")
_ANIMALS = "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, animal, cub"
_VEHICLES = "jet, train"
_PAIRS = """
motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, stop sign,
parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog, cell phone,
mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate, train track
"""


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


@lru_cache(maxsize=1)
def _grammar() -> inflect.engine:
    import inflect  # takes more than a second, and no other benchmark needs it

    return inflect.engine()


class Objects:
    """The object words of COCO.

    Args:
        lines: of the published ``synonyms.txt``: one object per line, its name first, then other words for it.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.names: dict[str, str] = {}
        for line in lines:
            words = _listed(line.lower())
            if words:  # an empty line is no object
                self.names |= dict.fromkeys(words, words[0])
        self.pairs = _pairs()
        self._singulars: dict[str, str] = {}

    def of(self, text: str) -> list[str]:
        """Return the objects that a text names, in order and as often as it names them."""
        words = []
        for word in tokens(text):
            if word not in self._singulars:  # inflect takes a while, and captions repeat their words
                self._singulars[word] = self._singular(word)
            words.append(self._singulars[word])
        joined = []
        index = 0
        while index < len(words):
            pair = " ".join(words[index : index + 2])
            # A pair comes first: the dog of "hot dog" is no dog.
            if pair in self.pairs:
                word = self.pairs[pair]
                index += 2
            else:
                word = words[index]
                index += 1
            joined.append(word)
        # The seat of a toilet is no chair, wherever the two words stand.
        if "toilet" in joined:
            joined = [word for word in joined if word != "seat"]
        return [self.names[word] for word in joined if word in self.names]

    def _singular(self, word: str) -> str:
        """Return a word's singular where it is needed to know the word."""
        # Only words that are not known as they are: inflect's singular of "bus" is "bu".
        if word in self.names:
            return word
        single = _grammar().singular_noun(word)  # type: ignore[arg-type]
        if isinstance(single, str) and (single in self.names or single in _LAST):
            return single
        return word


def tokens(text: str) -> list[str]:
    """Return the words of a text in lower case, with "'s", "n't" and their like cut off: "a man's hand" has a man."""
    words = []
    for word in _MARKS.sub(" ", text.lower().replace("\u2019", "'")).split():
        words.append(_ENDING.sub("", word.removesuffix(".").lstrip("'")))
    return words


def _pairs() -> dict[str, str]:
    """Return two words that are one thing, and what that thing is called."""
    pairs = {}
    for pair in _listed(_PAIRS):
        pairs[pair] = pair
    # A baby bear is a bear, while a teddy bear, above, is not.
    for animal in _listed(_ANIMALS):
        pairs[f"baby {animal}"] = animal
        pairs[f"adult {animal}"] = animal
    for vehicle in _listed(_VEHICLES):
        pairs[f"passenger {vehicle}"] = vehicle
    pairs["bow tie"] = "tie"
    pairs["toilet seat"] = "toilet"
    return pairs


# Last words of pairs: "wine glasses" is known by its pair alone, since "glass" is no object.
_LAST = {pair.split()[1] for pair in _listed(_PAIRS)} | {*_listed(_ANIMALS), *_listed(_VEHICLES), "tie", "seat"}


def chair(captions: Mapping[str, str], truth: Mapping[str, set[str]], objects: Objects) -> dict[str, float | None]:
    """Return C_S, C_I and recall in percent, and the mean number of words of a caption.

    Args:
        captions: one per image.
        truth: the objects that are in each image.
        objects: the vocabulary.
    """
    every = [count(text, truth[image], objects) for image, text in captions.items()]
    wrong, named, invented, known, found, words = (sum(column) for column in zip(*every, strict=True))
    return {
        "C_S": 100 * wrong / len(captions),
        # Captions that name nothing invent nothing: there is no share to give, and 0 would look like a good one.
        "C_I": 100 * invented / named if named else None,
        "recall": 100 * found / known if known else None,
        "length": words / len(captions),
    }


class Count(NamedTuple):
    """What one caption adds to the metrics.

    Attributes:
        wrong: 1 if it invents anything.
        named: mentions of objects; one that is mentioned twice is two.
        invented: mentions of objects that are not in the image.
        known: objects that are in the image.
        found: those of them that the caption mentions.
        words: of the caption.
    """

    wrong: int
    named: int
    invented: int
    known: int
    found: int
    words: int


def count(caption: str, truth: set[str], objects: Objects) -> Count:
    """Return what a caption of an image with the objects ``truth`` adds to the metrics."""
    mentioned = objects.of(caption)
    invented = sum(name not in truth for name in mentioned)
    # C_I counts every mention, recall every object once.
    found = len(set(mentioned) & truth)
    return Count(int(invented > 0), len(mentioned), invented, len(truth), found, len(caption.split()))
