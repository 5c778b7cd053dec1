"""A check at load: does a checkpoint's tokenizer give the tokens that LLaVA's own code gives its v1 prompt?

Two things that happen to tokenizers lose some of them. transformers builds a Llama tokenizer anew where no config.json
lies beside it, and then writes no space behind ``<s>`` and behind the picture. Of a tokenizer.model alone it orders the
merges by id, and then runs of spaces are merged before words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.data_recipes.chat_templates import MODELS_OWN, V1, template_text
from prunetune.data_recipes.pieces import Merges, ordered, scores_of, spaces_last
from prunetune.data_recipes.sample import DataError, Sample, Turn
from prunetune.data_recipes.segments import (
    MODELS_TOKENS,
    RULES,
    SYSTEM,
    Segments,
    Tokens,
    is_llama_like,
    prefix_of,
)

MODEL_FILE = "tokenizer.model"
_PICTURE = "a picture"
PROBES = (
    Sample("probe", "probe", _PICTURE, (Turn("What is it?", "a cat"), Turn("Sure?", "yes"))),
    Sample("spaces", "probe", _PICTURE, (Turn("What  is\nit ▁?", "  a cat, 42\n"), Turn("  Sure?", " "))),
    Sample("text", "probe", None, (Turn("Where  is é漢? ", "▁▁yes"),)),
    Sample("nothing asked", "probe", _PICTURE, (Turn("", "a cat"),)),
)
"""What is tokenized both ways: a plain conversation, spaces in all places, and a picture without a question."""


def check_tokens(
    processor: Any, template: str, tokens: Tokens = MODELS_TOKENS, folder: Path | None = None
) -> str | None:
    """Return in one line how a tokenizer's v1 prompt differs from LLaVA's; None if it does not, or there is none.

    Prompts of another template and tokenizers of another kind than Llama's are not looked at.

    Args:
        processor: the model's.
        template: its name, as ``model.template`` has it.
        tokens: as ``model.tokens``. Those that the loaded tokenizer gives are compared with LLaVA's mode ``legacy``,
            which published files give.
        folder: of the checkpoint, whose tokenizer.model says in what order pieces are merged.

    Raises:
        DataError: if LLaVA's tokens are asked for, and this tokenizer can't give them.
    """
    tokenizer, image = processor.tokenizer, getattr(processor, "image_token", None)
    if not _is_v1(processor, template):
        if tokens != MODELS_TOKENS:
            raise DataError(
                f"model.tokens {tokens} is of template {V1} alone, and model.template is {template}; set it to {V1}, "
                "or leave model.tokens out"
            )
        return None
    if tokens != MODELS_TOKENS:
        return _check_named(tokenizer, image, tokens, folder)
    if not is_llama_like(tokenizer, image):
        return None
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = _right_merges(file["model"], folder)
    expected = Segments(tokenizer, image, RULES["legacy"], file, exact=True, merges=merges.pairs)
    for probe in _probes(image):
        found = tokenizer(_text(probe, tokenizer, image), add_special_tokens=False, verbose=False)["input_ids"]
        difference = _difference(found, _ids(expected, probe), tokenizer)
        if difference is not None:
            return _line(difference, tokenizer, merges, prefix_of(file) != "always")
    return None


def _check_named(tokenizer: Any, image: str | None, tokens: Tokens, folder: Path | None) -> str | None:
    """Check that LLaVA's tokens can be built: then the merges alone count, and not what is put in front of a piece."""
    fits = is_llama_like(tokenizer, image) and tokenizer.unk_token_id is not None
    file = json.loads(tokenizer.backend_tokenizer.to_str()) if fits else None
    if file is None or prefix_of(file) is None:
        raise DataError(
            f"model.tokens {tokens} needs a tokenizer of Llama's kind, a BPE with byte fallback that writes spaces as "
            f"'▁', and this one has {_rules(tokenizer)}; leave model.tokens out"
        )
    merges = _right_merges(file["model"], folder)
    if merges.pairs is None:
        return None
    own = Segments(tokenizer, image, RULES[tokens], file, exact=True)
    expected = Segments(tokenizer, image, RULES[tokens], file, exact=True, merges=merges.pairs)
    for probe in _probes(image):
        difference = _difference(_ids(own, probe), _ids(expected, probe), tokenizer)
        if difference is None:
            continue
        line = _line(difference, tokenizer, merges, False)
        if merges.certain:
            raise DataError(f"model.tokens {tokens}: {line}")
        return line
    return None


