"""The page ``docs/families.md``: which check of the identity suite passed for which family and modality.

``make families`` runs the suite and writes the page; nothing in its table is typed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"

# Test, parameter, column. A test that is not here has a column of its own name.
COLUMNS = [
    ("keep_all_is_bit_identical_to_stock", "float32", "stock, float32"),
    ("keep_all_is_bit_identical_to_stock", "bfloat16", "stock, bfloat16"),
    ("pruned_equals_the_full_run_with_dropped_tokens_hidden", "", "hidden"),
    ("pruned_and_numbered_anew_equals_the_language_model_on_the_kept_rows", "", "compact"),
    ("an_item_of_which_nothing_is_kept_is_a_hidden_one", "", "nothing kept"),
    ("what_is_kept_depends_on_the_row_alone", "float32", "choice, float32"),
    ("what_is_kept_depends_on_the_row_alone", "bfloat16", "choice, bfloat16"),
    ("the_same_is_kept_in_training_and_inference", "", "training"),
    ("rows_hold_none_one_and_several_images", "", "0 to 3"),
    ("a_batch_equals_each_of_its_rows_alone", "right", "right"),
    ("a_batch_equals_each_of_its_rows_alone", "left", "left"),
    ("generating_equals_step_by_step", "", "generate"),
    ("beams_and_samples_equal_each_row_alone", "beams", "beams"),
    ("beams_and_samples_equal_each_row_alone", "samples", "samples"),
    ("gradients_reach_the_whole_projector_alone", "", "gradients"),
    ("text_alone_is_stock_with_a_gradient_of_zero", "", "text, training"),
    ("ranks_without_an_image_encode_a_blank_of_every_modality", "", "blanks"),
    ("text_alone_is_generated_as_stock", "", "text, generate"),
    ("images_and_placeholders_that_disagree_are_refused", "", "refusal"),
    ("images_from_disk_give_the_same_logits", "", "stored"),
    ("a_step_zero_adapter_is_training_free_and_a_tuned_one_differs_in_the_projector", "", "adapter"),
    ("the_engine_changes_neither_loss_nor_gradients", "", "engine"),
    ("the_engine_trains_on_text_alone", "", "engine, text"),
]

HEAD = """# Model families, and what was checked of each

Written by `make families` from a run of the identity suite (`prunetune.testing.FamilyIdentity`) on small models that
are built from configurations of each architecture, on a CPU; nothing in the table is typed. `yes` is a check that
passed for every model of the row, `failed` one that did not, `-` one that was left out. *methods* is how many the model
serves without a text tower. What real weights answer is not checked here.

"""

LEGEND = {
    "stock": "with everything kept, logits (padded right and left), loss and generated tokens are the stock model's, "
    "bit for bit, in that dtype; every method",
    "hidden": "the pruned run is the full run with the dropped tokens hidden from all others, at original positions; "
    "every method that does not merge",
    "compact": "with positions numbered anew, the pruned run is the language model alone on the stock run's embeddings "
    "of the kept tokens, at the stock run's first positions; every method that does not merge; `-` where they count "
    "rows and columns",
    "nothing kept": "the same where a pruner keeps nothing of an image",
    "choice": "what is kept of a row is the same alone, in a batch, and padded on either side, in that dtype; every "
    "method",
    "training": "and the same in training mode",
    "0 to 3": "the rows of all these checks hold no image, one, and at least three",
    "right, left": "logits of a batch padded on that side are those of each row alone",
    "generate": "greedy answers are those of a new run for every token",
    "beams, samples": "beam search (3) and sampled sequences of a batch are those of each row alone, also where rows "
    "keep unequally many tokens",
    "gradients": "reach every parameter of the projector and nothing else",
    "text": "a batch of text alone is the stock model, and in training its projector has a gradient of zero",
    "blanks": "the same as a rank of ZeRO-3 trains on it: a blank of each modality goes through encoder and projector",
    "refusal": "images and placeholders that disagree are an error with one line",
    "stored": "images written to disk and read again give the same logits, bit for bit",
    "adapter": "an untrained adapter is training-free bit for bit, and a tuned one changes the projector's tensors "
    "alone",
    "engine": "every saving of the training engine at once leaves loss and gradients as they are, also of text alone",
}


def page(records: list[dict[str, Any]]) -> str:
    """Return the page of a run's records."""
    columns = list(COLUMNS)
    named = {(check, of) for check, of, _ in columns}
    for record in records:
        key = (record["check"], record["of"])
        if key not in named:
            named.add(key)
            columns.append((*key, " ".join(key).replace("_", " ").strip()))
    lines = [
        "| family | modality | methods | " + " | ".join(title for _, _, title in columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for family, modality in sorted({(record["family"], record["modality"]) for record in records}):
        own = [record for record in records if (record["family"], record["modality"]) == (family, modality)]
        cells = [_cell([r["outcome"] for r in own if (r["check"], r["of"]) == (check, of)]) for check, of, _ in columns]
        lines.append("| " + " | ".join([family, modality, _span([r["methods"] for r in own]), *cells]) + " |")
    lines += ["", "| column | what passed |", "|---|---|"]
    lines += [f"| {column} | {meaning} |" for column, meaning in LEGEND.items()]
    return HEAD + "\n".join(lines) + "\n"


def _cell(outcomes: list[str]) -> str:
    if "failed" in outcomes:
        return "failed"
    # Of several models of a family all have to pass.
    return "yes" if outcomes and all(outcome == "passed" for outcome in outcomes) else "-"


def _span(counts: list[int]) -> str:
    """Return how many methods the models of a row serve: ``14`` or ``14 to 21``."""
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"


def read(files: list[str]) -> list[dict[str, Any]]:
    """Return the records of some runs; a class of a later one replaces that of an earlier."""
    by_class: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        own: dict[str, list[dict[str, Any]]] = {}
        for record in json.loads(Path(file).read_text()):
            own.setdefault(record["test"], []).append(record)
        by_class |= own
    return [record for records in by_class.values() for record in records]


if __name__ == "__main__":
    PAGE.write_text(page(read(sys.argv[1:])), encoding="utf-8")
