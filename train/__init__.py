"""Recalibration of projectors, and the training of the bundled tiny VLM."""

if __name__ != "prunetune.train":
    raise ImportError("import prunetune.train, not train: a second name would load everything twice")
