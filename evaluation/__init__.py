"""Running arms on tasks, and comparing dense, training-free and tuned."""

if __name__ != "prunetune.evaluation":
    raise ImportError("import prunetune.evaluation, not evaluation: a second name would load everything twice")
