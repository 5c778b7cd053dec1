"""Text signals: the instruction in CLIP's space and in the LLM's embedding space, and CLIP's view of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.ops.statistics import text_mask
from prunetune.pruning.quiet import no_progress_bar
from prunetune.pruning.signals import of_source, registered_signals, signal_of
from prunetune.pruning.types import Pruner
from prunetune.pruning.vision import Vision
from prunetune.reading import one_line

ANSWER_FORMATS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer the question with a single word.",
    "\nAnswer with the option's letter from the given choices directly.",
)
"""What benchmarks append to a question; CDPruner's published evaluation cuts it off before encoding the text."""


def instruction_text(questions: Sequence[str]) -> str:
    """Return the text that pruning may read of a conversation: its first question, without an answer-format suffix.

    ``["What is it?\\nAnswer the question with a single word.", "And this?"]`` gives ``"What is it?"``.

    Training and inference call this on the same thing, the user's turns. Answers are never part of it, and neither are
    later questions, which often give away an earlier answer ("what color is the cat?").
    """
    text = questions[0]
    for suffix in ANSWER_FORMATS:
        text = text.removesuffix(suffix)
    return text.strip()


class TextReader:
    """Reads instructions for text-conditioned pruners.

    Args:
        model: the VLM; its token embeddings and the width of its vision features are used.
        tokenizer: the VLM's tokenizer; needed for signals in LLM space.
        clip: folder or hub id of the CLIP checkpoint that the vision tower comes from; needed for signals in CLIP
            space. Only its text side, the visual projection and the norm before it are kept.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, clip: str | None = None
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._clip = clip
        self._prompts: dict[tuple, Tensor] = {}  # prompts are options: the same for every image of a run

    def signals(self) -> frozenset[str]:
        """Return the text signals that can be computed."""
        spaces = {"llm": self._tokenizer is not None, "clip": self._clip is not None}
        offered = []
        for name, signal in registered_signals().items():
            if signal.space is not None and spaces[signal.space]:
                offered.append(name)
        return frozenset(offered)

    def add(self, vision: Vision, pruner: Pruner, instructions: Sequence[str], rows: Sequence[int]) -> Vision:
        """Return the images with the text signals that the pruner needs.

        Args:
            vision: the images.
            pruner: the method.
            instructions: one text per row of the batch.
            rows: the row that each image belongs to.
        """
        wanted = [signal_of(need).name for need in of_source(pruner.needs, "text")]
        if not wanted:
            return vision
        prompts = list(getattr(pruner, "general_prompts", ()))
        # Read once per row: the items of an image, and the images of a row, share the row's text.
        texts = {}
        if "text_embeds" in wanted:
            texts["text_embeds"] = self.text_embeds(instructions)
        if "text_token_embeds" in wanted:
            texts["text_token_embeds"] = self.token_embeds(instructions)
        groups = []
        for tokens, owner in zip(vision.groups, vision.owner, strict=True):
            # The row of each item: crops and frames read the text of their image's sample.
            where = torch.tensor([rows[image] for image in owner], device=tokens.features.device)
            found = {name: values[where] for name, values in texts.items()}
            if "image_embeds" in wanted:
                found["image_embeds"] = self.image_embeds(tokens.features)
            for name, space in (("general_embeds", "clip"), ("general_token_embeds", "llm")):
                if name in wanted:
                    embeds = self.prompt_embeds(prompts, space)  # (P, E)
                    found[name] = embeds.expand(len(where), -1, -1)
            # For the message of a signal that is not finite.
            layers = {**tokens.layers, "image_embeds": "CLIP's visual projection"}
            groups.append(replace(tokens, signals={**tokens.signals, **found}, layers=layers))
        return replace(vision, groups=tuple(groups))

    @torch.no_grad()
    def token_embeds(self, texts: Sequence[str]) -> Float[Tensor, "T M D"]:
        """Return LLM token embeddings (T, M, D); texts shorter than the longest are padded with rows of zeros."""
        tokenizer = self._tokenizer
        assert tokenizer is not None  # signals() offers the LLM's only then
        device = self.model.device
        rows, lengths = [], []
        for text in texts:
            # An empty text still has a row, or a batch of nothing but empty ones would have no token at all.
            ids = tokenizer(text or " ", add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor(ids or [0], device=device))
            lengths.append(len(ids))
        padded = pad_sequence(rows, batch_first=True)  # (T, M)
        embeds = self.model.get_input_embeddings()(padded)  # (T, M, D)
        index = torch.arange(padded.shape[1], device=device)
        is_padding = index >= torch.tensor(lengths, device=device)[:, None]
        return embeds.masked_fill(is_padding[..., None], 0)

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> Float[Tensor, "T M E"]:
        """Return CLIP text embeddings (T, M, E), not normalised, M pieces per text; missing pieces are rows of zeros.

        Differs from the published code of CDPruner: every piece of a long text has its own start and end token (there
        later pieces have neither and are pooled at an arbitrary position).
        """
        pieces, counts = [], []
        for text in texts:
            own = self._pieces(text)
            pieces += [torch.tensor(ids) for ids in own]
            counts.append(len(own))
        clip, end = self._placed_clip(), self._clip_tokenizer.eos_token_id
        # The model is causal and pools at the first end token, so padding with end tokens changes nothing.
        ids = pad_sequence(pieces, batch_first=True, padding_value=end).to(clip.device)
        with exact_float32(clip.device):
            embeds = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)  # (all pieces, E)
        return pad_sequence(list(embeds.split(counts)), batch_first=True)

    def prompt_embeds(self, prompts: Sequence[str], text: str) -> Float[Tensor, "P E"]:
        """Return constant prompts (P, E) in "clip" space, or (P, D) as mean "llm" token embeddings; computed once."""
        key = (text, tuple(prompts), self.model.device)
        if key in self._prompts:
            return self._prompts[key]
        if text == "clip":
            embeds = self.text_embeds(prompts)[:, 0]  # prompts are short: one piece each
        else:
            words = self.token_embeds(prompts)  # (P, M, D)
            count = text_mask(words).sum(dim=1, keepdim=True).clamp(min=1)
            embeds = words.float().sum(dim=1) / count
        self._prompts[key] = embeds
        return embeds

    @torch.no_grad()
    def image_embeds(self, features: Float[Tensor, "B N C"]) -> Float[Tensor, "B N E"]:
        """Return vision features (B, N, C) in CLIP's shared space, (B, N, E): norm and visual projection, float32."""
        clip = self._placed_clip()
        with exact_float32(features.device):
            normed = clip.vision_model.post_layernorm(features.to(clip.visual_projection.weight))
            return clip.visual_projection(normed)

    def _placed_clip(self) -> CLIPModel:
        """Return CLIP on the model's device, which a trainer may have changed since the last call."""
        device = self.model.device
        if self.clip.device != device:
            self.clip.to(device)  # type: ignore[arg-type]
        return self.clip

    def _pieces(self, text: str) -> list[list[int]]:
        """Return a text as pieces of CLIP's length, each with its start and end token; an empty text is one piece."""
        tokenizer = self._clip_tokenizer
        config: Any = self.clip.config
        room = config.text_config.max_position_embeddings - 2
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = []
        for start in range(0, max(len(ids), 1), room):
            pieces.append([tokenizer.bos_token_id, *ids[start : start + room], tokenizer.eos_token_id])
        return pieces

    @property
    def tower_tokenizer(self) -> PreTrainedTokenizerBase:
        """The text tower's own tokenizer; raises PruningError if it has none."""
        return self._clip_tokenizer

    @cached_property
    def _clip_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self._clip)
        except Exception as error:  # anything, as below
            raise PruningError(f"pruning.text_tower {self._clip!r} has no tokenizer: {one_line(error)}") from error

    @cached_property
    def clip(self) -> CLIPModel:
        """The text side and the visual projection of the CLIP checkpoint, float32.

        Raises:
            PruningError: if it can't be loaded, is no CLIP, or belongs to a tower of another width.
        """
        assert self._clip is not None  # signals() offers CLIP's only then
        try:
            config = AutoConfig.from_pretrained(self._clip)
            if config.model_type != "clip":
                raise PruningError(
                    f"pruning.text_tower {self._clip!r} is a {config.model_type!r}, not a CLIP checkpoint"
                )
            with no_progress_bar():
                clip = CLIPModel.from_pretrained(self._clip, dtype=torch.float32)
        except (PruningError, torch.OutOfMemoryError):
            raise
        # Anything: transformers passes on what its parts say of broken files.
        except Exception as error:
            raise PruningError(
                f"pruning.text_tower {self._clip!r} is neither a folder nor a checkpoint that could be fetched and "
                f"loaded: {one_line(error)}"
            ) from error
        vlm: Any = self.model.config
        width = vlm.vision_config.hidden_size
        if config.vision_config.hidden_size != width:
            raise PruningError(
                f"pruning.text_tower {self._clip!r} has a vision tower of width {config.vision_config.hidden_size}, "
                f"this model's is {width} wide; name the CLIP checkpoint that the vision tower comes from"
            )
        kind = vlm.vision_config.model_type
        if (
            kind != config.vision_config.model_type
        ):  # InternViT is as wide as CLIP-L, and its features mean other things
            raise PruningError(
                f"pruning.text_tower {self._clip!r} is a CLIP checkpoint, and this model's vision tower is a {kind!r}, "
                "whose features do not lie in CLIP's space; choose a method that does not compare them with text there"
            )
        # Features come from the VLM's own tower; of CLIP's only the norm and the projection behind it are used.
        clip.vision_model.encoder = nn.Identity()
        return clip.eval().requires_grad_(False)
