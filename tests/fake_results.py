"""Result folders as an ablation leaves them, with invented numbers, for the tests of the report."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from jlt.config import LatentShape, TimestepConfig
from jlt.experiments.analysis import AnalysisConfig
from jlt.geometry.accumulate import measure_moments
from jlt.results.ablation import Ablation
from jlt.results.files import write_result
from jlt.results.geometry import GEOMETRY, Geometry, TrainingModel
from jlt.results.run import log_line
from jlt.runtime.processes import SingleProcess, rank0_value
from jlt.storage.files import read_json, sealed_text, with_place, without_seal, work_of, write_marker, write_text
from jlt.storage.seals import seal_file

NAMES = {"x": "JLT-XS", "v": "DiT-XS", "eps": "DiT-eps-XS"}
FINAL = {("x", 1): 20.1, ("v", 1): 37.2, ("eps", 1): 310.0, ("x", 2): 18.3, ("v", 2): 126.0, ("eps", 2): 820.0}
EVALUATED = (300, 600, 900, 1200, 1500)
AUTOENCODER = {"name": "tiny", "source": "bundled", "class": "AutoencoderKLFlux2", "weights_sha256": "ab" * 32}
LATENTS = {
    "autoencoder": AUTOENCODER,
    "source": {"kind": "digits", "count": 1797, "sha256": "cd" * 32},
    "count": 1797,
    "resolution": 32,
    "manifest_sha256": "ef" * 32,
}


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a result as another program could: what it holds need not be possible."""
    write_text(path, sealed_text(with_place(without_seal(content), path)))


def read_content(path: Path) -> dict[str, Any]:
    return without_seal(read_json(path))


def write_log(run: Path, *events: dict[str, Any]) -> Path:
    (run / "log.jsonl").write_text("".join(log_line(event, work_of(run)) for event in events))
    return run / "log.jsonl"


