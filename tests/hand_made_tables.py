"""Tables made by hand, whose looks are known line by line."""

import numpy as np
from PIL import Image

from prunetune.evaluation.report.tables.layouts.examples import Answered, Example, Examples, Picture
from prunetune.evaluation.report.tables.table import Column, Difference, QuotedRow, Row, Table, Value

ACCURACY = Column(task="world", metric="accuracy", unit="%", about="share of right answers", items=1200)
POPE = Column(task="pope", metric="f1", unit="%", about="F1 of yes, images are drawn", items=9000)
POPE_ACCURACY = Column(task="pope", metric="accuracy", unit="%", about="share of right", items=9000, headline=False)
MME = Column(task="mme", metric="perception", unit="points", about="sum of ten kinds, pairs are drawn", items=2114)
CHAIR = Column(task="chair", metric="chairs", unit="%", about="captions with an object that is not there", items=500,
               higher=False)  # fmt: skip
CIDER = Column(task="coco", metric="cider", unit="score", about="of the whole set", items=5000)
UPLOAD = Column(task="vqav2", metric="accuracy", unit="%", about="answers are hidden", items=107_394)

DENSE = {"id": "dense", "label": "dense", "model": "llava", "method": "dense", "budget": "", "kept": 576,
         "projector": "training-free"}  # fmt: skip
FREE = {"id": "free", "label": "divprune", "model": "llava", "method": "divprune", "budget": "64", "kept": 64,
        "projector": "training-free"}  # fmt: skip
TUNED = {**FREE, "id": "tuned", "label": "divprune + tuned projector", "projector": "tuned", "twin": "free"}


def value(number, low=None, high=None, **more):
    return Value(value=number, interval=None if low is None else (low, high), **more)


def one_benchmark(**more):
    """Three arms on one benchmark with two kinds of questions."""
    key = ACCURACY.key
    kinds = [{key: {"where": value(a), "what": value(b)}} for a, b in ((90, 80.25), (60, 41), (72, 50.5))]
    rows = [
        Row(**DENSE, values={key: value(85.125, 83, 87)}, by_type=kinds[0], relative=value(100)),
        Row(**FREE, values={key: value(50.5, 48, 53.04)}, by_type=kinds[1], relative=value(59.325)),
        Row(
            **TUNED,
            values={key: value(61.25, 59, 63.5)},
            by_type=kinds[2],
            relative=value(71.95),
            gains={key: Difference(value=10.75, interval=(8, 13.5), p=2e-9, adjusted=4e-9, test="McNemar, exact")},
        ),
    ]
    return Table(**{"title": "", "columns": [ACCURACY], "rows": rows, **more})


def many_benchmarks(**more):
    """Three arms over four benchmarks with all that a table can have, and a row from a paper."""
    columns = [POPE, POPE_ACCURACY, MME, CHAIR, CIDER, UPLOAD]
    hidden = value(None, note="hidden answers: vqav2_upload.json")

    def values(pope, accuracy, mme, chair, cider, spread=None):
        seeds = {} if spread is None else {"seeds": 3, "between": spread}
        return {
            POPE.key: value(pope, pope - 1, pope + 1, **seeds),
            POPE_ACCURACY.key: value(accuracy, accuracy - 1, accuracy + 1),
            MME.key: value(mme, mme - 20, mme + 20),
            CHAIR.key: value(chair, chair - 2, chair + 2),
            CIDER.key: value(cider, note="one score for the whole set"),
            UPLOAD.key: hidden,
        }

    rows = [
        Row(**DENSE, values=values(85.9, 86.5, 1506.5, 48.2, 1.105), relative=value(100), pooled=value(80.4, 79.9, 81),
            hard={POPE.task: value(61, 57, 65)}, costs={"TFLOPs": value(8.6), "prefill ms": value(48, 47, 49)},
            folders=["arms/dense"]),
        Row(**FREE, values=values(70.25, 73, 1205.5, 52.2, 0.95), relative=value(81.4, 80, 83),
            pooled=value(70, 69.4, 70.6), hard={POPE.task: value(40.1, 36, 44)},
            costs={"TFLOPs": value(1.4), "prefill ms": value(15, 14, 16)}, folders=["arms/free"],
            facts={"items": 11_114, "model": "llava-hf/llava-1.5-7b-hf", "profile": None}),
        Row(**TUNED, values=values(80.5, 81, 1402.25, 49, 1.051, spread=0.34), relative=value(92.84, 91.5, 94.2),
            pooled=value(75.5, 75, 76), hard={POPE.task: value(51, 47, 55)},
            costs={"TFLOPs": value(1.4), "prefill ms": value(15.2, 14, 16)},
            gains={POPE.key: Difference(value=10.25, interval=(9, 11.5), p=0.0004, adjusted=0.0008,
                                        test="paired permutation"),
                   MME.key: Difference(value=196.75, interval=(150, 240), p=0.02, adjusted=0.08,
                                       test="paired permutation")},
            relative_gain=Difference(value=11.44, interval=(10, 12.9), p=0.0123, adjusted=0.0246,
                                     test="paired permutation"),
            pooled_gain=Difference(value=5.5, interval=(5, 6)), folders=["arms/tuned-0", "arms/tuned-1"]),
    ]  # fmt: skip
    quoted = QuotedRow(label="DivPrune", model="llava", method="divprune", budget=64, cite="arXiv 2503.02175, table 1",
                       values={POPE.key: 70.1, MME.key: 1200.04}, relative=81, beside="free",
                       differences={POPE.key: 0.15, MME.key: 5.46})  # fmt: skip
    given = {"title": "Main table", "columns": columns, "rows": rows, "quoted": [quoted],
             "footnotes": ["arms may differ in device: cpu, cuda"]}  # fmt: skip
    return Table(**{**given, **more})


