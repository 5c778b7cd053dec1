"""Several recalibrations one after another in the same ranks."""

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prunetune.train import recalibrate


def main(runs: list[list[str]]) -> None:
    """Recalibrate with each list of arguments."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed holds on to the first group
    for arguments in runs:
        recalibrate.main(arguments)
        unset_hf_deepspeed_config()  # or the next model would be partitioned while it loads
    destroy()
