"""Two systems on the digits, trained for a moment: their images are noise with a class."""

from pathlib import Path

from training_helpers import config_for

from jlt.config import OptimizerConfig
from jlt.latents.store import LatentStore
from jlt.training.loop import train

NAMES = {"x": "JLT-tiny/1", "v": "DiT-tiny/1"}


def train_pair(latents: Path, folder: Path) -> list[Path]:
    store = LatentStore.open(latents)
    runs = []
    for prediction, name in NAMES.items():
        runs.append(folder / f"run {prediction}")
        fast = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
        settings = {"optimizer": fast, "flips": False, "steps": 40, "checkpoint_every": 40, "power_ema": ()}
        train(config_for(store, name=name, prediction=prediction, **settings), store, runs[-1])
    return runs