def renamed(table, text):
    """Return a table in which every name that a user or a plug-in gives holds a text."""
    columns = [column.model_copy(update={"about": text}) for column in table.columns]
    rows = [row.model_copy(update={"label": f"{row.label} {text}"}) for row in table.rows]
    quoted = [row.model_copy(update={"label": text, "cite": text}) for row in table.quoted]
    return table.model_copy(
        update={"title": text, "columns": columns, "rows": rows, "quoted": quoted, "footnotes": [text]}
    )


METHODS = ("fastervlm", "divprune", "visionzip", "promprune", "adaptive")
BUDGETS = (192, 128, 64)


def wide_table():
    """A dense arm and five methods at three budgets, tuned and not: as a paper's main table."""
    columns = [POPE, POPE_ACCURACY, MME, CHAIR, UPLOAD]
    random = np.random.default_rng(0)

    def row(share, costs, **fields):
        noise = iter(random.normal(0, 0.4, 5))
        own = {
            POPE.key: 85.9 * share + next(noise),
            POPE_ACCURACY.key: 86.5 * share + next(noise),
            MME.key: 1506 * share + 20 * next(noise),
            CHAIR.key: 48 / share + next(noise),
        }
        values = {key: value(number, number * 0.985, number * 1.015) for key, number in own.items()}
        values[UPLOAD.key] = value(None, note="hidden answers: vqav2_upload.json")
        relative = 100 * share
        return Row(
            values=values, relative=value(relative, relative - 1.1, relative + 1.1), facts={"items": 11_000},
            pooled=value(80 * share, 79.5 * share, 80.5 * share),
            costs={"TFLOPs": value(costs), "prefill ms": value(6 + 5 * costs, 5.7 + 5 * costs, 6.3 + 5 * costs)},
            **fields,
        )  # fmt: skip

    rows = [row(1, 8.6, **DENSE)]
    for place, method in enumerate(METHODS):
        for budget in BUDGETS:
            lost = (0.03 + 0.012 * place) * (192 / budget)
            tflops = 0.5 + 8.1 * budget / 576
            own = {"model": "llava", "method": method, "budget": str(budget), "kept": budget}
            free = f"{method}-{budget}"
            rows.append(row(1 - lost, tflops, id=free, label=method, projector="training-free", **own))
            gain = 45 * lost
            p = {"p": 0.0001, "adjusted": 0.0016} if gain > 2 else {"p": 0.06, "adjusted": 0.3}
            tuned = {"id": f"{free}-tuned", "label": f"{method} + tuned projector", "projector": "tuned", "twin": free}
            difference = Difference(value=gain, interval=(gain - 1, gain + 1), test="paired permutation", **p)
            by_key = {POPE.key: difference}
            rows.append(row(1 - 0.55 * lost, tflops, relative_gain=difference, gains=by_key, **tuned, **own))
    quoted = QuotedRow(label="DivPrune", model="llava", method="divprune", budget=64, cite="arXiv 2503.02175, table 1",
                       values={POPE.key: 73.1, MME.key: 1310}, relative=86.2, beside="divprune-64",
                       differences={POPE.key: 0.15, MME.key: 5.46})  # fmt: skip
    return Table(title="LLaVA-1.5 7B: five methods, training-free and tuned", columns=columns, rows=rows,
                 quoted=[quoted], footnotes=["arms may differ in device: cpu, cuda"])  # fmt: skip


def photograph(seed, side=336):
    """Pixels with the smooth parts and the grain of a photograph."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (6, 6, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    return (smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def examples_of(table, count, side=336, grid=24, said="answer"):
    """Questions with random kept tokens; the more are kept, the likelier an arm is right."""
    random = np.random.default_rng(1)
    found = []
    for number in range(count):
        hardness, arms = random.uniform(0, 1), {}
        for row in table.rows:
            kept = random.permutation(grid * grid)[: min(int(row.kept), grid * grid)]
            right = row.relative is not None and (row.relative.value or 0) / 100 + random.normal(0, 0.1) > hardness
            arms[row.id] = Answered(
                prediction=f"{said} {number}" if right else f"not {said} {number}",
                score=float(right),
                kept=sorted(kept.tolist()),
                grid=(grid, grid),
            )
        found.append(
            Example(task="pope", id=str(number), question=f"What is in picture {number}?", answer=f"{said} {number}",
                    picture=Picture.of(photograph(number, side)), arms=arms)
        )  # fmt: skip
    return Examples(how="The first questions on which arms differ, of a picture each.", examples=found)
