"""CIDEr and BLEU by pycocoevalcap, the COCO server's own code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from prunetune.evaluation.errors import TaskError


def caption_metrics(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return CIDEr and BLEU-1 to BLEU-4 of a corpus, as lmms-eval reports them (CIDEr 1.1 is often written 110).

    Args:
        captions: one per picture.
        references: people's captions by picture.

    Raises:
        TaskError: if pycocoevalcap or Java, which its tokenizer runs on, is missing.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise TaskError(f"captions are scored by pycocoevalcap; pip install 'prunetune[captions]' ({error})") from error
    if shutil.which("java") is None:
        raise TaskError("captions are tokenized by pycocoevalcap's PTB tokenizer, which needs Java; install a runtime")
    tokenizer = PTBTokenizer()
    said = tokenizer.tokenize({name: [{"caption": " ".join(text.split())}] for name, text in captions.items()})
    true = tokenizer.tokenize({name: [{"caption": text} for text in texts] for name, texts in references.items()})
    cider, _ = Cider().compute_score(true, said)
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    return {"CIDEr": float(cider), **{f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}}
