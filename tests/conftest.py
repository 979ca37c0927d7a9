"""Shapes and types of every annotated function in the package are checked while the tests run."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
install_import_hook("jlt", "typechecker.checked")

import torch  # noqa: E402

# Networks this small are several times slower on two threads, the more so beside other work.
torch.set_num_threads(1)

import pytest  # noqa: E402


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
