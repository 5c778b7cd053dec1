"""Reads what an offline W&B run left behind: its file is a LevelDB log of protobuf records."""

import struct
from pathlib import Path

HEADER, BLOCK, FRAME = 7, 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def records(folder: Path) -> list:
    """Return the records of the one offline run below a run's output folder."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
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
