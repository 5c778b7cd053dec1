"""Losses of the tiny VLM's training: patch labels, contrast, word alignment, and answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration

from prunetune.tiny_world.training.batches import IGNORE, PATCH_LABELS, QuestionBatch, SceneBatch


def tower_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Return the patch features that enter the projector, (B, 144, C): the second-last hidden state without [CLS]."""
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class PatchHeads(nn.Module):
    """Linear read-outs of what each patch shows; used in training only and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in PATCH_LABELS.items()})

    def loss(self, features: Tensor, batch: SceneBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted cross-entropy (background counts 0.3) and the accuracy on shown things."""
        shown = batch.labels["form"] > 0
        weight = torch.where(shown, 1.0, 0.3)
        total, accuracy = features.new_zeros(()), {}
        for name, head in self.heads.items():
            target = batch.labels[name]
            logits = head(features).float()
            total = (
                total
                + (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).sum()
                / weight.sum()
            )
            right = (logits.argmax(-1) == target)[target > 0]
            accuracy[name] = right.float().mean().item()
        return total, accuracy


def contrastive_loss(clip: CLIPModel, vision: tuple[Tensor, Tensor], text: dict, phrases: dict, true: Tensor) -> Tensor:
    """InfoNCE of whole images with captions, and of best patches with phrases (other true matches masked).

    Args:
        clip: the model whose projections are trained.
        vision: pooled output (B, C) and last hidden patches (B, 144, C) of the tower.
        text: tokenized captions.
        phrases: tokenized phrases.
        true: (B, B), phrase i holds for image j.
    """
    scale = clip.logit_scale.exp().clamp(max=50)
    image = F.normalize(clip.visual_projection(vision[0]), dim=-1)
    patches = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(vision[1])), dim=-1)
    caption = F.normalize(clip.text_projection(clip.text_model(**text).pooler_output), dim=-1)
    phrase = F.normalize(clip.text_projection(clip.text_model(**phrases).pooler_output), dim=-1)
    eye = torch.arange(len(image))
    whole = scale * image.float() @ caption.float().T
    best = scale * torch.einsum("pe,bne->pbn", phrase.float(), patches.float()).amax(-1)
    best = best.masked_fill(true & ~torch.eye(len(image), dtype=torch.bool), float("-inf"))
    return (F.cross_entropy(whole, eye) + F.cross_entropy(whole.T, eye)) / 2 + F.cross_entropy(best, eye)


def alignment_loss(projected: Tensor, embedding: Tensor, batch: SceneBatch) -> Tensor:
    """Make a shown patch's visual token (B, 144, D) point at the word embeddings (V, D) of what it shows.

    Two parts: cross-entropy between its nearness to every word and those words, and the angle to the sum of their
    directions. Without the second, tokens are separable but not alike to words, and attention is slow to match them.
    """
    shown = batch.words.sum(-1) > 0
    tokens, words = projected[shown].float(), batch.words[shown]
    nearness = -(words * (tokens @ embedding.float().T).log_softmax(-1)).sum(-1).mean()
    directions = F.normalize(embedding.detach().float(), dim=-1)
    angle = 1 - F.cosine_similarity(tokens, (words > 0).float() @ directions, dim=-1).mean()
    return 0.5 * nearness + 2 * angle


def answer_logits(
    llava: LlavaForConditionalGeneration, visual: Tensor, kept: Tensor | None, batch: QuestionBatch
) -> tuple[Tensor, Tensor]:
    """Answer all questions of each image in one row: every question sees the image and itself, not its neighbours.

    Args:
        llava: the tiny VLM.
        visual: projected visual tokens (B, N, D).
        kept: (B, N) boolean, which tokens the image keeps, or None for all. Positions close up over dropped ones.
        batch: the questions (B, Q, T).

    Returns:
        Logits (M, V) and targets (M,) of all answer tokens.
    """
    b, q, t = batch.ids.shape
    embed = llava.get_input_embeddings()
    if kept is None:
        kept = torch.ones(visual.shape[:2], dtype=torch.bool)
    order = torch.argsort((~kept).long(), dim=1, stable=True)[:, : int(kept.sum(1).max())]  # kept first, in order
    visual = visual.gather(1, order[..., None].expand(-1, -1, visual.shape[-1]))
    present = kept.gather(1, order)
    user = batch.prefix.expand(b, -1)
    hidden = torch.cat([embed(user), visual, embed(batch.ids.flatten(1))], dim=1)
    prefix = torch.cat([torch.ones_like(user, dtype=torch.bool), present], dim=1)
    p = prefix.shape[1]
    block = torch.block_diag(*[torch.ones(t, t).tril()] * q).bool()
    mask = torch.zeros(b, 1, p + q * t, p + q * t, dtype=torch.bool)
    mask[:, 0, :p, :p] = torch.ones(p, p).tril().bool() & prefix[:, None, :] | torch.eye(p).bool()
    mask[:, 0, p:, :p] = prefix[:, None, :]
    mask[:, 0, p:, p:] = block
    start = prefix.sum(1, keepdim=True)
    positions = torch.cat([torch.arange(p).expand(b, -1), start + torch.arange(t).repeat(q)[None, :]], dim=1)
    output = llava.model.language_model(inputs_embeds=hidden, attention_mask=mask, position_ids=positions)
    states = output.last_hidden_state[:, p:].reshape(b, q, t, -1)[:, :, :-1]
    targets = batch.labels[:, :, 1:]
    asked = targets != IGNORE
    return llava.lm_head(states[asked]).float(), targets[asked]
