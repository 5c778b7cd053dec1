"""Samples a second on one core from a recipe's row to a batch, beside yardsticks measured in the same run.

    OMP_NUM_THREADS=1 python benchmarks/data_path.py [--samples 128] [--rows 180510] [--output FILE.md]

The samples have the shape of PrismPrune's mix (VG 48 %, GQA 40 %, TextCaps 12 %: 8 to 9 turns, about 360 text tokens),
with JPEGs of 500 x 375 and 1024 x 768 drawn here, LLaVA's v1 prompt and a tokenizer of Llama's kind with 32,000 words.
Yardsticks: decoding alone; decoding, padding and Pillow's resize; and the chat template and the model's own processor
with transformers' own search for the assistant's tokens, which is what ran before there was another way. Batches of
the new way are first compared with those, bit for bit. Then a recipe of --rows rows is read cold and warm.

Bars: 150 samples/s a core; a warm start of 180,510 rows in 5 s.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import re
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
SCRATCH = tempfile.TemporaryDirectory(prefix="prunetune-data-path-")
os.environ["HF_DATASETS_CACHE"] = str(Path(SCRATCH.name) / "cache")  # a cold start must be cold

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers  # noqa: E402
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast  # noqa: E402

from prunetune.data_recipes import Formatter, RecipeData, Sample, Turn, load_recipe  # noqa: E402
from prunetune.data_recipes.images import StoredImages, pad_to_square  # noqa: E402
from prunetune.data_recipes.lengths import text_lengths  # noqa: E402
from prunetune.data_recipes.pixels import mean_color  # noqa: E402
from prunetune.data_recipes.segments import SYSTEM  # noqa: E402

REGION = "Please provide a short description for this region"
CAPTION = "Provide a one-sentence caption for the provided image.\nReference OCR token"
SHORT = "Answer the question using a single word or phrase."
SIDE, BATCH, WORDS = 336, 16, 32_000
SIZES = ((500, 375), (1024, 768))
PASSES = 5
BAR, START_BAR = 150, 5.0
EARLIER = "chat template and processor (earlier)"


class Files(StoredImages):
    """JPEGs in memory: a disk is no part of what is measured."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def exists(self, reference: str) -> bool:
        """Return True: all are there."""
        return True

    def open(self, reference: str, sample_id: str) -> Image.Image:
        """Return the decoded picture."""
        return self.decode(io.BytesIO(self.files[int(reference)]), sample_id)


