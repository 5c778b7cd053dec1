"""Tables made by hand, whose looks are known line by line."""

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
            hard={POPE.key: value(61, 57, 65)}, costs={"TFLOPs": value(8.6), "prefill ms": value(48, 47, 49)},
            folders=["arms/dense"]),
        Row(**FREE, values=values(70.25, 73, 1205.5, 52.2, 0.95), relative=value(81.4, 80, 83),
            pooled=value(70, 69.4, 70.6), hard={POPE.key: value(40.1, 36, 44)},
            costs={"TFLOPs": value(1.4), "prefill ms": value(15, 14, 16)}, folders=["arms/free"],
            facts={"items": 11_114, "model": "llava-hf/llava-1.5-7b-hf", "profile": None}),
        Row(**TUNED, values=values(80.5, 81, 1402.25, 49, 1.051, spread=0.34), relative=value(92.84, 91.5, 94.2),
            pooled=value(75.5, 75, 76), hard={POPE.key: value(51, 47, 55)},
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
