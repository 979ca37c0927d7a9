"""Commands that plan and train a recipe: plan, train; and what commands on a recipe share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jlt.cli.command import PARSING, Check, Command, Positional, Result, option_names, require_known
from jlt.config import TrainConfig, in_steps
from jlt.errors import UsageError
from jlt.experiments.recipes import RECIPES, images_of_recipe, renamed, resolve_recipe
from jlt.report.benchmark_table import plan_table
from jlt.storage.codec import to_json

if TYPE_CHECKING:
    from jlt.latents.manifest import StoreManifest


@dataclass(frozen=True, kw_only=True)
class RecipeCommand(Command):
    """A command whose remaining arguments override settings of a recipe."""

    recipe: Annotated[str, Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe (jlt train --help lists them), or the config.json of a run."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def resolve(self, latents: Path | None) -> TrainConfig:
        """Return the recipe for the shape of a latent store with the overrides applied."""
        from jlt.latents.manifest import read_manifest

        require_known(self.overrides, [*option_names(type(self)), *option_names(TrainConfig)])
        manifest = read_manifest(latents) if latents else None
        base = resolve_recipe(self.recipe, manifest.shape if manifest else None)
        prog = f"jlt {type(self).__name__.lower()} {self.recipe}"
        config = tyro.cli(TrainConfig, args=self.overrides, default=base, prog=prog, **PARSING)
        return renamed(in_steps(config, manifest.count if manifest else images_of_recipe(self.recipe)))


def print_settings(command: str, recipe: str | None) -> None:
    """Print the help of a recipe's settings, with their values as defaults, and exit; without one of all recipes."""
    listed = "".join(f"\n  {name:22}{known.purpose}" for name, known in RECIPES.items())
    shown = recipe or "photos"
    description = f"Settings that the command can override, with the values of {shown}."
    description = description if recipe else f"Recipes:{listed}\n\n{description}"
    prog, base = f"jlt {command} {recipe or 'RECIPE'}", resolve_recipe(shown)
    tyro.cli(TrainConfig, args=["--help"], default=base, prog=prog, description=description, **PARSING)


@dataclass(frozen=True, kw_only=True)
class Plan(RecipeCommand):
    """Estimate memory, disk space and hours of a training.

    Each figure states where it comes from. Any setting of the recipe can be overridden, as in jlt train.

    For example:
      jlt plan imagenet256-jlt-b1 --gpus 8 --gpu H200 --micro-batch-size 64
    """

    gpus: int = 1
    """Number of GPUs, with one process each."""
    gpu: str = "H100"
    """Name of the GPU, such as A100-80, H200 or RTX-4090; cpu is this machine."""
    mfu: float | None = None
    """Share of the peak rate that training reaches; jlt benchmark train measures it. Default: an assumption."""
    measure: bool = False
    """Also make one update of one process on this machine, and report its peak memory and time."""
    latents: Path | None = None
    """Latent store that the run trains on. Default: shape and number of latents of the recipe."""

    def run(self) -> Result:
        config = self.resolve(self.latents)
        from jlt.benchmarks.plan import DEFAULT_MFU, describe_hardware, describe_latents, make_plan
        from jlt.latents.manifest import read_manifest

        manifest = read_manifest(self.latents) if self.latents else None
        latents = describe_latents(config, images_of_recipe(self.recipe), manifest)
        hardware = describe_hardware(self.gpu, self.gpus, config)
        mfu = DEFAULT_MFU if self.mfu is None else self.mfu
        measured = None
        if self.measure:
            from jlt.benchmarks.train import measure_share

            measured = measure_share(config, self.gpus)
        plan = to_json(make_plan(config, latents, hardware, mfu, measured))
        return Result(plan, plan_table(plan))


@dataclass(frozen=True, kw_only=True)
class Train(RecipeCommand):
    """Train a recipe on a latent store.

    Run the same command again to resume. Any setting of the recipe can be overridden, as listed below.

    For example:
      jlt train digits --latents latents --out run --prediction v --network.depth 4
    """

    latents: Path | None = None
    """Folder of the latent store."""
    out: Path | None = None
    """Folder of the run."""
    check: Check = True
    verify_latents: bool = False
    """First read the whole latent store and compare it with its hashes."""
    print_config: bool = False
    """Print the settings of the run and exit."""

    def run(self) -> Result:
        config = self.resolve(self.latents)
        if self.print_config:
            return Result(to_json(config), json.dumps(to_json(config), indent=2))
        if self.latents is None or self.out is None:
            raise UsageError("Training needs --latents DIR and --out RUN.")
        from jlt.experiments.run_training import train_and_watch

        def check(manifest: StoreManifest, device: str, processes: int) -> None:
            if self.check:
                from jlt.benchmarks.plan import check_affordable

                check_affordable([config], manifest, device, processes)

        checkpoint = train_and_watch(config, self.latents, self.out, self.verify_latents, check)
        return Result({"run": str(self.out), "checkpoint": str(checkpoint)}, f"Trained: {checkpoint}")
