"""Bad inputs for every command: what each of them prints and how it ends. Part of ``benchmarks/reliability.py``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY_VLM = ROOT / "assets" / "tiny_vlm"

Make = Callable[[Path], list[str]]
"""Writes the bad input into a folder of its own, and returns the command line."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        verdict: "one line", "list of errors" (a configuration), "report" (`data check`), "accepted" or "TRACEBACK".
        text: what it said, or where it broke.
    """

    verdict: str
    text: str

    @property
    def readable(self) -> bool:
        """Whether a person is told in words."""
        return self.verdict in ("one line", "list of errors", "report")


@dataclass(frozen=True)
class Case:
    """One bad input."""

    name: str
    make: Make


def run(arguments: list[str]) -> Outcome:
    """Run a command line in this process; ``train`` in front of it is the trainer, as a rank runs it."""
    from prunetune.cli import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if arguments[0] == "train":
                from prunetune.train.recalibrate import main as train

                train(arguments[1:])
            else:
                main(arguments)
    except SystemExit as stop:
        return _ended(stop.code, out.getvalue(), err.getvalue())
    except BaseException:
        return Outcome("TRACEBACK", traceback.format_exc())
    return Outcome("accepted", "")


def _ended(code: object, out: str, err: str) -> Outcome:
    if code in (0, None):
        return Outcome("accepted", "")
    if isinstance(code, str):
        return _said(code)
    if "FAILED: " in out:
        return Outcome("report", out[out.index("FAILED: ") :].strip())
    found = [line for line in err.splitlines() if line.startswith("error")]
    return _said(found[-1]) if found else Outcome("TRACEBACK", f"exit {code} without a word\n{out}{err}")


def _said(text: str) -> Outcome:
    lines = text.strip().splitlines()
    if not text.startswith("error") or any("Traceback" in line for line in lines):
        return Outcome("TRACEBACK", text)
    if len(lines) == 1:
        return Outcome("one line", text)
    # All errors of a configuration are told at once, each in a line of its own.
    listed = all(line.startswith("  ") for line in lines[1:])
    return Outcome("list of errors" if listed else "TRACEBACK", text)


class World:
    """A folder with one good input of every kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images" / "vg").mkdir(parents=True)
        Image.new("RGB", (84, 84), (200, 30, 30)).save(folder / "images" / "vg" / "good.png")
        records = []
        for number in range(4):
            said = [{"from": "human", "value": "<image>\nwhat is red ?"}, {"from": "gpt", "value": "circle"}]
            records.append({"id": f"{number}", "image": "vg/good.png", "conversations": said})
        self.records = records
        self.write("mix.json", json.dumps(records))
        self.write("mix.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        self.write("recipe.yaml", "name: mine\nformat: llava_json\nsources: [vg]\nweights: {vg: 1.0}\nseed: 0\n")
        model = f"model: {{path: {TINY_VLM}, dtype: float32}}\npruning:\n  pruner: %s\n  keep: 16\n  options: {{}}\n"
        self.write("recalibrate.yaml", model % "divprune" + "data: {recipe: tiny_world}\noutput: recalibrated\n")
        self.write(
            "evaluate.yaml", model % "divprune" + "tasks: [tiny_world_validation]\nlimit: 4\noutput: evaluated\n"
        )
        self.write(
            "quoted.yaml",
            "- {arm: theirs, kept: 64, values: {tiny_world_validation/accuracy: 61.9}, cite: 'their table 1'}\n",
        )
        self.write("template.jinja", (ROOT / "data_recipes" / "templates" / "vicuna_v1.jinja").read_text())
        self.write("plugin.py", "x = 1\n")
        self.write("zero.json", (ROOT / "configs" / "deepspeed" / "zero2.json").read_text())
        self._gqa()
        self._parquet()
        self._arms()
        self._adapter()

    def write(self, name: str, text: str) -> Path:
        """Write a text file and return it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def file(self, name: str) -> str:
        """Return the path of a good input."""
        return str(self.folder / name)

    def _gqa(self) -> None:
        questions = {
            "1": {"question": "what is red ?", "imageId": "1", "answer": "circle", "types": {"structural": "query"}}
        }
        self.write("gqa/testdev_balanced_questions.json", json.dumps(questions))
        line = {"question_id": "1", "image": "1.jpg", "text": "what is red ?", "category": "default"}
        self.write("gqa/llava_gqa_testdev_balanced.jsonl", json.dumps(line) + "\n")
        self.write("predictions.jsonl", json.dumps({"question_id": "1", "text": "circle", "prompt": "?"}) + "\n")

    def _parquet(self) -> None:
        from datasets import Dataset
        from datasets import Image as ImageColumn

        rows = []
        for record in self.records:
            rows.append({**record, "image": Image.new("RGB", (8, 6))})
        Dataset.from_list(rows).cast_column("image", ImageColumn()).to_parquet(self.folder / "mix.parquet")

    def _arms(self) -> None:
        for name, pruner, keep in (("dense", "identity", "100%"), ("pruned", "divprune", "16")):
            arguments = ["--config", self.file("evaluate.yaml"), "--pruning.pruner", pruner, "--pruning.keep", keep]
            done = run(["evaluate", *arguments, "--output", self.file(name)])
            assert done.verdict == "accepted", done.text

    def _adapter(self) -> None:
        from prunetune import Arm, ModelConfig, RecalibrateConfig, load_config
        from prunetune.data_recipes import load_recipe
        from prunetune.models import wrap_projector, write_adapter
        from prunetune.train.record import run_record
        from prunetune.train.trainer import gathered_projector

        arm = Arm.load(ModelConfig(path=str(TINY_VLM), dtype="float32"), device="cpu")
        config = load_config(RecalibrateConfig, self.folder / "recalibrate.yaml")
        data = load_recipe("custom", file=self.file("mix.json"), image_root=self.file("images"))
        peft_model = wrap_projector(arm.model)
        for name, parameter in peft_model.named_parameters():
            parameter.requires_grad_("modules_to_save" in name)
        tensors = gathered_projector(peft_model)
        record = run_record(config, data, arm, tensors, 1, None)
        write_adapter(self.folder / "adapter", tensors, peft_model, record)


# ---- files of every kind, and what may happen to a file ----------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        source: the good one, in the world; where it lies in a folder that is read whole, that folder is copied.
        whole: that folder, or None.
        line: the command line that reads it, given the copy (of the file, or of the folder).
    """

    name: str
    source: str
    line: Callable[[World, str], list[str]]
    whole: str | None = None

    def copied(self, world: World, folder: Path) -> tuple[Path, list[str]]:
        """Copy the good file; return it and the command line that reads the copy."""
        if self.whole is None:
            copy = folder / Path(self.source).name
            shutil.copy(world.folder / self.source, copy)
            return copy, self.line(world, str(copy))
        whole = folder / Path(self.whole).name
        shutil.copytree(world.folder / self.whole, whole)
        return whole / Path(self.source).relative_to(self.whole), self.line(world, str(whole))


def _trained_on(world: World, file: str) -> list[str]:
    return ["calibrate", "--config", world.file("recalibrate.yaml"), "--count", "1", "--data.recipe", "custom",
            "--data.file", file, "--data.image_root", world.file("images")]  # fmt: skip


def _checked(world: World, recipe: str) -> list[str]:
    return ["data", "check", "--recipe", recipe, "--file", world.file("mix.json"), "--image-root", world.file("images")]


def _with_images(world: World, images: str) -> list[str]:
    return ["data", "check", "--recipe", "custom", "--file", world.file("mix.json"), "--image-root", images]


def _model(world: World, folder: str) -> list[str]:
    return ["calibrate", "--config", world.file("recalibrate.yaml"), "--count", "1", "--model.path", folder]


def _exported(world: World, adapter: str) -> list[str]:
    return ["export", "--model", str(TINY_VLM), "--adapter", adapter, "--output", f"{adapter}_exported"]


def _compared(world: World, arm: str) -> list[str]:
    return ["compare", world.file("dense"), arm, "--output", f"{arm}_table"]


KINDS = [
    Kind("evaluate's configuration", "evaluate.yaml", lambda world, file: ["evaluate", "--config", file]),
    Kind("recalibrate's configuration", "recalibrate.yaml", lambda world, file: ["recalibrate", "--config", file]),
    Kind("recipe", "recipe.yaml", _checked),
    Kind("JSON data", "mix.json", _trained_on),
    Kind("JSONL data", "mix.jsonl", _trained_on),
    Kind("Parquet data", "mix.parquet", _trained_on),
    Kind("image", "images/vg/good.png", _with_images, whole="images"),
    Kind("adapter's record", "adapter/prunetune.json", _exported, whole="adapter"),
    Kind("adapter's weights", "adapter/adapter_model.safetensors", _exported, whole="adapter"),
    Kind("manifest", "pruned/manifest.json", _compared, whole="pruned"),
    Kind("results", "pruned/results.jsonl", _compared, whole="pruned"),
    Kind(
        "quoted rows",
        "quoted.yaml",
        lambda world, file: ["compare", world.file("dense"), "--output", f"{file}_table", "--quoted", file],
    ),
    Kind(
        "predictions",
        "predictions.jsonl",
        lambda world, file: ["score", "gqa", "--predictions", file, "--data", world.file("gqa")],
    ),
    Kind(
        "annotations",
        "gqa/testdev_balanced_questions.json",
        lambda world, folder: ["score", "gqa", "--predictions", world.file("predictions.jsonl"), "--data", folder],
        whole="gqa",
    ),
]


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 3 // 5])


def _into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "is empty": lambda file: file.write_bytes(b""),
    "is cut short": _cut,
    "is no text": lambda file: file.write_bytes(b"\xff\xfe\x00\x93" * 20),
    "holds a list": lambda file: file.write_text("[1, 2]"),
    "holds a number": lambda file: file.write_text("7"),
    "is a folder": _into_folder,
    "is missing": Path.unlink,
}


