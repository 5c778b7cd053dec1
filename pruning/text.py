"""Text signals: the instruction in CLIP's space and in the LLM's embedding space, and CLIP's view of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from prunetune.pruning.errors import PruningError
from prunetune.pruning.ops.precision import exact_float32
from prunetune.pruning.quiet import no_progress_bar
from prunetune.pruning.signals import of_source, registered_signals, signal_of
from prunetune.pruning.types import Pruner
from prunetune.pruning.vision import Vision

ANSWER_FORMATS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer the question with a single word.",
    "\nAnswer with the option's letter from the given choices directly.",
)
"""What benchmarks append to a question; CDPruner's published evaluation cuts it off before encoding the text."""


def instruction_text(questions: Sequence[str]) -> str:
    """Return the text that pruning may read of a conversation: its first question, without an answer-format suffix.

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

    def __init__(self, model: nn.Module, tokenizer: Any = None, clip: str | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._clip = clip
        self._prompts: dict[tuple, Tensor] = {}

    def signals(self) -> frozenset[str]:
        """Return the text signals that can be computed."""
        spaces = {"llm": self._tokenizer is not None, "clip": self._clip is not None}
        offered = [name for name, signal in registered_signals().items() if spaces.get(signal.space or "", False)]
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
        texts = {}  # one per row, or one for all rows
        if "text_embeds" in wanted:
            texts["text_embeds"] = self.text_embeds(instructions)
        if "text_token_embeds" in wanted:
            texts["text_token_embeds"] = self.token_embeds(instructions)
        groups = []
        for tokens, owner in zip(vision.groups, vision.owner, strict=True):
            where = torch.tensor([rows[image] for image in owner], device=tokens.features.device)
            found = {name: values[where] for name, values in texts.items()}
            if "image_embeds" in wanted:
                found["image_embeds"] = self.image_embeds(tokens.features)
            if "general_embeds" in wanted:
                found["general_embeds"] = self.prompt_embeds(prompts, "clip").expand(len(where), -1, -1)
            if "general_token_embeds" in wanted:
                found["general_token_embeds"] = self.prompt_embeds(prompts, "llm").expand(len(where), -1, -1)
            layers = {**tokens.layers, "image_embeds": "CLIP's visual projection"}
            groups.append(replace(tokens, signals={**tokens.signals, **found}, layers=layers))
        return replace(vision, groups=tuple(groups))

    @torch.no_grad()
    def token_embeds(self, texts: Sequence[str]) -> Tensor:
        """Return LLM token embeddings (T, M, D); texts shorter than the longest are padded with rows of zeros."""
        ids = [self._tokenizer(text or " ", add_special_tokens=False)["input_ids"] for text in texts]
        device = self.model.device  # type: ignore[union-attr]
        rows = pad_sequence([torch.tensor(row or [0], device=device) for row in ids], batch_first=True)  # type: ignore[arg-type]
        lengths = torch.tensor([len(row) for row in ids], device=device)  # type: ignore[arg-type]
        embeds = self.model.get_input_embeddings()(rows)  # type: ignore[operator]
        places = torch.arange(rows.shape[1], device=rows.device)
        return embeds.masked_fill((places >= lengths[:, None])[..., None], 0)

    @torch.no_grad()
    def text_embeds(self, texts: Sequence[str]) -> Tensor:
        """Return CLIP text embeddings (T, M, E), not normalised, M pieces per text; missing pieces are rows of zeros.

        Differs from the published code of CDPruner: every piece of a long text has its own start and end token (there
        later pieces have neither and are pooled at an arbitrary place).
        """
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for text in pieces for piece in text]
        clip, end = self._placed_clip(), self._clip_tokenizer.eos_token_id
        ids = pad_sequence([torch.tensor(piece) for piece in flat], batch_first=True, padding_value=end)
        # The model is causal and pools at the first end token, so padding with end tokens changes nothing.
        with exact_float32(clip.device):
            embeds = clip.text_projection(clip.text_model(input_ids=ids.to(clip.device)).pooler_output)
        split = embeds.split([len(text) for text in pieces])
        return pad_sequence(list(split), batch_first=True)

    def prompt_embeds(self, prompts: Sequence[str], text: str) -> Tensor:
        """Return constant prompts (P, E) in "clip" space, or (P, D) as mean "llm" token embeddings; computed once."""
        key = (text, tuple(prompts), self.model.device)  # type: ignore[union-attr]
        if key not in self._prompts:
            if text == "clip":
                self._prompts[key] = self.text_embeds(prompts)[:, 0]
            else:
                words = self.token_embeds(prompts)  # (P, M, D)
                count = (words != 0).any(dim=-1).sum(dim=1, keepdim=True).clamp(min=1)
                self._prompts[key] = words.float().sum(dim=1) / count
        return self._prompts[key]

    @torch.no_grad()
    def image_embeds(self, features: Tensor) -> Tensor:
        """Return vision features (B, N, C) in CLIP's shared space, (B, N, E): norm and visual projection, float32."""
        clip = self._placed_clip()
        with exact_float32(features.device):
            return clip.visual_projection(clip.vision_model.post_layernorm(features.to(clip.visual_projection.weight)))

    def _placed_clip(self) -> Any:
        device = self.model.device  # type: ignore[union-attr]
        return self.clip if self.clip.device == device else self.clip.to(device)

    def _pieces(self, text: str) -> list[list[int]]:
        tokenizer = self._clip_tokenizer
        room = self.clip.config.text_config.max_position_embeddings - 2
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cuts = range(0, max(len(ids), 1), room)
        return [[tokenizer.bos_token_id, *ids[cut : cut + room], tokenizer.eos_token_id] for cut in cuts]

    @cached_property
    def _clip_tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self._clip)
        except (OSError, ValueError) as error:
            raise PruningError(f"pruning.text_tower {self._clip!r} has no tokenizer: {error}") from error

    @cached_property
    def clip(self) -> Any:
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
        except OSError as error:
            raise PruningError(
                f"pruning.text_tower {self._clip!r} is neither a folder nor a checkpoint that could be fetched: {error}"
            ) from error
        width = self.model.config.vision_config.hidden_size  # type: ignore[union-attr]
        if config.vision_config.hidden_size != width:
            raise PruningError(
                f"pruning.text_tower {self._clip!r} has a vision tower of width {config.vision_config.hidden_size}, "
                f"this model's is {width} wide; name the CLIP checkpoint that the vision tower comes from"
            )
        clip.vision_model.encoder = nn.Identity()
        return clip.eval().requires_grad_(False)
