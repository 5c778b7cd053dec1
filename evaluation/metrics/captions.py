"""CIDEr and BLEU by pycocoevalcap, the COCO server's own code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from prunetune.evaluation.errors import TaskError


def caption_metrics(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return CIDEr and BLEU-1 to BLEU-4 of a corpus, as lmms-eval reports them (CIDEr 1.1 is often written 110).

    Args:
        captions: one per image.
        references: people's captions by image.

    Raises:
        TaskError: if pycocoevalcap or Java, which its tokenizer runs on, is missing.
    """
    # An optional dependency: nobody who scores no captions needs it.
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise TaskError(f"captions are scored by pycocoevalcap; pip install 'prunetune[captions]' ({error})") from error
    # Without this the tokenizer's own message is a FileNotFoundError about a jar.
    if shutil.which("java") is None:
        raise TaskError("captions are tokenized by pycocoevalcap's PTB tokenizer, which needs Java; install a runtime")

    said = {}
    for image, text in captions.items():
        # The tokenizer takes one caption per line: whatever breaks a line within one would shift all that follow.
        said[image] = [{"caption": " ".join(text.split())}]
    true = {}
    for image, texts in references.items():
        true[image] = [{"caption": text} for text in texts]
    tokenizer = PTBTokenizer()
    said, true = tokenizer.tokenize(said), tokenizer.tokenize(true)

    # Both also return a score per image, but CIDEr's weights come from the whole set: no image has one by itself.
    cider, _ = Cider().compute_score(true, said)
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    metrics = {"CIDEr": float(cider)}
    for n, value in enumerate(bleu, start=1):
        metrics[f"BLEU-{n}"] = float(value)
    return metrics
