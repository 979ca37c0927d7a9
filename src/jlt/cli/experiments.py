"""Commands that compare systems: quickstart, ablate, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import Command, Positional, Result, command_line
from jlt.cli.recipe import RecipeCommand
from jlt.config import LossSpace, Prediction, SampleConfig
from jlt.experiments.recipes import DIGITS_SAMPLING


@dataclass(frozen=True, kw_only=True)
class Quickstart(Command):
    """From scanned digits to a report on which prediction target their latent space favours.

    Interrupt it as you like: the same words continue it.

    For example:

      jlt quickstart --out quickstart --seeds 0 1 2
    """

    out: Path = Path("quickstart")
    """Folder for latents, runs and report."""
    seeds: tuple[int, ...] = (0,)
    """One training of each system per seed."""
    workers: int | None = None
    """Systems side by side (default: 2 on a CPU, 1 on a GPU)."""
    steps: int | None = None
    """Training steps of each system, for a shorter look."""

    def run(self) -> Result:
        from jlt.experiments.quickstart import quickstart
        from jlt.report.terminal import results_table
        from jlt.results import result_json

        ablation, report = quickstart(self.out, self.seeds, self.workers, self.steps, command_line())
        data = {**result_json(ablation), "report": str(report)}
        return Result(data, f"{results_table(self.out)}\n\nOpen {report}")


@dataclass(frozen=True, kw_only=True)
class Ablate(RecipeCommand):
    """Train, measure and report systems that differ in the named axes and in nothing else. For example:

    jlt ablate digits --latents latents --out ablation --prediction x v --patch-size 1 2 --seed 0 1 2
    """

    latents: Path
    out: Path
    prediction: tuple[Prediction, ...] = ("x", "v")
    loss_space: tuple[LossSpace, ...] = ("v",)
    patch_size: tuple[int, ...] = (1,)
    seed: tuple[int, ...] = (0,)
    anisotropy: tuple[float, ...] = ()
    """Train in coordinates whose eigenvalues are raised to these powers: 0 is whitened, 1 untouched."""
    width: tuple[int, ...] = ()
    """Widths of the network (default: the recipe's)."""
    sample: SampleConfig = DIGITS_SAMPLING
    reference: str = ""
    """Real images or an .npz of their statistics; empty takes the images that the store was made from."""
    features: str = "digits"
    """Feature extractor: digits, inception or dinov2."""
    features_path: str = ""
    """Where its weights are, if not in the usual place."""
    evaluations: int = 6
    """Points of each training curve."""
    workers: int | None = None
    """Systems side by side (default: 2 on a CPU, 1 on a GPU)."""

    def run(self) -> Result:
        from jlt.experiments.ablation import AblationConfig, ablate
        from jlt.report.page import write_report
        from jlt.report.terminal import results_table
        from jlt.results import result_json

        config = AblationConfig(
            train=self.resolve(self.latents),
            prediction=self.prediction,
            loss_space=self.loss_space,
            patch_size=self.patch_size,
            seed=self.seed,
            sample=self.sample,
            evaluations=self.evaluations,
            extractor=self.features,
            features_path=self.features_path,
            reference=self.reference,
            anisotropy=self.anisotropy,
            width=self.width,
            title=f"Ablation of {self.recipe}",
            recipe=self.recipe,
        )
        ablation = ablate(config, self.latents, self.out, self.workers, command_line())
        report = write_report(self.out)
        return Result({**result_json(ablation), "report": str(report)}, f"{results_table(self.out)}\n\nOpen {report}")


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write report.html for a run (also one under way), an ablation, a quickstart, a sweep or an analysis.

    For example:

      jlt report quickstart
    """

    folder: Annotated[Path, Positional, tyro.conf.arg(metavar="DIR")]

    def run(self) -> Result:
        from jlt.report.page import write_report

        page = write_report(self.folder)
        return Result({"report": str(page)}, f"Open {page}")
