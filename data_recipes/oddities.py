"""Conversations that LLaVA's own code tokenizes by accident: they are reported, and not imitated."""

from __future__ import annotations

from prunetune.data_recipes.sample import Sample

SPECIAL = ("<s>", "</s>", "<unk>")
MARK = "ASSISTANT: "


def oddities(sample: Sample) -> list[str]:
    """Return one line for everything in a sample that LLaVA's code reads as something else than its text.

    Such a sample is trained on as it is written; LLaVA's labels of it would be others, or none at all.
    """
    found = []
    for number, turn in enumerate(sample.turns):
        where = f"{sample.id}: turn {number + 1}"
        if turn.answer == "":
            found.append(f"{where} has an empty answer; LLaVA's code writes no end token there, and loses the labels")
        if not turn.question and (number > 0 or sample.image is None):
            found.append(f"{where} has an empty question; LLaVA's code writes no space behind its `USER:`")
        text = f"{turn.question} {MARK}{turn.answer or ''}"
        for token in SPECIAL:
            if token in text:
                found.append(f"{where} holds {token!r}, which LLaVA's tokenizer reads as a special token")
        if text.count(MARK) > 1:
            found.append(f"{where} holds {MARK!r}, by which LLaVA's code finds where an answer begins")
    return found
