"""Tokenizers of Llama's kind in the forms that transformers loads them in, and processors of LLaVA's with them."""

import hashlib
import importlib.util
import json
import os
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("published", "rebuilt, legacy", "rebuilt")
"""Prepend and Replace as in the files; Metaspace as transformers builds it anew of them, legacy true and false."""
GOLDEN_HASH = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: where is the red circle? ASSISTANT: top left",
    "Yes, 42 of them; déjà vu? Provide the bounding box coordinate of the region this sentence describes: a  dog",
    "Answer the question using a single word or phrase.\nReference OCR token: STOP, 7",
] * 3


def trained():
    """A small BPE with byte fallback, its spaces in front of words, as SentencePiece trains it."""
    own = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = normalizers.Replace(" ", "▁")
    own.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # a space only begins a token
    first = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    own.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=first, show_progress=False))
    vocabulary, merges = own.get_vocab(), _merges(own)
    return models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _merges(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def golden_file():
    """Return the bytes of the SentencePiece model that the golden ids were made with; None if it is nowhere.

    It is a file of the package mistral-common 1.12, which must not be installed beside ours: it needs an older NumPy,
    and without what it depends on transformers can't be imported. So `make test` fetches the wheel and leaves it
    packed. GOLDEN_TOKENIZER names the file, where it was unpacked.
    """
    found = None
    wheel = ROOT / "build" / "wheels" / "mistral_common-1.12.0-py3-none-any.whl"
    if "GOLDEN_TOKENIZER" in os.environ:
        found = Path(os.environ["GOLDEN_TOKENIZER"]).read_bytes()
    elif installed := importlib.util.find_spec("mistral_common"):
        path = Path(installed.origin).parent / "data" / "tokenizer.model.v1"
        found = path.read_bytes() if path.is_file() else None
    elif wheel.is_file():
        with zipfile.ZipFile(wheel) as files:
            found = files.read("mistral_common/data/tokenizer.model.v1")
    return found if found is not None and hashlib.sha256(found).hexdigest() == GOLDEN_HASH else None


def golden(content):
    """The model as transformers 4.37 wrote it to a tokenizer.json: merges in the order of scores."""
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

    model = sentencepiece.ModelProto()
    model.ParseFromString(content)
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = [piece.score for piece in model.pieces]
    ranked = []
    for whole, number in ids.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[number], number, ids[left], ids[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    return models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def spaced(first=False):
    """The small BPE with pieces of two and three spaces, merged behind all others; or first, as by their ids."""
    own = json.loads(Tokenizer(trained()).to_str())["model"]
    ids = own["vocab"]
    for piece in ("▁▁", "▁▁▁"):
        ids[piece] = len(ids)
    spaces = [("▁", "▁"), ("▁▁", "▁"), ("▁", "▁▁")]
    words = [tuple(pair) for pair in own["merges"]]
    merges = spaces + words if first else words + spaces
    return models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def sentence_pieces(model):
    """A tokenizer.model of a BPE, written by protobuf: scores fall with the rank of the merge, those of spaces last."""
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

    own = json.loads(Tokenizer(model).to_str())["model"]
    ranks = {}
    for left, right in own["merges"]:
        ranks.setdefault(left + right, len(ranks))
    written = sentencepiece.ModelProto()
    for piece, _ in sorted(own["vocab"].items(), key=lambda pair: pair[1]):
        blank = not piece.strip("▁")
        written.pieces.add(piece=piece, score=-1e9 if blank else -float(ranks.get(piece, 0)))
    written.trainer_spec.model_type = 2
    return written.SerializeToString()


def tokenizer(model, form="published"):
    """Return a BPE model as a tokenizer in one of the forms."""
    own = Tokenizer(model)
    if form == "published":
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if form == "rebuilt, legacy" else "first"
        own.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    own.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    own.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<image>", "<pad>")])
    own.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def clip_images(side, **options):
    """Return CLIP's image processor with the published means, for pictures of a side."""
    settings = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    return CLIPImageProcessor(**settings | options)


def llava(own, side=56, images=None):
    """Return LLaVA-1.5's processor with such a tokenizer; its pictures are (side / 14) ** 2 tokens."""
    return LlavaProcessor(
        clip_images(side) if images is None else images,
        own,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
