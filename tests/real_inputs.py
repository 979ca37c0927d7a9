"""Photographs and public weights for research, which are outside the repository; tests that need them are skipped."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REAL = Path(__file__).parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the photographs and public weights of ../shared/real are missing"
)


def photographs(collection: str, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return evenly spaced photographs, uint8 (N, H, W, 3), with their labels."""
    import pyarrow.parquet as pq

    (file,) = (REAL / collection).glob(f"{split}-*.parquet")
    table = pq.read_table(file)
    rows = np.linspace(0, len(table) - 1, count).round().astype(int)
    images = [
        np.asarray(Image.open(io.BytesIO(table["image"][int(row)].as_py()["bytes"])).convert("RGB")) for row in rows
    ]
    return torch.from_numpy(np.stack(images)), torch.tensor([table["label"][int(row)].as_py() for row in rows])