def _damaged(world: World, kind: Kind, damage: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> list[str]:
        file, line = kind.copied(world, folder)
        damage(file)
        return line

    return make


def file_cases(world: World) -> Iterator[Case]:
    """Yield every kind of file with every damage."""
    for kind in KINDS:
        for damage, change in DAMAGES.items():
            yield Case(f"{kind.name} {damage}", _damaged(world, kind, change))


# ---- one thing wrong in a file that is otherwise good ------------------------------------------------------------


def _conversation(*turns: tuple[str, object], **fields: object) -> dict[str, object]:
    said = [{"from": who, "value": what} for who, what in turns]
    return {"id": "bad", "image": "vg/good.png", "conversations": said, **fields}


ASKED, ANSWERED = ("human", "<image>\nwhat ?"), ("gpt", "red")
RECORDS: dict[str, object] = {
    "a record is a number": 3,
    "a record has no conversation": {"id": "bad", "image": "vg/good.png"},
    "a conversation is text": {"id": "bad", "conversations": "hello"},
    "a conversation has odd length": _conversation(ASKED, ANSWERED, ("human", "and ?")),
    "a conversation is one gpt message": _conversation(ANSWERED),
    "a conversation has two questions in a row": _conversation(ASKED, ("human", "what ?")),
    "a message is a number": _conversation(ASKED, ("gpt", 7)),
    "a message's sender is a list": _conversation(ASKED, (["gpt"], "red")),  # type: ignore[arg-type]
    "text alone holds <image>": _conversation(ASKED, ANSWERED, image=None),
    "<image> is missing": _conversation(("human", "what ?"), ANSWERED),
    "<image> is there twice": _conversation(("human", "<image> <image>"), ANSWERED),
    "an answer holds <image>": _conversation(ASKED, ("gpt", "<image>")),
    "<image> is in the second question": _conversation(("human", "a"), ANSWERED, ASKED, ANSWERED),
    "an image is a number": _conversation(ASKED, ANSWERED, image=3),
    "an image path climbs": _conversation(ASKED, ANSWERED, image="vg/../../../etc/passwd"),
    "an image path is absolute": _conversation(ASKED, ANSWERED, image="/etc/passwd"),
    "an image path is a folder": _conversation(ASKED, ANSWERED, image="vg"),
    "an image path is too long": _conversation(ASKED, ANSWERED, image="vg/" + "a" * 5000),
    "an image path holds a NUL": _conversation(ASKED, ANSWERED, image="vg/\0.png"),
    "an answer holds half a character": _conversation(ASKED, ("gpt", "\ud800")),
    "an id holds half a character": _conversation(ASKED, ANSWERED, id="\udfff"),
}


def record_cases(world: World) -> Iterator[Case]:
    """Yield data files with one record that is wrong, out of five; more than the tolerated share."""

    def make(record: object, suffix: str) -> Make:
        def write(folder: Path) -> list[str]:
            records = [*world.records, record]
            file = folder / f"mix{suffix}"
            lines = "".join(json.dumps(one) + "\n" for one in records)
            file.write_text(json.dumps(records) if suffix == ".json" else lines)
            return _trained_on(world, str(file))

        return write

    for name, record in RECORDS.items():
        for suffix in (".json", ".jsonl"):
            # The streaming parser writes "?" for half a character, so that nothing is wrong any more.
            if suffix == ".json" and "half a character" in name:
                continue
            yield Case(f"{name} ({suffix})", make(record, suffix))


RECIPES = {
    "names no format": "name: x\n",
    "names an unknown format": "name: x\nformat: lava_json\n",
    "has a number for a format": "name: x\nformat: 3\n",
    "has an unknown key": "name: x\nformat: llava_json\nwheights: {}\n",
    "has text for weights": "name: x\nformat: llava_json\nweights: many\n",
    "has a weight of 2": "name: x\nformat: llava_json\nweights: {vg: 2}\n",
    "has text for sources": "name: x\nformat: llava_json\nsources: vg\n",
    "has an unknown source": "name: x\nformat: llava_json\nsources: [flickr]\n",
    "has a list for a name": "name: [x]\nformat: llava_json\n",
    "has an impossible date": "name: x\nformat: llava_json\nseed: 2024-13-45\n",
    "has a tag of Python's": "name: !!python/object/apply:os.getcwd []\nformat: llava_json\n",
    "has tabs": "name: x\n\tformat: llava_json\n",
}


def recipe_cases(world: World) -> Iterator[Case]:
    """Yield recipes with one thing that is wrong."""

    def make(text: str) -> Make:
        def write(folder: Path) -> list[str]:
            (folder / "recipe.yaml").write_text(text)
            return _checked(world, str(folder / "recipe.yaml"))

        return write

    for name, text in RECIPES.items():
        yield Case(f"a recipe {name}", make(text))


ADAPTER: dict[str, object] = {"base_model": 3, "frozen_hash": None, "pruning": [1]}
MANIFEST: dict[str, object] = {"format": 99, "model": None, "pruning": [], "tasks": [], "projector": 3, "metrics": None}
ROW: dict[str, object] = {"score": "good", "kept": 1.5, "id": 7, "prediction": None}


def _edited(world: World, kind: Kind, name: str, value: object) -> Make:
    def make(folder: Path) -> list[str]:
        file, line = kind.copied(world, folder)
        first, *rest = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        content = json.loads(first)
        content[name] = value
        file.write_text("\n".join([json.dumps(content), *rest]) + "\n")
        return line

    return make


def edited_cases(world: World) -> Iterator[Case]:
    """Yield records, manifests and rows with one field of another type."""
    kinds = {kind.name: kind for kind in KINDS}
    for name, fields in (("adapter's record", ADAPTER), ("manifest", MANIFEST), ("results", ROW)):
        for field, value in fields.items():
            yield Case(f"{name}: {field} is {value!r}", _edited(world, kinds[name], field, value))


# ---- options -----------------------------------------------------------------------------------------------------


def option_cases(world: World) -> Iterator[Case]:
    """Yield command lines with a wrong option."""
    calibrate = ["calibrate", "--config", world.file("recalibrate.yaml"), "--count", "1"]
    mix, images = world.file("mix.json"), world.file("images")
    check = _with_images(world, world.file("images"))
    options = {
        "an unknown pruner": ["--pruning.pruner", "divprun"],
        "an unknown option of a pruner": ["--pruning.options", "{powr: 1}"],
        "text for a pruner's number": ["--pruning.pruner", "prismprune", "--pruning.options", "{pool_factor: abc}"],
        "a list for a pruner's number": ["--pruning.pruner", "prismprune", "--pruning.options", "{salient_ratio: [1]}"],
        "true for a pruner's number": ["--pruning.pruner", "prismprune", "--pruning.options", "{pool_factor: true}"],
        "a pruner's share of 7": ["--pruning.pruner", "prismprune", "--pruning.options", "{salient_ratio: 7}"],
        "a budget of 0": ["--pruning.keep", "0"],
        "a budget beyond all tokens": ["--pruning.keep", "9999"],
        "text for a budget": ["--pruning.keep", "many"],
        "flash attention on a CPU": ["--model.attention", "flash_attention_2", "--model.dtype", "bfloat16"],
        "an unknown attention": ["--model.attention", "fast"],
        "a model that is not there": ["--model.path", "no/such/model"],
        "a model with a strange name": ["--model.path", "a b/c d"],
        "a model that is a file": ["--model.path", world.file("mix.json")],
        "a model folder that is empty": ["--model.path", world.file("images")],
        "an unknown template": ["--model.template", "vicuna"],
        "an unknown recipe": ["--data.recipe", "vgg"],
        "a data file that is not there": ["--data.recipe", "custom", "--data.file", "no.json"],
        "a data file of another kind": ["--data.recipe", "custom", "--data.file", world.file("quoted.yaml")],
        "an image folder that is a file": [
            "--data.recipe", "custom", "--data.file", mix, "--data.image_root", mix,
        ],
        "a share of 3": ["--data.max_missing", "3"],
        "a limit of 0 pixels": ["--data.max_pixels", "0"],
        "images above the limit": [
            "--data.recipe", "custom", "--data.file", mix, "--data.image_root", images, "--data.max_pixels", "100",
        ],
        "a section that is a number": ["--data", "3"],
        "an unknown section": ["--dta.recipe", "x"],
        "an option without a value": ["--data.recipe"],
        "an impossible date": ["--data.recipe", "2024-13-45"],
        "half a YAML list": ["--pruning.options", "[1,"],
        "a plug-in that is not there": ["--plugins", "[no_such_module]"],
        "a count of 0": ["--count", "0"],
        "a batch of none": ["--batch-size", "0"],
    }  # fmt: skip
    for name, more in options.items():
        yield Case(name, lambda folder, more=more: [*calibrate, *more])  # type: ignore[misc]
    lines = {
        "no configuration": ["evaluate", "--config", "no.yaml"],
        "a configuration without a name": ["evaluate", "--config", ""],
        "a configuration with a long name": ["evaluate", "--config", "a" * 5000],
        "no option at all": ["evaluate"],
        "no number for a pruner's number": [
            "evaluate", "--config", world.file("evaluate.yaml"), "--pruning.pruner", "adaptive",
            "--pruning.options", "{tau_max: .nan}",
        ],
        "an unknown task": ["evaluate", "--config", world.file("evaluate.yaml"), "--tasks", "[gqaa]"],
        "a task without its data": ["evaluate", "--config", world.file("evaluate.yaml"), "--tasks", "[gqa]"],
        "an adapter that is not there": _exported(world, "no_adapter"),
        "an arm that is not there": ["compare", "no_arm"],
        "a configuration for calibrate's profile": [
            "calibrate", "--config", "recalibrate/tiny_adaptive_16", "--overwrite",
            "--profile", world.file("evaluate.yaml"),
        ],
        "a profile that is not there": [
            "evaluate", "--config", world.file("evaluate.yaml"), "--pruning.profile", "no.json",
        ],
        "a profile that is something else": [
            "evaluate", "--config", world.file("evaluate.yaml"), "--pruning.profile", world.file("evaluate.yaml"),
        ],
        "an unknown command": ["recalibrat"],
        "no image to draw": ["visualize", "--count", "0"],
        "a grader without an address": [
            "score", "gqa", "--predictions", world.file("predictions.jsonl"), "--data", world.file("gqa"),
            "--grader", "nonsense",
        ],
        "a module to train that is not there": [
            "train", "--config", world.file("recalibrate.yaml"), "--train.trainable", "[nothing]",
        ],
        "more workers than none": [*check, "--num-proc", "0"],
        "an unknown kind of list": ["list", "pruner"],
        "a broken plug-in": ["list", "pruners", "--plugins", world.file("mix.json") + ".py"],
        "a recipe that draws": ["data", "check", "--recipe", "tiny_world"],
    }  # fmt: skip
    for name, line in lines.items():
        yield Case(name, lambda folder, line=line: line)  # type: ignore[misc]


# ---- models, templates, images -----------------------------------------------------------------------------------


def model_cases(world: World) -> Iterator[Case]:
    """Yield model folders with a file that is missing, cut short or of another kind."""

    def make(name: str, change: Callable[[Path], object]) -> Make:
        def write(folder: Path) -> list[str]:
            shutil.copytree(TINY_VLM, folder / "model")
            change(folder / "model" / name)
            return _model(world, str(folder / "model"))

        return write

    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
    ):
        if not (TINY_VLM / name).is_file():
            continue
        for damage in ("is empty", "is cut short", "is no text", "holds a list"):
            yield Case(f"a model's {name} {damage}", make(name, DAMAGES[damage]))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        yield Case(f"a model's {name} is missing", make(name, DAMAGES["is missing"]))

    def hashed(folder: Path) -> list[str]:
        shutil.copytree(TINY_VLM, folder / "model")
        (folder / "model" / "extra.safetensors").write_bytes(b"no weights")
        return ["export", "--model", str(folder / "model"), "--adapter", world.file("adapter"), "--output", "exported"]

    yield Case("a model with a broken file beside it", hashed)

    def towered(folder: Path) -> list[str]:
        shutil.copytree(TINY_VLM / "clip", folder / "clip")
        (folder / "clip" / "model.safetensors").write_bytes(b"no weights")
        line = ["evaluate", "--config", world.file("evaluate.yaml"), "--output", "out", "--pruning.pruner", "cdpruner"]
        return [*line, "--pruning.text_tower", str(folder / "clip")]

    yield Case("a text tower with broken weights", towered)


