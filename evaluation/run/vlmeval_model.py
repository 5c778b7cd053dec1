"""The class that lets VLMEvalKit run any of its image benchmarks on a pruned, tuned model.

VLMEvalKit finds its models in a dictionary, ``supported_VLM``, to which a script of a few lines adds one:

    supported_VLM["divprune_64"] = partial(PrunetuneVLM, config="configs/evaluate/FILE.yaml")

Prompts, judges and scores are VLMEvalKit's, so call the protocol that when you report numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from prunetune.configs import EvaluateConfig, load_config
from prunetune.data_recipes.images import HERE
from prunetune.evaluation.errors import TaskError
from prunetune.evaluation.run.bridge import Bridge, Question
from prunetune.reading import one_line


class PrunetuneVLM(BaseModel):
    """A pruned model behind VLMEvalKit's interface; answers are generated greedily, one question at a time.

    Args:
        config: YAML of ``prunetune evaluate``: model, pruning and, for a tuned arm, the adapter.
        device: "cuda", "cpu" or another torch device; None is the process's GPU if there is one.
        max_new_tokens: longest answer in tokens; None is the configuration's.
        others: what VLMEvalKit passes to every model and this one does not need.
    """

    is_api = False
    INTERLEAVE = True  # images stand in the message where they belong
    allowed_types = ("text", "image")

    def __init__(
        self, config: str, device: str | None = None, max_new_tokens: int | None = None, **others: Any
    ) -> None:
        super().__init__()
        own = load_config(EvaluateConfig, config)
        self.bridge = Bridge(own, device)
        self.max_new_tokens = max_new_tokens or own.max_new_tokens

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Return False: each benchmark's own prompt is asked, the same for every model."""
        return False

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Return the answer to a message, a list of ``{"type": "text" or "image", "value": text or path}``.

        Raises:
            TaskError: for a part of another type, or an image that can't be opened.
        """
        images = []
        texts = []
        for part in message:
            if part["type"] == "image":
                images.append(_opened(part["value"]))
                texts.append(HERE)
            elif part["type"] == "text":
                texts.append(part["value"])
            else:
                raise TaskError(f"{dataset}: the prunetune model takes text and images, got {part['type']!r}")
        # One after another, as they stand; neighbouring texts are lines of one question.
        text = "\n".join(texts).replace(f"\n{HERE}", HERE).replace(f"{HERE}\n", HERE)
        question = Question(str(dataset), str(dataset), text.strip(), tuple(images))
        return self.bridge.answers([question], [self.max_new_tokens])[0]

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """Return the answer to a message, which may be a text, a path, or a list of both or of parts."""
        return str(super().generate(message, dataset))


def _opened(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        raise TaskError(f"image {image} can't be opened ({one_line(error)})") from error
