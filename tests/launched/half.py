"""Recalibrations in float16 on any CPU: DeepSpeed refuses where its instructions are missing, PyTorch does not."""

from deepspeed.accelerator import get_accelerator

from prunetune.train import preflight, several


def main(runs: list[list[str]]) -> None:
    """Recalibrate with each list of arguments."""
    get_accelerator().is_fp16_supported = lambda: True
    preflight._check_device = lambda config: None
    several.run_all(runs)
