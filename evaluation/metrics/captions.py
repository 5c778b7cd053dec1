"""CIDEr and BLEU by pycocoevalcap, the COCO server's own code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunetune.evaluation.errors import TaskError


@dataclass(frozen=True)
class CaptionScores:
    """CIDEr and BLEU of a corpus.

    Attributes:
        metrics: CIDEr and BLEU-1 to BLEU-4, as lmms-eval reports them (CIDEr 1.1 is often written 110).
        cider: of each image (M,), in the order of the captions; CIDEr is their mean.
    """

    metrics: dict[str, float]
    cider: list[float]


def caption_metrics(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return CIDEr and BLEU-1 to BLEU-4 of a corpus, see :func:`caption_scores`."""
    return caption_scores(captions, references).metrics


def caption_scores(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
    """Return CIDEr and BLEU of a corpus, and every image's part in CIDEr.

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

    # An image's CIDEr weighs words by how rare they are in the whole set: no image has one by itself.
    cider, by_image = Cider().compute_score(true, said)
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    metrics = {"CIDEr": float(cider)}
    for n, value in enumerate(bleu, start=1):
        metrics[f"BLEU-{n}"] = float(value)
    return CaptionScores(metrics, [float(value) for value in by_image])
