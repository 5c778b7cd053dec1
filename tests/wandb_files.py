"""Reads what an offline W&B run left behind: its file is a LevelDB log of protobuf records."""

import struct
import time
from pathlib import Path

HEADER, BLOCK, FRAME = 7, 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def records(folder: Path) -> list:
    """Return the records of the one offline run below a run's output folder, once it is written to its end."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(100):  # W&B's own process writes it, which may be late on a busy machine
        found = _read(file.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.2)
    raise AssertionError(f"{file} has no end: {len(found)} records")


def _read(data: bytes) -> list:
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"
    found, held, at = [], b"", HEADER
    while at + FRAME <= len(data):
        left = BLOCK - at % BLOCK
        if left < FRAME:  # a block's end is padded
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + FRAME])
        if kind == 0:
            break
        held = held * (kind not in (FULL, FIRST)) + data[at + FRAME : at + FRAME + length]
        at += FRAME + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            found.append(record)
    return found


def of_kind(folder: Path, kind: str) -> list:
    """Return the records of one kind: "run", "config", "history", "artifact"."""
    return [getattr(record, kind) for record in records(folder) if record.WhichOneof("record_type") == kind]
