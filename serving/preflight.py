"""Before the port opens: the engine answers reference questions as this process does, or the server does not start."""

from __future__ import annotations

from collections.abc import Sequence

from prunetune.reading import shown
from prunetune.serving.backends.base import Backend
from prunetune.serving.errors import Refused, ServingError
from prunetune.serving.references import Reference, answers


def check_same_answers(here: Backend, engine: Backend, references: Sequence[Reference], exact: bool) -> str:
    """Have both answer and return one line that says how it went.

    Args:
        here: the embedded backend.
        engine: the other one.
        references: questions; where one has a recorded answer, it is compared as well.
        exact: whether all answers must be equal. In half precision two engines round differently, and a near tie may
            fall the other way: a quarter of the answers may differ then.

    Raises:
        ServingError: if prompts have different lengths, more answers differ, or the engine fails.
    """
    own = answers(here, references)
    try:
        others = answers(engine, references)
    except Refused as why:
        raise ServingError(f"the engine could not answer a reference question: {why.message}") from why
    differing = []
    for reference, mine, other in zip(references, own, others, strict=True):
        if mine.usage.prompt != other.usage.prompt:
            raise ServingError(f"the engine read {other.usage.prompt} tokens of a prompt of {mine.usage.prompt}")
        said = [mine.text] if reference.answer is None else [mine.text, reference.answer]
        if any(text != other.text for text in said):
            differing.append((said[-1] if said[-1] != other.text else mine.text, other.text))
    allowed = 0 if exact else len(references) // 4
    if len(differing) > allowed:
        expected, got = differing[0]
        raise ServingError(
            f"{len(differing)} of {len(references)} reference answers differ, such as {shown(got)} of the engine where "
            f"{shown(expected)} was expected; start the engine on the merged checkpoint of this adapter, with its chat "
            "template and dtype (`prunetune export --for vllm`)"
        )
    return f"preflight: {len(references) - len(differing)} of {len(references)} reference answers are equal"
