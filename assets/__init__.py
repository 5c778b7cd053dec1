"""What ships with the package beside its code: the bundled tiny VLM and the hard VLM."""

from pathlib import Path

if __name__ != "prunetune.assets":
    raise ImportError("import prunetune.assets, not assets: a second name would load everything twice")

FOLDER = Path(__file__).parent
TINY_VLM = FOLDER / "tiny_vlm"
HARD_VLM = FOLDER / "hard_vlm"


def shipped(path: str) -> str:
    """Return where ``assets/NAME`` lies in this installation, unless the working directory has one of its own.

    Any other path comes back as it is.
    """
    if path.startswith("assets/") and not Path(path).exists() and (FOLDER.parent / path).exists():
        return str(FOLDER.parent / path)
    return path
