"""The script that measures a GPU, at small sizes on a CPU."""

import importlib
from pathlib import Path

import pytest
from real_inputs import REAL, needs_real

FOLDER = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("gpu")


@needs_real
def test_a_cpu_agrees_with_itself_and_bfloat16_differs(script):
    found = script.exactness(script.SMALL, REAL)
    for name, value in found.items():
        low, high = (1e-4, 0.1) if "bfloat16" in name else (0, 1e-5)
        assert low <= value <= high, name
    assert {"gradient, bfloat16", "samples of v, bfloat16", "token covariance", "taef2, decoded"} <= set(found)


def test_the_table_names_what_did_not_fit(script):
    entry = {"preset": "JLT-B/1", "batch_size": 64, "out_of_memory": False}
    measured = [
        {**entry, "img_per_second": 1234.5, "mfu": 0.5, "peak_memory_gib": 20},
        {**entry, "out_of_memory": True},
    ]
    results = {"train": {"measured": measured, "loop": {}}, "seconds": {"train": 61.2}}
    table = script.table(results)
    assert "| train | JLT-B/1, batch 64 | 1234 img/s, MFU 50.0%, 20 GiB |" in table
    assert "does not fit" in table
    assert "| seconds | train | 61 |" in table
