"""A small latent store, runs on it, and what is compared between runs."""

import dataclasses
import json
import os
import socket
import time

import forked
import torch

from jlt.autoencoders.load import load_autoencoder
from jlt.config import NetworkConfig, OptimizerConfig, TrainConfig
from jlt.evaluation.extractors import load_extractor
from jlt.evaluation.reference import reference_statistics
from jlt.experiments.recipes import resolve_recipe
from jlt.images.digits import Digits
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode_source
from jlt.latents.store import LatentStore
from jlt.storage.codec import to_json
from jlt.training.checkpoint import load_tensors, open_checkpoint, step_folder, step_of
from jlt.training.loop import train


def config_for(store, **changes):
    shape = store.shape
    network = NetworkConfig(
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        num_classes=shape.num_classes,
        hidden_size=16,
        depth=2,
        num_heads=2,
    )
    settings = {
        "name": "test",
        "prediction": "x",
        "network": network,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        "batch_size": 16,
        "steps": 12,
        "ema": (0.9, 0.5),
        "power_ema": (0.1,),
        "max_skipped": 1,
        "flips": True,
        "precision": "float32",
        "log_every": 2,
        "checkpoint_every": 4,
        **changes,
    }
    return TrainConfig(**settings)


class FewDigits(Digits):
    """The first digits of the bundled set."""

    def __len__(self):
        return 40


def run_on_few_digits(folder):
    """Train a run of four steps, and measure its few digits; return the folder of `run` and `reference.npz`."""
    encoding = EncodeConfig(images="digits", autoencoder="tiny", resolution=32, flips=False)
    encode_source(FewDigits(), load_autoencoder("tiny"), encoding, folder / "latents")
    store = LatentStore.open(folder / "latents")
    recipe = resolve_recipe("digits", store.shape)
    network = dataclasses.replace(recipe.network, hidden_size=16, depth=2, num_heads=2)
    train(dataclasses.replace(recipe, network=network, steps=4, batch_size=8), store, folder / "run")
    reference_statistics(FewDigits(), load_extractor("digits"), 32, kept=0).save(folder / "reference.npz")
    return folder


def files_of(run, step):
    return {name: load_tensors(step_folder(run, step) / name) for name in open_checkpoint(run).files if name[-1] == "s"}


def assert_same_checkpoint(a, b, step):
    ours, theirs = files_of(a, step), files_of(b, step)
    averages = {f"ema_{name}.safetensors" for name in ("0.9", "0.5", "sigma_rel=0.1")}
    assert set(ours) == {"network.safetensors", "optimizer.safetensors", *averages}
    for name, tensors in ours.items():
        assert set(tensors) == set(theirs[name])
        for key, value in tensors.items():
            assert torch.equal(value, theirs[name][key]), f"{name} {key}"


def logged(run):
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"], event["grad_norm"]) for event in events if event["event"] == "step"]


SCRIPT = """
import json, sys
from pathlib import Path
from jlt.config import TrainConfig
from jlt.latents.store import LatentStore
from jlt.storage.codec import from_json
from jlt.training.loop import train
train(from_json(TrainConfig, json.loads(sys.argv[1])), LatentStore.open(sys.argv[2]), Path(sys.argv[3]))
sys.exit()
"""


def start_training(config, store, run):
    return forked.start([json.dumps(to_json(config)), str(store.folder), str(run)], plant=SCRIPT)


def newest_step(run):
    return max((step_of(folder) for folder in run.glob("checkpoints/step_*")), default=0)


def events(run, kind):
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


TINY = ["--network.hidden-size", "16", "--network.depth", "2", "--network.num-heads", "2", "--log-every", "1"]


def train_arguments(store, run, *arguments):
    """The arguments of a small run on the command line."""
    return [
        "train",
        "digits",
        "--latents",
        str(store.folder),
        "--out",
        str(run),
        "--batch-size",
        "16",
        *TINY,
        *arguments,
    ]


def start_processes(count, arguments, plant=""):
    """Start `count` processes as a cluster's launcher does, each running the code `plant` first; return them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {
            **os.environ,
            **{key: str(value) for key, value in places.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started.append(forked.start(arguments, environment, plant))
    return started


def ends_of(started, timeout=120):
    """Wait for processes and return their exit codes and their output on stderr."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def run_processes(count, arguments, plant=""):
    """Run processes to their end; all have to succeed."""
    codes, outputs = ends_of(start_processes(count, arguments, plant))
    assert codes == [0] * count, outputs
