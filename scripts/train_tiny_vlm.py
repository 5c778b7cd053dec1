"""Train the bundled tiny VLM from scratch (about 40 minutes on 2 CPU cores): ``python scripts/train_tiny_vlm.py``."""

import argparse
from pathlib import Path

from prunetune.tiny_world.training.run import train_tiny_vlm

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_vlm/model"), help="where the model goes")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny_vlm"), help="state and log; a second start resumes"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every stage's steps, for a quick trial")
    arguments = parser.parse_args()
    train_tiny_vlm(arguments.output, arguments.work, arguments.seed, arguments.scale)
