"""Train the bundled hard VLM from scratch (about 40 minutes of one CPU core): ``python scripts/train_hard_vlm.py``."""

import argparse
from pathlib import Path

from prunetune.tiny_world.hard.training.run import train_hard_vlm

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/hard_vlm/model"), help="where the model goes")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/hard_vlm"), help="stages and log; a second start resumes"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every stage's steps, for a quick trial")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="train these stages alone")
    arguments = parser.parse_args()
    train_hard_vlm(arguments.output, arguments.work, arguments.seed, arguments.scale, arguments.only)
