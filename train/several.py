"""Several recalibrations one after another in the same ranks, which import and begin once: ``... several FILE``.

The file is JSON: for each run its arguments, as of :mod:`prunetune.train.recalibrate`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prunetune.train import recalibrate


def run_all(runs: list[list[str]]) -> None:
    """Recalibrate with each list of arguments; the first that fails ends all."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None  # DeepSpeed holds on to the first group
    try:
        for arguments in runs:
            recalibrate.main(arguments)
            unset_hf_deepspeed_config()  # or the next model would be partitioned while it loads
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # rank 0 may empty a folder in which another still looks for its last run
    finally:
        torch.distributed.destroy_process_group = destroy
    if torch.distributed.is_initialized():
        destroy()


if __name__ == "__main__":
    # The launcher's --local_rank may stand before the file.
    run_all(json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8")))