def template_cases(world: World) -> Iterator[Case]:
    """Yield chat templates and images that can't be used."""
    texts = {"is no Jinja": b"{% for %}", "is no text": b"\xff\xfe", "asks for what is not there": b"{{ a.b.c }}"}
    for name, content in texts.items():

        def write(folder: Path, content: bytes = content) -> list[str]:
            (folder / "own.jinja").write_bytes(content)
            return [*_trained_on(world, world.file("mix.json")), "--model.template", str(folder / "own.jinja")]

        yield Case(f"a chat template {name}", write)

    def huge(folder: Path) -> list[str]:
        (folder / "vg").mkdir()
        Image.new("1", (12_000, 12_000)).save(folder / "vg" / "good.png")  # 18 KB on disk, 432 MB as RGB
        return _with_images(world, str(folder))

    yield Case("an image of 144 megapixels", huge)


def deepspeed_cases(world: World) -> Iterator[Case]:
    """Yield DeepSpeed files that are broken, as the trainer reads them."""
    line = ["train", "--config", world.file("recalibrate.yaml"), "--data.max_samples", "8", "--train.deepspeed"]
    for name, damage in DAMAGES.items():

        def write(folder: Path, damage: Callable[[Path], object] = damage) -> list[str]:
            shutil.copy(world.file("zero.json"), folder / "zero.json")
            damage(folder / "zero.json")
            return [*line, str(folder / "zero.json"), "--output", str(folder / "out")]

        yield Case(f"DeepSpeed's file {name}", write)


def cases(world: World) -> list[Case]:
    """Return all bad inputs."""
    found: list[Case] = []
    for some in (file_cases, record_cases, recipe_cases, edited_cases, option_cases, model_cases, template_cases):
        found += some(world)
    return [*found, *deepspeed_cases(world)]


def try_case(case: Case, folder: Path) -> Outcome:
    """Run one bad input in a folder of its own, which is the working directory meanwhile."""
    folder.mkdir(parents=True)
    arguments = case.make(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return run(arguments)
    finally:
        os.chdir(before)
