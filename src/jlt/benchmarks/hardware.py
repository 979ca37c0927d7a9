"""Memory and peak rates of GPUs by their data sheets, for forecasts.

Rates are dense, without structured sparsity, and with float32 accumulation where a sheet distinguishes it. Sources,
all NVIDIA's: data sheets of A100, A10, A40, RTX A6000, L4, L40, L40S, H100, H200 and HGX B200; the white papers of the
GA102 (RTX 3090), Ada (RTX 4090, RTX 6000 Ada) and Blackwell RTX (RTX 5090) architectures, H100-PCIe's float32 rate
from the white paper of Hopper. Sheets that give rates with sparsity alone were halved. Memory is the sheet's, a GB
taken as 1e9 bytes, which is a little less than the cards report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jlt.config import Precision
from jlt.errors import unknown_name


@dataclass(frozen=True)
class GPU:
    """A GPU's memory in bytes and its dense peak rates in floating-point operations per second."""

    name: str
    memory: int
    peak: Mapping[Precision, float]


GPUS = {
    name: GPU(name, memory_gb * 10**9, {"bfloat16": bfloat16 * 1e12, "tf32": tf32 * 1e12, "float32": float32 * 1e12})
    for name, memory_gb, bfloat16, tf32, float32 in (
        ("A100-40", 40, 312, 156, 19.5),
        ("A100-80", 80, 312, 156, 19.5),
        ("A10", 24, 125, 62.5, 31.2),
        ("A40", 48, 149.7, 74.8, 37.4),
        ("RTX-A6000", 48, 154.8, 77.4, 38.7),
        ("RTX-3090", 24, 71, 35.6, 35.6),
        ("L4", 24, 121, 60, 30.3),
        ("L40", 48, 181, 90.5, 90.5),
        ("L40S", 48, 362, 183, 91.6),
        ("RTX-4090", 24, 165.2, 82.6, 82.6),
        ("RTX-6000-Ada", 48, 364.2, 182.1, 91.1),
        ("RTX-5090", 32, 209.5, 104.8, 104.8),
        ("H100", 80, 989.4, 494.7, 66.9),
        ("H100-PCIe", 80, 756, 378, 51.2),
        ("H100-NVL", 94, 835, 417, 60),
        ("H200", 141, 989.4, 494.7, 66.9),
        ("H200-NVL", 141, 835, 417, 60),
        ("B200", 180, 2250, 1125, 75),
    )
}
"""By name; the table has GB, and TFLOP/s in bfloat16, TF32 and float32. H100 and H200 without a suffix are SXM ones."""


def find_gpu(name: str) -> GPU:
    """Return the GPU of a name, in any case, with blanks or dashes; UsageError with the nearest if unknown."""
    folded = {known.lower(): gpu for known, gpu in GPUS.items()}
    wanted = name.lower().replace(" ", "-").replace("_", "-")
    if wanted not in folded:
        raise unknown_name("GPU", name, [*GPUS, "cpu"])
    return folded[wanted]
