"""Teach the bundled tiny VLM clips (about 10 minutes on 2 CPU cores): ``python scripts/train_tiny_video.py``."""

import argparse
from pathlib import Path

from prunetune.assets import TINY_VLM
from prunetune.tiny_world.moving.training import train_video_vlm

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_video"), help="where the model goes")
    parser.add_argument("--clips", type=int, default=4000, help="how many clips are drawn")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_video_vlm(TINY_VLM, arguments.output, arguments.clips, arguments.steps, arguments.seed)