class GaussianStore:
    """Given latents, or smooth ones of 16 channels whose spectrum falls over four decades; labels repeat."""

    def __init__(self, latents: Tensor | None = None, classes: int = 10) -> None:
        self.latents, self.classes = self._smooth() if latents is None else latents, classes

    def _smooth(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
        scales = torch.logspace(0.4, -1.5, 16)
        noise = torch.randn(1797, 16, 4, 4, generator=generator)
        smooth = noise + 0.8 * noise.roll(1, -1) + 0.8 * noise.roll(1, -2)
        return torch.einsum("dc,nchw->ndhw", basis * scales, smooth)

    @property
    def shape(self) -> LatentShape:
        return LatentShape(*self.latents.shape[1:], self.classes)

    def __len__(self) -> int:
        return len(self.latents)

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.latents[indices], torch.from_numpy(indices % self.classes)

    def identity(self) -> dict[str, Any]:
        return LATENTS


def analyze(store: Any, patch_sizes: Sequence[int], widths: Sequence[int] = (768,), batch_size: int = 0) -> Geometry:
    """Measure the geometry of a store in this process."""
    config = AnalysisConfig(tuple(patch_sizes), tuple(widths), TrainingModel(TimestepConfig(), 0.05))
    moments = rank0_value(measure_moments(store, patch_sizes, "cpu", SingleProcess(), batch_size))
    return config.geometry_of(moments, store)


@cache
def geometry() -> Geometry:
    """Return the geometry of smooth latents."""
    return analyze(GaussianStore(), [1, 2], [64])


def protocol(checkpoint: str) -> dict[str, Any]:
    return {
        "checkpoint": hashlib.sha256(checkpoint.encode()).hexdigest(),
        "ema": "0.99",
        "solver": "heun",
        "steps": 30,
        "cfg_scale": 1.0,
        "cfg_interval": [0.0, 1.0],
        "labels": "equal",
        "seed": 0,
        "count": 1000,
        "precision": "float32",
        "autoencoder": AUTOENCODER,
        "extractor": {"name": "digits", "weights_sha256": "12" * 32, "input_size": 32},
        "reference": {"sha256": "34" * 32, "count": 1797, "images": "digits"},
        "versions": {"jlt": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
    }


def config(prediction: str, patch_size: int, seed: int, loss_space: str = "v") -> dict[str, Any]:
    return {
        "name": f"{NAMES[prediction]}/{patch_size}",
        "prediction": prediction,
        "network": {"channels": 16, "height": 4, "width": 4, "num_classes": 10, "patch_size": patch_size, "depth": 3},
        "loss": {"space": loss_space, "weighting": "matched", "t_eps": 0.05},
        "optimizer": {"learning_rate": 0.001, "betas": [0.9, 0.95], "weight_decay": 0.0},
        "batch_size": 128,
        "steps": 1500,
        "flips": False,
        "ema": [0.99],
        "seed": seed,
        "latents": LATENTS,
    }


def draw_grid(path: Path, noise: float, seed: int) -> None:
    """Draw ten rows of ten digits, blurred by noise."""
    grid = Image.new("L", (340, 340))
    for row in range(10):
        for column in range(10):
            ImageDraw.Draw(grid).text((34 * column + 9, 34 * row + 3), str(row), fill=255, font_size=24)
    pixels = np.asarray(grid) + noise * np.random.default_rng(seed).standard_normal((340, 340))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(path)
    seal_file(path, path.name, work_of(path.parent.parent))


def write_run(folder: Path, prediction: str, patch_size: int, seed: int, final: float, loss_space: str = "v") -> None:
    """Write one finished run whose Frechet distance falls towards `final`."""
    generator = np.random.default_rng([seed, patch_size, len(prediction)])
    write_marker(folder / "config.json", config(prediction, patch_size, seed, loss_space))
    events: list[dict[str, Any]] = [{"event": "start", "step": 0}]
    for step in range(10, 1501, 10):
        loss = (1.1 + final / 400) * step**-0.12 * (1 + 0.05 * generator.standard_normal())
        events.append({"event": "step", "step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 0.3})
    events.append({"event": "end", "step": 1500, "seconds": 31.2 + patch_size})
    write_log(folder, *events)
    for step in EVALUATED:
        distance = final * (1 + 6 * ((1500 - step) / 1500) ** 2)
        metrics = {
            "frechet_distance": distance,
            "inception_score": 9.4 - 1.2 * np.log10(1 + distance),
            "inception_score_std": 0.1,
            "label_agreement": 1 / (1 + distance / 900),
            "count": 1000,
        }
        evaluation = {"schema": 1, "step": step, "metrics": metrics, "protocol": protocol(f"{folder.name}-{step}")}
        write_sealed(folder / "evaluations" / f"step_{step:07d}.json", evaluation)
    draw_grid(folder / "samples" / "grid.png", noise=min(final, 200.0), seed=seed)


def step_event(step: int, steps: int, generator: np.random.Generator, level: float = 1.0) -> dict[str, Any]:
    """Return one logged step as the trainer writes it: a loss that falls fastest in the middle of the path."""
    t = (np.arange(10) + 0.5) / 10
    floor = 0.25 + 0.9 * (2 * t - 0.9) ** 2
    by_time = level * floor * (1 + 2.5 * np.exp(-8 * (t - 0.4) ** 2) * (1 + step) ** -0.35)
    by_time *= 1 + 0.03 * generator.standard_normal(10)
    drawn: list[float | None] = by_time.tolist()
    if generator.random() < 0.3:
        drawn[-1] = None
    warm = min(1.0, step / (0.03 * steps))
    return {
        "event": "step",
        "step": step,
        "loss": float(by_time[1:7].mean()),
        "loss_by_time": drawn,
        "learning_rate": 2e-4 * warm,
        "grad_norm": float((0.25 + 3 * np.exp(-step / (0.02 * steps))) * np.exp(0.25 * generator.standard_normal())),
        "ema_distance": {
            "0.9999": 0.06 * (step / steps + 0.02) ** -0.4 * warm,
            "0.9996": 0.03 * (step / steps + 0.02) ** -0.4 * warm,
            "sigma_rel=0.05": 0.045 * warm,
            "sigma_rel=0.1": 0.085 * warm,
        },
        "img_per_second": 1204 + 12 * generator.standard_normal(),
        "mfu": 0.41 + 0.004 * generator.standard_normal(),
        "memory_gib": 12.3,
        "waiting": abs(0.004 + 0.002 * generator.standard_normal()),
        "seconds": step * 0.85,
    }


def write_watched_run(
    folder: Path, steps: int = 50_000, reached: int = 31_400, every: int = 100, prediction: str = "x"
) -> None:
    """Write a run of two processes that is under way: continued once, two updates skipped, grids at intervals."""
    write_marker(folder / "config.json", {**config(prediction, 1, 0), "steps": steps, "batch_size": 1024})
    generator = np.random.default_rng(0)
    session = {"processes": 2, "micro_batch_size": 64, "accumulation": 8, "parallel": "ddp", "device": "cuda"}
    continued = reached // 3 // every * every
    events: list[dict[str, Any]] = [{"event": "start", "step": 0, **session}]
    for step in range(every, reached + 1, every):
        events.append(step_event(step, steps, generator))
        if step == continued:
            events += [{"event": "saved", "step": step, "pause_seconds": 0.1, "write_seconds": 2.0}]
            events += [{"event": "stopped", "step": step}, {"event": "start", "step": step, **session}]
        if step in (continued // 2 // every * every, 2 * continued):
            events.append({"event": "skipped", "step": step + 1, "loss": None, "grad_norm": None, "processes": [1]})
        if step % (reached // 9 // every * every) == 0:
            file = f"samples/step_{step:07d}.png"
            draw_grid(folder / file, noise=20 + 220 * (1 - step / reached) ** 2, seed=0)
            events.append({"event": "sampled", "step": step, "file": file})
    write_log(folder, *events)


def log_by_time(run: Path, level: float) -> None:
    """Rewrite the log of a finished run as one that has the loss by time."""
    generator = np.random.default_rng(0)
    events: list[dict[str, Any]] = [{"event": "start", "step": 0, "processes": 1, "device": "cpu"}]
    events += [step_event(step, 1500, generator, level) for step in range(50, 1501, 50)]
    events.append({"event": "end", "step": 1500, "seconds": 31.2})
    write_log(run, *events)


def write_ablation(
    folder: Path,
    predictions: Sequence[str] = ("x", "v", "eps"),
    patch_sizes: Sequence[int] = (1, 2),
    seeds: Sequence[int] = (0,),
    final: dict[tuple[str, int], float] = FINAL,
    loss_spaces: Sequence[str] = ("v",),
) -> Path:
    """Write a finished ablation; numbers of further seeds differ by at most 5% per seed."""
    systems, weights, draws = [], {}, {}
    for patch_size, prediction, space, seed in itertools.product(patch_sizes, predictions, loss_spaces, seeds):
        run = f"runs/{prediction}-{space}-p{patch_size}-s{seed}"
        distance = final[prediction, patch_size] * (1 + 0.05 * seed)
        write_run(folder / run, prediction, patch_size, seed, distance, space)
        name = f"{NAMES[prediction]}/{patch_size}"
        system = {"name": name, "prediction": prediction, "loss_space": space, "patch_size": patch_size}
        systems.append({**system, "seed": seed, "run": run})
        weights[run.removeprefix("runs/")] = hashlib.sha256(f"weights {patch_size} {seed}".encode()).hexdigest()
        draws[run.removeprefix("runs/")] = hashlib.sha256(f"draws {seed}".encode()).hexdigest()
    ablation = {
        "schema": Ablation.SCHEMA,
        "title": "Handwritten digits: matched targets",
        "recipe": "digits",
        "created": "2026-11-23T18:00:00+00:00",
        "seconds": 210.0,
        "machine": {"cpu": "Zen 5", "cores": 2, "device": "cpu"},
        "latents": LATENTS,
        "systems": systems,
        "matched": {
            "checked": ["every setting", "initial weights", "sample order, times, noise seeds and label drops"],
            "differs": ["network.patch_size", "prediction"],
            "initial_weights": weights,
            "draws": draws,
        },
        "autoencoder_psnr": 41.2,
        "classifier_accuracy": 0.985,
    }
    write_sealed(folder / "ablation.json", ablation)
    write_result(folder / GEOMETRY, geometry())
    return folder
