"""The command line and thin launchers."""

if __name__ != "prunetune.scripts":
    raise ImportError("import prunetune.scripts, not scripts: a second name would load everything twice")
