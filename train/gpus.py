"""GPUs by name: memory, and peaks of dense matrix products as their data sheets say them."""

from __future__ import annotations

from dataclasses import dataclass

from prunetune.configs import ConfigError
from prunetune.names import nearest

GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: on our command line.
        title: what the driver calls it contains all of these words.
        gib: memory in GiB, as torch reports it, rounded down.
        bfloat16: dense peak in TFLOP/s.
        float8: the same in float8; None where there is none.
    """

    name: str
    title: tuple[str, ...]
    gib: float
    bfloat16: float
    float8: float | None = None

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return int(self.gib * GIB)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", ("B200",), 178, 2250, 4500),
        Gpu("h200", ("H200",), 139, 989, 1979),
        Gpu("h100", ("H100",), 79, 989, 1979),
        Gpu("a100-80", ("A100", "80GB"), 79, 312),
        Gpu("a100-40", ("A100", "40GB"), 39, 312),
        Gpu("l40s", ("L40S",), 44, 362, 733),
        Gpu("a6000", ("A6000",), 47, 155),
        Gpu("rtx4090", ("4090",), 23.5, 165, 330),
        Gpu("l4", ("L4",), 22, 121, 242),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU of a name.

    Raises:
        ConfigError: if there is none, with those that there are.
    """
    known = GPUS.get(name.lower())
    if known is None:
        raise ConfigError(f"unknown GPU {name!r}{nearest(name.lower(), GPUS)}; there are {', '.join(GPUS)}")
    return known


def gpu_of_device(title: str) -> Gpu | None:
    """Return the GPU that the driver's name stands for, such as "NVIDIA H100 80GB HBM3"; None if it is not known."""
    words = title.replace("-", " ").split()
    for gpu in GPUS.values():
        if all(any(part in word if len(part) > 2 else part == word for word in words) for part in gpu.title):
            return gpu
    return None
