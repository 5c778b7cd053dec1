"""``prunetune data check`` and ``prunetune data prepare``."""

from __future__ import annotations

import argparse
import sys


def run(arguments: list[str]) -> None:
    """Check or prepare a recipe's data; exits with 1 if something is missing or beyond the thresholds."""
    parser = argparse.ArgumentParser("prunetune data")
    parser.add_argument("what", choices=["check", "prepare"])
    parser.add_argument("--recipe", required=True, help="a name from `prunetune list recipes`, or a YAML file")
    parser.add_argument("--file", help="data file, for example llava_v1_5_mix665k.json")
    parser.add_argument("--image-root", help="folder that the image paths are relative to")
    parser.add_argument("--model", help="folder or hub id; its tokenizer and template measure lengths")
    parser.add_argument("--template", default="model")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-missing", type=float, help="largest share of unusable pictures (the recipe's, or 0.01)")
    parser.add_argument("--num-proc", type=int, default=1, help="processes that decode pictures")
    options = parser.parse_args(arguments)
    if options.what == "prepare":
        from prunetune.data_recipes.prepare import plan

        text, complete = plan(options.recipe, options.file, options.image_root)
        print(text)
        sys.exit(0 if complete else 1)
    from prunetune.data_recipes.check import check_data
    from prunetune.data_recipes.recipe import read_recipe, tolerated
    from prunetune.models.loading import load_processor

    processor = load_processor(options.model) if options.model else None
    report = check_data(
        options.recipe,
        options.file,
        options.image_root,
        processor,
        options.template,
        options.max_length,
        options.num_proc,
    )
    print(report.to_text())
    failures = report.failures(tolerated(read_recipe(options.recipe), options.max_missing))
    print("\n".join(f"FAILED: {failure}" for failure in failures) or "ok")
    sys.exit(1 if failures else 0)
