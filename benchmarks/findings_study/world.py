"""The tiny VLM and its scenes, prepared once: features, signals, packed questions and the teacher's states."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from findings_study.rows import Rows, Texts, lay_out, pack
from prunetune.assets import TINY_VLM
from prunetune.configs import ModelConfig
from prunetune.data_recipes import Sample, Turn
from prunetune.models import Arm
from prunetune.pruning import PruningSpec
from prunetune.pruning.types import VisualTokens
from prunetune.tiny_world import ask, sample_scene, split_seeds
from prunetune.tiny_world.images import SceneImages
from prunetune.tiny_world.training.batches import question_batch

STUDY = 1
"""Raised by hand with a change of this folder that gives other numbers: every stored row is then outdated."""
POOL = 8000
"""Scenes of the recalibration range that training data are drawn from."""
TEST = 300
TOKENS = 144
SIGNALS = frozenset({"cls_attention", "image_key"})
Fill = Callable[[Tensor], Tensor]
AT_ONCE = 50
"""Scenes that run at once where nothing is trained."""


@dataclass(frozen=True)
class Cell:
    """A pruner and a budget; no pruner keeps all visual tokens, and ``fresh`` draws other positions every time."""

    pruner: str | None
    keep: int = TOKENS

    def __str__(self) -> str:
        return "dense" if self.pruner is None else f"{self.pruner} {self.keep}"


DENSE = Cell(None)
BY_PROJECTOR = ("divprune", "fps")
"""The pruners of this study that read the projector's output, so that their choice moves while it is tuned."""


