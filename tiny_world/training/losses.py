"""Losses of the tiny VLM's training: patch labels, contrast, word alignment, and answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration, LlavaNextVideoForConditionalGeneration

from prunetune.tiny_world.training.batches import IGNORE, PATCH_LABELS, QuestionBatch, SceneBatch


def tower_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """Return the patch features that enter the projector, (B, 144, C): the second-last hidden state without [CLS]."""
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class PatchHeads(nn.Module):
    """Linear read-outs of what each patch shows; used in training only and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name, classes in PATCH_LABELS.items():
            self.heads[name] = nn.Linear(width, classes)

    def loss(self, features: Tensor, batch: SceneBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted cross-entropy (background counts 0.3) and the accuracy on shown things."""
        shown = batch.labels["form"] > 0
        # Most patches are background, which should not decide what the heads learn.
        weight = torch.where(shown, 1.0, 0.3)
        total, accuracy = features.new_zeros(()), {}
        for name, head in self.heads.items():
            target = batch.labels[name]
            logits = head(features).float()  # (B, 144, classes)
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            total = total + (each * weight.flatten()).sum() / weight.sum()
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
    image = F.normalize(clip.visual_projection(vision[0]), dim=-1)  # (B, E)
    normed = clip.vision_model.post_layernorm(vision[1])
    patches = F.normalize(clip.visual_projection(normed), dim=-1)  # (B, 144, E)
    caption = _embedded(clip, text)
    phrase = _embedded(clip, phrases)
    own = torch.arange(len(image))
    whole = scale * image.float() @ caption.float().T  # (images, captions)
    # A phrase is compared with the patch it fits best: text-conditioned pruners compare patches, and not images.
    fit = torch.einsum("pe,bne->pbn", phrase.float(), patches.float())  # (phrases, images, 144)
    best = scale * fit.amax(-1)
    others = true & ~torch.eye(len(image), dtype=torch.bool)
    best = best.masked_fill(others, float("-inf"))
    images_and_captions = (F.cross_entropy(whole, own) + F.cross_entropy(whole.T, own)) / 2
    return images_and_captions + F.cross_entropy(best, own)


def _embedded(clip: CLIPModel, text: dict) -> Tensor:
    """Return tokenized texts in the shared space, (B, E), of length 1."""
    pooled = clip.text_model(**text).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=-1)


def alignment_loss(projected: Tensor, embedding: Tensor, batch: SceneBatch) -> Tensor:
    """Make a shown patch's visual token (B, 144, D) point at the word embeddings (V, D) of what it shows.

    Two parts: cross-entropy between its nearness to every word and those words, and the angle to the sum of their
    directions. Without the second, tokens are separable but not alike to words, and attention is slow to match them.
    """
    shown = batch.words.sum(-1) > 0  # (B, 144)
    tokens, words = projected[shown].float(), batch.words[shown]  # (patches, D), (patches, V)
    log_likelihood = (tokens @ embedding.float().T).log_softmax(-1)
    nearness = -(words * log_likelihood).sum(-1).mean()
    directions = F.normalize(embedding.detach().float(), dim=-1)
    summed = (words > 0).float() @ directions  # of the words that are shown, whatever their share
    angle = 1 - F.cosine_similarity(tokens, summed, dim=-1).mean()
    return 0.5 * nearness + 2 * angle


def answer_logits(
    llava: LlavaForConditionalGeneration | LlavaNextVideoForConditionalGeneration,
    visual: Tensor,
    kept: Tensor | None,
    batch: QuestionBatch,
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
    count = batch.ids.shape[0]
    embed = llava.get_input_embeddings()
    if kept is None:
        kept = torch.ones(visual.shape[:2], dtype=torch.bool)
    longest = int(kept.sum(1).max())
    order = torch.argsort((~kept).long(), dim=1, stable=True)[:, :longest]  # kept first, in order
    index = order[..., None].expand(-1, -1, visual.shape[-1])
    visual = visual.gather(1, index)  # (B, N', D)
    user = batch.prefix.expand(count, -1)
    questions = batch.ids.flatten(1)  # (B, Q * T)
    hidden = torch.cat([embed(user), visual, embed(questions)], dim=1)  # (B, P + Q * T, D)
    whole_prefix = torch.ones_like(user, dtype=torch.bool)
    seen = torch.cat([whole_prefix, kept.gather(1, order)], dim=1)  # (B, P)

    mask, positions = _one_row_per_image(seen, *batch.ids.shape[1:])
    output = llava.model.language_model(inputs_embeds=hidden, attention_mask=mask, position_ids=positions)
    states = output.last_hidden_state[:, seen.shape[1] :]
    states = states.reshape(*batch.ids.shape, -1)[:, :, :-1]  # (B, Q, T - 1, D), each predicts the next token
    targets = batch.labels[:, :, 1:]
    asked = targets != IGNORE
    return llava.lm_head(states[asked]).float(), targets[asked]


def _one_row_per_image(seen: Tensor, questions: int, length: int) -> tuple[Tensor, Tensor]:
    """Return attention mask and positions of rows that hold an image and its questions side by side.

    The prefix with the image is encoded once for all of its questions, and not once for each.

    Args:
        seen: (B, P) boolean, which of the prefix and the visual tokens are there; the others are padding.
        questions: Q per image.
        length: T tokens per question.

    Returns:
        (B, 1, P + Q T, P + Q T) boolean, and (B, P + Q T): every question goes on where the prefix ends.
    """
    batch, prefix = seen.shape
    total = prefix + questions * length
    one_question = torch.ones(length, length).tril()
    own_question = torch.block_diag(*[one_question] * questions).bool()
    earlier = torch.ones(prefix, prefix).tril().bool()
    itself = torch.eye(prefix).bool()  # padding sees itself, or its softmax would be 0 / 0
    mask = torch.zeros(batch, 1, total, total, dtype=torch.bool)
    mask[:, 0, :prefix, :prefix] = earlier & seen[:, None, :] | itself
    mask[:, 0, prefix:, :prefix] = seen[:, None, :]
    mask[:, 0, prefix:, prefix:] = own_question
    start = seen.sum(1, keepdim=True)
    in_question = torch.arange(length).repeat(questions)
    of_questions = start + in_question[None, :]
    of_prefix = torch.arange(prefix).expand(batch, -1)
    positions = torch.cat([of_prefix, of_questions], dim=1)
    return mask, positions
