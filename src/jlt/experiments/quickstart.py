"""The quickstart: from scanned digits to a report on which prediction their latent space favours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jlt.config import PREDICTIONS
from jlt.experiments.ablation import ablate, worker_count
from jlt.experiments.ablation_plan import AblationConfig
from jlt.experiments.analysis import AnalysisConfig, measure_geometry
from jlt.experiments.recipes import DIGITS_SAMPLING, resolve_recipe
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding import encode
from jlt.latents.store import LatentStore
from jlt.report.page import write_report
from jlt.results.ablation import Ablation
from jlt.results.geometry import TrainingModel
from jlt.runtime.environment import default_device
from jlt.runtime.progress import inform
from jlt.storage.folders import Claim, require_unlinked

ENCODING = EncodeConfig(
    images="digits", autoencoder="tiny", resolution=32, batch_size=256, flips=False, dtype="float32"
)
PATCH_SIZES = (1, 2)


def quickstart(
    out: Path, seeds: tuple[int, ...], workers: int | None, steps: int | None, command: str
) -> tuple[Ablation, Path]:
    """Encode, analyse, train, sample, evaluate and report, or resume; return the ablation and its page."""
    config, workers = quickstart_ablation(seeds, steps), worker_count(workers, default_device())
    claim, latents = Claim(out, "quickstart.json", {"schema": 1}), out / "latents"
    require_unlinked(out, latents)
    with claim.hold():
        claim.begin()
    inform("1/4 encoding the digits")
    encode(ENCODING, latents)
    store = LatentStore.open(latents)

    inform("2/4 measuring the geometry of their latents")
    model = TrainingModel.of(config.train)
    measure_geometry(store, out, AnalysisConfig(PATCH_SIZES, (config.train.network.hidden_size,), model))

    runs = len(config.prediction) * len(config.patch_size) * len(config.seed)
    inform(f"3/4 training {runs} systems for {config.train.steps} steps each")
    ablation = ablate(config, latents, out, workers, command)

    inform("4/4 writing the report")
    return ablation, write_report(out)


def quickstart_ablation(seeds: tuple[int, ...], steps: int | None = None) -> AblationConfig:
    """Return the quickstart's ablation: three predictions at two patch sizes, in velocity space, one recipe for all."""
    train = resolve_recipe("digits")
    return AblationConfig(
        train=train if steps is None else dataclasses.replace(train, steps=steps),
        prediction=PREDICTIONS,
        patch_size=PATCH_SIZES,
        seed=seeds,
        sample=DIGITS_SAMPLING,
        evaluations=5,
        extractor="digits",
        title="Which target do the digits' latents favour?",
        recipe="digits",
    )