def _probes(image: str | None) -> list[Sample]:
    return [probe for probe in PROBES if probe.image is None or image is not None]


@dataclass(frozen=True)
class _Merges:
    """The pairs of a BPE in the order that Llama's files have; None if the tokenizer has them so."""

    pairs: Merges | None
    certain: bool


def _is_v1(processor: Any, template: str) -> bool:
    if template == MODELS_OWN and not processor.chat_template:
        return False  # whoever needs the template says that there is none
    return template_text(processor, template) == template_text(processor, V1)


def _right_merges(model: dict[str, Any], folder: Path | None) -> _Merges:
    """Return the merges by the scores of the checkpoint's tokenizer.model, or else with those of spaces last."""
    own = [tuple(pair) for pair in model["merges"]]
    scores = None if folder is None else scores_of(folder / MODEL_FILE)
    by_score = None if scores is None else ordered(own, model["vocab"], scores)
    right = spaces_last(own) if by_score is None else by_score
    return _Merges(None if right == own else right, by_score is not None)


def _ids(segments: Segments, sample: Sample) -> list[int]:
    (row,) = segments.rows([sample])
    assert row is not None  # each turn has an answer
    return row.ids


def _text(sample: Sample, tokenizer: Any, image: str | None) -> str:
    """Return a conversation as the chat template writes it."""
    text = f"{tokenizer.bos_token}{SYSTEM} "
    for number, turn in enumerate(sample.turns):
        asked = turn.question
        if number == 0 and sample.image is not None:
            asked = f"{image}\n{asked}" if asked else str(image)
        text += f"USER: {asked} ASSISTANT: {turn.answer}{tokenizer.eos_token}"
    return text


def _difference(found: Sequence[int], expected: Sequence[int], tokenizer: Any) -> str | None:
    """Return in words where two lists of tokens differ first; None if they do not."""
    if list(found) == list(expected):
        return None
    at = 0
    while at < min(len(found), len(expected)) and found[at] == expected[at]:
        at += 1
    before = tokenizer.convert_ids_to_tokens(list(expected[max(0, at - 2) : at]))
    return (
        f"token {at}, behind {''.join(before)!r}, is {_named(found, at, tokenizer)}, LLaVA's is "
        f"{_named(expected, at, tokenizer)}"
    )


def _named(ids: Sequence[int], at: int, tokenizer: Any) -> str:
    if at >= len(ids):
        return "none"
    return f"{tokenizer.convert_ids_to_tokens(ids[at])!r} ({ids[at]})"


def _rules(tokenizer: Any) -> str:
    """Return what a tokenizer's file does to a text before its model sees it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"no tokenizer.json ({type(tokenizer).__name__})"
    file = json.loads(backend.to_str())
    return (
        f"the model {file['model']['type']}, the normaliser {_steps(file['normalizer'], 'normalizers')} and the "
        f"pre-tokenizer {_steps(file['pre_tokenizer'], 'pretokenizers')}"
    )


def _steps(part: dict[str, Any] | None, inner: str) -> str:
    if part is None:
        return "none"
    if part["type"] == "Sequence":
        return " + ".join(_steps(step, inner) for step in part[inner])
    scheme = part.get("prepend_scheme")
    return part["type"] if scheme is None else f"{part['type']} (prepend_scheme {scheme})"


def _line(difference: str, tokenizer: Any, merges: _Merges, by_prefix: bool) -> str:
    """Return what is said of a tokenizer: the token, its file's rules, and what to do."""
    ways = []
    if by_prefix:
        ways.append(
            "transformers makes it so where config.json or tokenizer.json is missing beside it: put the published ones "
            "there, or set model.tokens to legacy"
        )
    if merges.pairs is not None:
        ways.append(
            "its merges are ordered by ids, runs of spaces first, as transformers makes them of a tokenizer.model: put "
            "the published tokenizer.json beside it"
        )
    ways = ways or ["put the published tokenizer.json in its place"]
    return (
        f"the tokenizer does not give the tokens of LLaVA's own code: {difference}. It has {_rules(tokenizer)}; "
        f"{'; '.join(ways)}"
    )