def words_of(chance: random.Random) -> list[str]:
    """Return made-up words whose lengths are English's."""
    letters = "etaoinshrdlu" * 3 + string.ascii_lowercase
    found: set[str] = set()
    while len(found) < 5_000:
        found.add("".join(chance.choice(letters) for _ in range(chance.choice((2, 3, 3, 4, 4, 5, 6, 7, 8, 9)))))
    return sorted(found)


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of Llama's kind: BPE with byte fallback, spaces in front, 32,000 entries."""
    ids = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    for byte in range(256):
        ids.setdefault(f"<0x{byte:02X}>", len(ids))
    for character in ["▁", *string.ascii_letters, *string.digits, *string.punctuation]:
        ids.setdefault(character, len(ids))
    merges: list[tuple[str, str]] = []
    # Every word is merged letter by letter from its front, first without and then with the space; the prompt's first.
    prompts = re.findall("[A-Za-z]+", f"{SYSTEM} {REGION} {CAPTION} {SHORT} USER ASSISTANT")
    for word in [*prompts, *words]:
        for whole in (word, f"▁{word}"):
            for cut in range(1, len(whole)):
                left, right = whole[:cut], whole[cut]
                if len(ids) < WORDS - 2 and left in ids and left + right not in ids:
                    ids[left + right] = len(ids)
                    merges.append((left, right))
    own = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>"):
        own.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def processor_of(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return LLaVA-1.5's processor: CLIP's at 336 px, 576 tokens a picture."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip


def jpegs(number: int) -> list[bytes]:
    """Return JPEGs of both sizes, quality 88, with coarse shapes and fine noise as photographs have them."""
    files = []
    for index in range(number):
        width, height = SIZES[index % 8 == 7]  # one in eight is large, as TextCaps' are
        chance = np.random.default_rng(index)
        coarse = chance.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + chance.integers(-24, 25, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=88)
        files.append(file.getvalue())
    return files


def conversation_of(number: int, words: list[str]) -> tuple[str, list[Turn]]:
    """Return source and turns of a sample of the mix's shape."""
    chance = random.Random(number)

    def text(count: int) -> str:
        return " ".join(chance.choice(words) for _ in range(count))

    draw = chance.random()
    if draw < 0.48:  # region descriptions and boxes
        turns = []
        for _ in range(chance.randint(3, 10)):
            box = ", ".join(f"0.{chance.randrange(100):02d}" for _ in range(4))
            turns.append(Turn(f"{REGION}: [{box}].", text(5)))
        return "vg", turns
    if draw < 0.88:  # one question after another
        return "gqa", [Turn(f"{text(7)}?", chance.choice(words)) for _ in range(chance.randint(7, 15))]
    return "textvqa", [Turn(f"{CAPTION}: {text(20)}", text(12))]


def samples_of(number: int, words: list[str]) -> list[Sample]:
    """Return samples about the first ``number`` pictures."""
    samples = []
    for index in range(number):
        source, turns = conversation_of(index, words)
        turns[0] = Turn(f"{turns[0].question}\n{SHORT}", turns[0].answer)
        samples.append(Sample(f"{index}", source, f"{index}", tuple(turns)))
    return samples


def earlier(formatter: Formatter, samples: list[Sample]) -> dict[str, Any]:
    """Return a batch by the chat template and the processor alone, mask by transformers' own search."""
    conversations = []
    for sample in samples:
        messages: list[dict[str, Any]] = []
        image = pad_to_square(formatter.images.open(str(sample.image), sample.id), mean_color(formatter.processor))
        for number, turn in enumerate(sample.turns):
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
            if number == 0:
                content.insert(0, {"type": "image", "image": image})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        conversations.append(messages)
    batch = dict(
        formatter.processor.apply_chat_template(
            conversations,
            chat_template=formatter.template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
    )
    mask = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()
    batch["labels"] = batch["input_ids"].masked_fill(~mask, -100)
    return batch


def seconds_of(function: Callable[[list[Sample]], object], samples: list[Sample]) -> float:
    """Return the CPU time of one pass in batches."""
    start = time.process_time()
    for first in range(0, len(samples), BATCH):
        function(samples[first : first + BATCH])
    return time.process_time() - start


def measure(number: int) -> list[tuple[str, float]]:
    """Return samples a second of every way.

    Raises:
        AssertionError: if the new way's batches are not those of the earlier one.
    """
    words = words_of(random.Random(0))
    processor = processor_of(tokenizer_of(words))
    files = Files(jpegs(number))
    samples = samples_of(number, words)
    fast = Formatter(processor, files, "vicuna_v1", "pad")
    raw = Formatter(processor, files, "vicuna_v1", "pad", raw_pixels=True)
    assert fast.segments is not None and fast.pictures.fast is not None
    text = 0
    for first in range(0, len(samples), BATCH):
        some = samples[first : first + BATCH]
        expected = earlier(fast, some)
        for batch in (fast.training_batch(some), raw.finish(raw.training_batch(some))):
            for name, values in expected.items():
                assert torch.equal(batch[name], values), name
        text += int(expected["attention_mask"].sum()) - 576 * len(some)
    turns = sum(len(sample.turns) for sample in samples) / number
    print(f"{number} samples: {turns:.1f} turns and {text / number:.0f} text tokens on average; all batches bit-equal")
    color = mean_color(processor)

    def decode(some: list[Sample]) -> None:
        for sample in some:
            files.open(str(sample.image), sample.id)

    def resize(some: list[Sample]) -> None:
        for sample in some:
            image = pad_to_square(files.open(str(sample.image), sample.id), color)
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    by_template = Formatter(processor, files, "vicuna_v1", "pad")
    by_template.__dict__["segments"] = None  # the way of every other template
    ways: dict[str, Callable[[list[Sample]], object]] = {
        "JPEG decoding alone": decode,
        "decoding, padding, Pillow's resize": resize,
        EARLIER: lambda some: earlier(fast, some),
        "chat template, masks at once, two passes": by_template.training_batch,
        "segments, two passes, float32": fast.training_batch,
        "segments, two passes, uint8": raw.training_batch,
    }
    # In turns, and the best pass of each counts: other processes then slow all of them alike.
    best = {EARLIER: seconds_of(ways[EARLIER], samples)}
    for _ in range(PASSES):
        for name in ways.keys() - {EARLIER}:
            best[name] = min(best.get(name, float("inf")), seconds_of(ways[name], samples))
    return [(name, number / best[name]) for name in ways]


def write_world(folder: Path, rows: int) -> tuple[Path, Path]:
    """Write a data file of so many rows and empty files for its images; return file and image root."""
    words = words_of(random.Random(0))
    folders = {"vg": ("vg/VG_100K", "vg/VG_100K_2"), "gqa": ("gqa/images",), "textvqa": ("textvqa/train_images",)}
    for names in folders.values():
        for name in names:
            (folder / name).mkdir(parents=True)
    some = [conversation_of(number, words) for number in range(2_000)]
    with (folder / "mix.json").open("w") as file:
        for number in range(rows):
            source, turns = some[number % len(some)]
            names = folders[source]
            image = f"{names[number % len(names)]}/{number * 5 // 8}.jpg"  # several conversations share a picture
            (folder / image).touch()
            messages: list[dict[str, Any]] = []
            for turn in turns:
                messages += [{"from": "human", "value": turn.question}, {"from": "gpt", "value": turn.answer}]
            messages[0]["value"] = f"<image>\n{messages[0]['value']} {number}"
            record: dict[str, Any] = {"id": str(number), "image": image, "conversations": messages}
            file.write(("[" if number == 0 else ",\n") + json.dumps(record))
        file.write("]")
    return folder / "mix.json", folder


def starts(rows: int) -> dict[str, tuple[float, float]]:
    """Return seconds, by the clock and of CPU time, of a cold and two warm starts and of all samples' lengths."""
    file, root = write_world(Path(SCRATCH.name) / "world", rows)
    time.sleep(3)  # listings of folders that were just written are not kept
    found: dict[str, tuple[float, float]] = {}
    data: RecipeData | None = None
    for name in ("cold: parsed, listed, hashed", "warm, first", "warm, second"):
        start = time.perf_counter(), time.process_time()
        data = load_recipe("vg_textvqa_gqa", file=str(file), image_root=str(root))
        found[f"load_recipe, {name}"] = time.perf_counter() - start[0], time.process_time() - start[1]
    assert data is not None and len(data) == rows
    words = words_of(random.Random(0))
    formatter = Formatter(processor_of(tokenizer_of(words)), data.images, "vicuna_v1", "pad")
    for name in ("first", "kept"):
        start = time.perf_counter(), time.process_time()
        text_lengths(data, formatter)
        found[f"text_lengths, {name}"] = time.perf_counter() - start[0], time.process_time() - start[1]
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rows", type=int, default=180_510, help="of the recipe that is read; 0 leaves it out")
    parser.add_argument("--output", type=Path, help="file for the tables, Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    speeds = measure(options.samples)
    earlier_speed = dict(speeds)[EARLIER]
    lines = [
        f"torch {torch.__version__}, one core of {os.cpu_count()}, {platform.machine()}, CPU time",
        "",
        "| way | ms a sample | samples/s a core | against earlier |",
        "|---|---|---|---|",
    ]
    for name, speed in speeds:
        lines.append(f"| {name} | {1000 / speed:.2f} | {speed:.0f} | {speed / earlier_speed:.1f} x |")
    slowest = min(speed for name, speed in speeds if name.startswith("segments"))
    lines += ["", f"bar {BAR} samples/s: {'met' if slowest >= BAR else 'MISSED'} ({slowest:.0f})"]
    if options.rows:
        times = starts(options.rows)
        lines += ["", f"| {options.rows:,} rows | s | CPU s |", "|---|---|---|"]
        lines += [f"| {name} | {seconds:.2f} | {cpu:.2f} |" for name, (seconds, cpu) in times.items()]
        warm = times["load_recipe, warm, second"][0]
        lines += ["", f"bar {START_BAR:g} s for a warm start: {'met' if warm <= START_BAR else 'MISSED'} ({warm:.2f})"]
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