class World:
    """The bundled model with its pools of scenes; whatever takes long is computed once and kept in a folder.

    Args:
        folder: where arrays are kept; they are read without being loaded.
        pool: scenes that training data are drawn from.
        test: scenes of the test and of the validation range that are scored.
    """

    def __init__(self, folder: Path, pool: int = POOL, test: int = TEST) -> None:
        self.arm = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu")
        self.arm.model.requires_grad_(False).eval()
        self.hash = hashlib.sha256(
            (self.arm.base.frozen_hash + self.arm.projector_hash + self.arm.base.settings_hash).encode()
        ).hexdigest()
        self.folder = folder / f"{self.hash[:12]}-{STUDY}"
        self.scenes = {"recalibration": pool, "validation": test, "test": test}
        self._pools: dict[str, Pool] = {}
        model: Any = self.arm.model
        self.llm: Any = model.model.language_model
        self.head: nn.Module = model.lm_head
        self.original: nn.Module = model.model.multi_modal_projector

    def projector(self, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """Return a projector of its own with some weights, or with the original ones."""
        own = copy.deepcopy(self.original)
        if weights is not None:
            own.load_state_dict(weights)
        return own

    def pool(self, split: str) -> Pool:
        """Return the scenes of a split."""
        if split not in self._pools:
            self._pools[split] = Pool(self, split, self.scenes[split])
        return self._pools[split]

    def states(self, rows: Rows, wanted: Tensor, layers: int | None = None) -> Tensor:
        """Return the LLM's hidden states after its norm at some positions of the text, (M, D), row by row.

        The last layer runs at these alone, a quarter of the whole cost where they are those of answers.

        Args:
            rows: what the LLM reads.
            wanted: (B, T) boolean, which positions of the text.
            layers: behind which layer, from 1; later ones do not run. None is the last.
        """
        used = self.llm.layers[:layers]
        turns = self.llm.rotary_emb(rows.embeds, rows.positions)
        states = rows.embeds
        for layer in used[:-1]:
            states = layer(states, attention_mask=rows.mask, position_embeddings=turns, position_ids=rows.positions)
        # Rows want differently many: the first of those that are not wanted fill up.
        most = int(wanted.sum(1).max())
        at = rows.start + (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        found = last_layer(used[-1], states, at, rows.mask, turns)
        return self.llm.norm(found[torch.arange(most) < wanted.sum(1, keepdim=True)])

    def rows(self, visual: Tensor, texts: Texts) -> Rows:
        """Return rows of the LLM: prefix, visual tokens (B, K, D) and the questions behind them."""
        return lay_out(self.llm.embed_tokens, self.prefix, visual, texts)

    @cached_property
    def prefix(self) -> Tensor:
        """What stands before the image in every prompt, (P,)."""
        return self.pool("test").prefix


def last_layer(layer: Any, states: Tensor, at: Tensor, mask: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return what a stock layer makes of states (B, L, D) at some positions (B, A), as (B, A, D).

    Args:
        layer: a layer of Llama's kind, whose modules are called as its own forward calls them.
        states: what enters it.
        at: the positions.
        mask: (B, 1, L, L) added to the scores.
        turns: cosines and sines of all positions, each (B, L, d).
    """
    attention = layer.self_attn

    def by_head(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def picked(values: Tensor) -> Tensor:
        return values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))

    normed = layer.input_layernorm(states)
    key, value = by_head(attention.k_proj(normed)), by_head(attention.v_proj(normed))
    query = by_head(attention.q_proj(picked(normed)))
    key, query = _rotated(key, turns), _rotated(query, (picked(turns[0]), picked(turns[1])))
    seen = picked(mask[:, 0])[:, None]
    read = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=attention.scaling)
    found = picked(states) + attention.o_proj(read.transpose(1, 2).flatten(2))
    return found + layer.mlp(layer.post_attention_layernorm(found))


def _rotated(values: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Return queries or keys (B, H, L, d) turned by their positions, as Llama turns them."""
    cosine, sine = (turn[:, None] for turn in turns)
    first, second = values.chunk(2, dim=-1)
    return values * cosine + torch.cat([-second, first], dim=-1) * sine


class Pool:
    """S scenes of one split with eight questions each.

    Attributes:
        texts: the questions side by side, each with its answer.
        short: the same without the end of each answer, which nothing is predicted from.
    """

    def __init__(self, world: World, split: str, scenes: int) -> None:
        self.world, self.split, self.count = world, split, scenes
        self._read: dict[str, Tensor] = {}
        tokenizer: Any = world.arm.processor.tokenizer
        self.seeds = list(split_seeds(split, scenes))
        asked = question_batch([ask(sample_scene(seed)) for seed in self.seeds], tokenizer)
        self.prefix = asked.prefix
        self.texts, self.short = pack(asked, ends=True), pack(asked, ends=False)

    def _path(self, name: str) -> Path:
        return self.world.folder / f"{self.split}-{self.count}-{name}.npy"

    def _array(self, name: str, fill: Fill) -> Tensor:
        """Return an array with one row a scene, which is computed once and then read from its file as it is used."""
        return self._arrays([name], lambda index: [fill(index)])[0]

    def _arrays(self, names: list[str], fill: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Return several that are computed together."""
        paths = [self._path(name) for name in names]
        if not all(path.exists() for path in paths):
            self.world.folder.mkdir(parents=True, exist_ok=True)
            self._write(paths, fill)
        return [torch.from_numpy(np.load(path, mmap_mode="c")) for path in paths]

    @torch.no_grad()
    def _write(self, paths: list[Path], fill: Callable[[Tensor], list[Tensor]]) -> None:
        parts = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
        arrays: list[np.memmap] = []
        for first in range(0, self.count, AT_ONCE):
            made = fill(torch.arange(first, min(first + AT_ONCE, self.count)))
            for number, values in enumerate(made):
                if first == 0:
                    shape = (self.count, *values.shape[1:])
                    kind = values.numpy().dtype
                    arrays.append(np.lib.format.open_memmap(parts[number], "w+", dtype=kind, shape=shape))
                arrays[number][first : first + len(values)] = values.numpy()
        for array, part, path in zip(arrays, parts, paths, strict=True):
            array.flush()
            os.replace(part, path)  # at once: a file that is there is whole

    def _encode(self, index: Tensor) -> list[Tensor]:
        samples = []
        for number in index.tolist():
            seed = self.seeds[number]
            question = ask(sample_scene(seed))[0]
            samples.append(Sample(str(seed), question.source, f"scene:{seed}", (Turn(question.text, question.answer),)))
        batch = self.world.arm.formatter(SceneImages()).training_batch(samples)
        tokens = self.world.arm.pruned.encode(batch, SIGNALS)["image"].groups[0]
        return [tokens.features, tokens.signals["cls_attention"], tokens.signals["image_key"]]

    @cached_property
    def _encoded(self) -> list[Tensor]:
        return self._arrays(["features", "cls_attention", "image_key"], self._encode)

    @property
    def features(self) -> Tensor:
        """What enters the projector, (S, 144, C)."""
        return self._encoded[0]

    def tokens(self, index: Tensor, projector: nn.Module | None = None) -> VisualTokens:
        """Return what a pruner sees of some scenes; what the projector makes of them only if one is given."""
        features, attention, keys = (values[index] for values in self._encoded)
        projected = None if projector is None else projector(features)
        return VisualTokens(features, projected, {"cls_attention": attention, "image_key": keys}, grid=(12, 12))

    def chosen(self, index: Tensor, cell: Cell, projector: nn.Module) -> Tensor:
        """Return the positions (B, K) that a cell keeps of some scenes.

        Args:
            index: (B,) the scenes.
            cell: a pruner and a budget.
            projector: the one that pruners choose by which read its output.
        """
        assert cell.pruner is not None and cell.pruner != "fresh"
        if cell.pruner in BY_PROJECTOR and projector is not self.world.original:
            with torch.no_grad():
                return _choose(cell, self.tokens(index, projector))
        name = f"chosen-{cell.pruner}-{cell.keep}"
        read = self.world.original if cell.pruner in BY_PROJECTOR else None
        return self._kept_array(name, lambda index: _choose(cell, self.tokens(index, read)))[index]

    def teacher(self, layers: int | None = None) -> Tensor:
        """Return the states at all text positions of the dense model with its original projector, (S, T, D)."""

        def fill(index: Tensor) -> Tensor:
            texts = self.texts.at(index, trim=False)
            rows = self.world.rows(self.world.original(self.features[index]), texts)
            states = self.world.states(rows, torch.ones_like(texts.is_text), layers)
            return states.unflatten(0, texts.ids.shape)

        return self._kept_array(f"teacher-{layers or 'last'}", fill)

    def _kept_array(self, name: str, fill: Fill) -> Tensor:
        if name not in self._read:
            self._read[name] = self._array(name, fill)
        return self._read[name]


def _choose(cell: Cell, tokens: VisualTokens) -> Tensor:
    assert cell.pruner is not None
    indices = PruningSpec(cell.pruner, cell.keep).build()(tokens, cell.keep).indices
    assert isinstance(indices, Tensor)  # none of these adapts its count to the image
    return indices


def hash_of(settings: Any) -> str:
    """Return a short name of settings that JSON can write."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
