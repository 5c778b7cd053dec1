"""The shape types of the tensor code, checked on every call while the tests run: imported before the code itself."""

from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent
# Triton compiles the source of its kernels: a wrapper around them would be in the way.
LEFT_OUT = {"prunetune.pruning.ops.greedy_triton"}

# Of the plug, what rewrites sequences and chooses from images.
PLUG = ("rewrite", "select", "sequence", "signals")

# An option of 0 or 1 is a float to everyone but a type checker of the strict kind.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def modules() -> list[str]:
    """Return the modules whose functions are checked: the tensor code."""
    names = []
    for folder in ("ops", "methods", "stages", "stages/methods"):
        files = (ROOT / "pruning" / folder).glob("[a-z]*.py")
        names += [f"prunetune.pruning.{folder.replace('/', '.')}.{file.stem}" for file in files]
    names += [f"prunetune.pruning.{name}" for name in PLUG]
    return sorted(set(names) - LEFT_OUT)


install_import_hook(modules(), "shapes.checked")
