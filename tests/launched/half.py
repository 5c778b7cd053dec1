"""Recalibrations in float16 on any CPU: DeepSpeed refuses where its instructions are missing, PyTorch does not."""

import runpy
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from prunetune.train import preflight

get_accelerator().is_fp16_supported = lambda: True
preflight._check_device = lambda config: None
runpy.run_path(str(Path(__file__).with_name("several.py")), run_name="__main__")
