"""Pruning of videos on the moving tiny world: accuracy over methods and budgets of a clip, recalibrated or not.

    python scripts/train_tiny_video.py --output runs/tiny_video
    python benchmarks/moving.py --model runs/tiny_video [--clips 100] [--steps 120]

Prints a Markdown table. Clips have 4 frames of 36 tokens; a budget counts for the whole clip. "Recalibrated" trains the
projector alone on clips of the training split under the same method and budget, and runs on the same inference path.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlavaNextVideoForConditionalGeneration

from prunetune.pruning import PrunedModel, PruningSpec
from prunetune.tiny_world.moving import FRAMES, ask_clip, render_clip, sample_clip
from prunetune.tiny_world.moving.training import TEST, TRAINING

TOKENS = 36
BUDGETS = (72, 36, 16, 8)
METHODS = ("random", "divprune", "fps", "fastervlm", "evs", "vidcom2", "dycoke")
BATCH = 60


def batches(tokenizer: Any, seeds: Sequence[int], answers: bool) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield batches of questions with their clip, padded on the left for answering and on the right for training."""
    rows = []
    for seed in seeds:
        clip = sample_clip(seed)
        pixels = torch.from_numpy(render_clip(clip)).permute(0, 3, 1, 2) / 127.5 - 1  # (4, 3, 84, 84)
        for question in ask_clip(clip):
            prompt = f"<s>USER: {'<video>' * FRAMES * TOKENS}\n{question.text} ASSISTANT:"
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            answer = [*tokenizer.encode(question.answer, add_special_tokens=False), tokenizer.eos_token_id]
            rows.append((pixels, ids, answer, question.answer))
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        texts = [ids + answer if answers else ids for _, ids, answer, _ in part]
        longest = max(map(len, texts))
        shape = (len(part), longest)
        batch: dict[str, Any] = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
            "pixel_values_videos": torch.stack([pixels for pixels, _, _, _ in part]),
        }
        for row, (text, (_, ids, _, _)) in enumerate(zip(texts, part, strict=True)):
            place = slice(0, len(text)) if answers else slice(longest - len(text), longest)
            batch["input_ids"][row, place] = torch.tensor(text)
            batch["attention_mask"][row, place] = 1
            batch["labels"][row, len(ids) : len(text)] = torch.tensor(text[len(ids) :], dtype=torch.long)
        if not answers:
            del batch["labels"]
        yield batch, [answer for _, _, _, answer in part]


@torch.inference_mode()
def accuracy(pruned: PrunedModel, tokenizer: Any, clips: int) -> float:
    """Return the share of exactly right answers to the test clips' questions, in percent."""
    right = []
    for batch, wanted in batches(tokenizer, range(TEST, TEST + clips), answers=False):
        generated = pruned.generate(**batch, max_new_tokens=4, do_sample=False)
        texts = tokenizer.batch_decode(generated.tokens, skip_special_tokens=True)
        right += [text.split() == answer.split() for text, answer in zip(texts, wanted, strict=True)]
    return 100 * float(np.mean(right))


def recalibrated(model: Any, spec: PruningSpec, tokenizer: Any, steps: int) -> PrunedModel:
    """Return the model with its projector trained under the method and budget, nothing else touched."""
    tuned = copy.deepcopy(model).requires_grad_(False)
    projector = tuned.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-3)
    pruned = PrunedModel(tuned, spec, tokenizer)
    tuned.train()
    clips = range(TRAINING, TRAINING + steps * BATCH // 6)
    with pruned.attach():
        for step, (batch, _) in enumerate(batches(tokenizer, clips, answers=True)):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * (1 - step / steps)
            loss = tuned(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
    tuned.eval()
    return pruned


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--steps", type=int, default=120, help="of 60 questions; 0 leaves recalibration out")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tuned-at", type=int, nargs="*", default=(16,))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    dense = accuracy(PrunedModel(model, PruningSpec(), tokenizer), tokenizer, options.clips)
    print(f"\ndense {dense:.1f} % of {6 * options.clips} questions\n", flush=True)
    tuned_at = [keep for keep in options.tuned_at if options.steps]
    heads = [f"{keep} of 144" for keep in BUDGETS] + [f"{keep}, recalibrated" for keep in tuned_at]
    print("| " + " | ".join(["method", *heads]) + " |")
    print("|---|" + "---:|" * len(heads))
    for name in options.methods:
        row = [name]
        for keep in BUDGETS:
            spec = PruningSpec(name, keep, scope="image")
            row.append(f"{accuracy(PrunedModel(model, spec, tokenizer), tokenizer, options.clips):.1f}")
        for keep in tuned_at:
            spec = PruningSpec(name, keep, scope="image")
            row.append(f"{accuracy(recalibrated(model, spec, tokenizer, options.steps), tokenizer, options.clips):.1f}")
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
