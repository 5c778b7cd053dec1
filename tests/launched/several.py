"""Several recalibrations one after another in the same ranks: starting the ranks takes longer than a small run.

Started by the DeepSpeed launcher with a JSON file that holds one list of arguments per run.
"""

import json
import sys
from pathlib import Path

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prunetune.train import recalibrate

if __name__ == "__main__":
    file = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed holds on to the first group
    for arguments in json.loads(Path(file).read_text()):
        recalibrate.main(arguments)
        unset_hf_deepspeed_config()  # or the next model would be partitioned while it loads
    destroy()
