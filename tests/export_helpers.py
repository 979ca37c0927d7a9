"""Small checkpoints with random weights, and exported pipelines that are loaded with and without jlt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from jlt.autoencoders.load import load_autoencoder
from jlt.config import NetworkConfig, TrainConfig
from jlt.networks.transformer import build_network
from jlt.training.checkpoint import open_checkpoint, save_checkpoint
from jlt.training.state import run_claim

NAMES = ["tench, Tinca tinca", "goldfish", "crane", "crane"]
SITE = Path(torch.__file__).parents[1]
ALONE = Path(__file__).with_name("pipeline_alone.py")
FACTS = {"step": 7, "updates": 7, "skipped_in_a_row": 0, "draws": "", "initial_weights": "", "seconds": 0.0}


def write_run(folder, prediction="x", patch_size=1, identity=None, side=4, names=NAMES, seed=0, **changes):
    """Write a run with one checkpoint of random weights, an average among them, and open the checkpoint."""
    identity = json.loads(json.dumps(identity or load_autoencoder("tiny").identity()))
    network = NetworkConfig(
        channels=identity["channels"],
        height=side,
        width=side,
        num_classes=4,
        patch_size=patch_size,
        hidden_size=16,
        depth=2,
        num_heads=2,
        **changes.pop("network", {}),
    )
    settings = {"name": "test", "prediction": prediction, "network": network, "ema": (0.9,), "power_ema": (0.1,)}
    config = TrainConfig(**{**settings, **changes})
    kind = {"kind": "digits", "count": 4, "path": str(folder / "photographs")}
    latents = {"autoencoder": identity, "source": kind, "class_names": names, "resolution": 32}
    tensors = {}
    for place, name in enumerate(("network", "ema_0.9", "ema_sigma_rel=0.1")):
        weights, generator = build_network(network, 0).state_dict(), torch.Generator().manual_seed(10 * seed + place)
        tensors[name] = {key: 0.6 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    run_claim(folder, config, latents).begin()
    save_checkpoint(folder, config, latents, tensors, {**FACTS, "device": "cpu"})
    return open_checkpoint(folder)


def run_alone(jobs, tmp_path):
    """Do jobs in a process that cannot import jlt, and return what each of them drew."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-I", "-S", ALONE, SITE, tmp_path / "drawn.npz"]
    done = subprocess.run(
        arguments, input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(tmp_path / "drawn.npz"))
