"""Shapes and types of every annotated function in the package are checked while the tests run."""

import gc
import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
install_import_hook("jlt", "typechecker.checked")

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from forked import assume_rates  # noqa: E402

LONGEST = [
    "test_experiments",
    "test_sampling_processes",
    "test_plan",
    "test_processes",
    "test_training_processes",
    "test_training_step",
    "test_wheel",
    "test_data_encode",
    "test_report",
    "test_inside",
    "test_benchmark",
    "test_training_saving",
    "test_export_pipeline",
    "test_export",
]
"""The files that take longest, the longest first: with one file after another for each worker, they begin the run."""


def pytest_configure(config: pytest.Config) -> None:
    # A process that only gives the tests to workers needs no torch.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import torch

        # Networks this small are several times slower on two threads, and even slower while other work runs.
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    if "jlt.training.meter" in sys.modules:
        assume_rates()
    # What was imported stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digit_latents(tmp_path_factory) -> Path:
    """The latents of all digits by the bundled autoencoder, in float16 without flips: no test may change them.

    They are encoded once, also where several workers share the tests.
    """
    from jlt.latents.encode_config import EncodeConfig
    from jlt.latents.encoding import encode

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "digit-latents"
    with FileLock(root / "digit-latents.lock"):
        encode(EncodeConfig(images="digits", autoencoder="tiny", resolution=32, flips=False), folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A latent store of 50 noise images, in both orientations, for runs that take seconds."""
    from data_helpers import NoiseSource, PatchAutoencoder

    from jlt.latents.encode_config import EncodeConfig
    from jlt.latents.encoding import encode_source
    from jlt.latents.store import LatentStore

    folder = tmp_path_factory.mktemp("store") / "latents"
    config = EncodeConfig(images="noise", autoencoder="patches", resolution=8, flips=True, dtype="float32")
    encode_source(NoiseSource(50), PatchAutoencoder(), config, folder)
    return LatentStore.open(folder)
