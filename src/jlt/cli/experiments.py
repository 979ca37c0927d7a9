"""Commands that compare systems and report results: quickstart, ablate, report, explain."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from jlt.cli.command import (
    Check,
    Command,
    FeatureOptions,
    Flat,
    Folder,
    LatentsPath,
    Result,
    SystemWorkers,
    command_line,
)
from jlt.cli.training import RecipeCommand
from jlt.config import SampleConfig
from jlt.experiments.ablation_plan import AblationAxes, AblationConfig
from jlt.experiments.recipes import DIGITS_SAMPLING
from jlt.report.explain_page import write_explanation
from jlt.report.page import write_report
from jlt.report.terminal import results_table
from jlt.results.ablation import Ablation
from jlt.results.files import result_json


@dataclass(frozen=True, kw_only=True)
class Quickstart(Command):
    """Train and compare x, eps and v on the bundled digits.

    Encodes the digits, forecasts the best prediction, trains six systems, and writes a report. Run the same command
    again to resume.

    For example:
      jlt quickstart --out quickstart --seeds 0 1 2
    """

    out: Path = Path("quickstart")
    """Folder of the latents, the runs and the report."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each system is trained once per seed."""
    steps: int | None = None
    """Training steps of each system. Default: those of the recipe."""
    workers: SystemWorkers = None

    def run(self) -> Result:
        from jlt.experiments.quickstart import quickstart

        return _outcome(*quickstart(self.out, self.seeds, self.workers, self.steps, command_line()))


def _outcome(ablation: Ablation, report: Path) -> Result:
    data = {**result_json(ablation), "report": str(report)}
    return Result(data, f"{results_table(report.parent)}\n\nOpen {report}")


@dataclass(frozen=True, kw_only=True)
class Ablate(RecipeCommand):
    """Train and compare systems that differ only in named axes.

    Trains and evaluates every combination of the values of the axes. Any setting of the recipe can be overridden, as in
    jlt train. Run the same command again to resume.

    For example:
      jlt ablate digits --latents latents --out ablation --prediction x v --patch-size 1 2 --seed 0 1 2
    """

    latents: LatentsPath
    out: Path
    """Folder of the runs, results and report."""
    axes: Annotated[AblationAxes, Flat] = field(default_factory=AblationAxes)
    evaluations: int = 6
    """Points of each training curve."""
    reference: str = ""
    """Real images, or an .npz of their statistics. Default: the images that the latents were encoded from."""
    features: Annotated[FeatureOptions, Flat] = field(default_factory=FeatureOptions)
    sample: SampleConfig = DIGITS_SAMPLING
    """Settings of the sampler."""
    workers: SystemWorkers = None
    check: Check = True

    def run(self) -> Result:
        from jlt.benchmarks.plan import check_affordable
        from jlt.experiments.ablation import ablate

        config = AblationConfig(
            **vars(self.axes),
            train=self.resolve(self.latents),
            sample=self.sample,
            evaluations=self.evaluations,
            extractor=self.features.features,
            features_path=str(self.features.features_path or ""),
            reference=self.reference,
            title=f"Ablation of {self.recipe}",
            recipe=self.recipe,
        )
        check = check_affordable if self.check else None
        ablation = ablate(config, self.latents, self.out, self.workers, command_line(), check)
        return _outcome(ablation, write_report(self.out))


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write report.html for a run, ablation, sweep, price or analysis.

    A run may still be training.

    For example:
      jlt report quickstart
    """

    folder: Folder
    """Folder of a run, an ablation, a quickstart, a sweep, a price or an analysis."""

    def run(self) -> Result:
        page = write_report(self.folder)
        return Result({"report": str(page)}, f"Open {page}")


@dataclass(frozen=True, kw_only=True)
class Explain(Command):
    """Write a page that shows when x, eps and v stop being equivalent.

    Sliders change the latent space and the network; curves and a forecast follow. The page is one file that needs no
    server, and also shows what was measured.

    For example:
      jlt explain --out explain.html
    """

    out: Path = Path("explain.html")
    """File to write."""

    def run(self) -> Result:
        write_explanation(self.out)
        return Result({"page": str(self.out)}, f"Open {self.out}")
