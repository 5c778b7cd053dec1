"""Where commands write: folders that one process uses at a time, and files that are there whole or not at all.

A folder says in ``.prunetune.json`` what it holds and which of its files are ours. Nothing else in it is ever replaced
or deleted. While it is used, ``.prunetune.lock`` is locked; the lock goes with the process, however that ends.
"""

from prunetune.outputs.errors import OutputError, writing
from prunetune.outputs.files import delete, replaced_folder, write_bytes, write_text
from prunetune.outputs.folder import MARKER, OutputFolder
from prunetune.outputs.kinds import (
    ADAPTER_FILES,
    ANALYSIS,
    ANSWERS,
    CHECKPOINT_FILES,
    COMPARISON,
    DEMO,
    DIAL,
    EVALUATION,
    EXPORT,
    FEATURES,
    RATE,
    RECALIBRATION,
    SOUP,
    TABLE,
    TEACHER,
    VISUALIZATION,
    Kind,
)
from prunetune.outputs.lock import LOCK, SHARED

__all__ = [
    "ADAPTER_FILES",
    "ANALYSIS",
    "ANSWERS",
    "CHECKPOINT_FILES",
    "COMPARISON",
    "DEMO",
    "DIAL",
    "EVALUATION",
    "EXPORT",
    "FEATURES",
    "LOCK",
    "MARKER",
    "RATE",
    "RECALIBRATION",
    "SHARED",
    "SOUP",
    "TABLE",
    "TEACHER",
    "VISUALIZATION",
    "Kind",
    "OutputError",
    "OutputFolder",
    "delete",
    "replaced_folder",
    "write_bytes",
    "write_text",
    "writing",
]
