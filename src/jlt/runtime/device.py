"""The device that the user chose; free of torch, which must not be imported before an Apple GPU is prepared."""

from __future__ import annotations

import os

from jlt.errors import unknown_name

DEVICES = ("auto", "cuda", "mps", "cpu")
VARIABLE = "JLT_DEVICE"
"""Environment variable that holds the choice, so that worker processes inherit it."""


def choose_device(name: str) -> None:
    """Compute on this device from here on; UsageError for an unknown name."""
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    os.environ[VARIABLE] = name


def chosen_device() -> str:
    """Return the chosen device: auto, cuda, mps or cpu."""
    return os.environ.get(VARIABLE, "auto")


def prepare_apple_gpu() -> None:
    """Let operations that an Apple GPU lacks run on the CPU; it has an effect before torch is imported."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
