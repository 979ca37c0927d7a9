"""A command that takes a recipe and overrides of its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import Command, Positional
from jlt.config import TrainConfig, in_steps
from jlt.errors import unknown_name
from jlt.experiments.recipes import images_of_recipe, renamed, resolve_recipe


@dataclass(frozen=True, kw_only=True)
class RecipeCommand(Command):
    """A verb whose remaining words override settings of a recipe."""

    recipe: Annotated[str, Positional, tyro.conf.arg(metavar="RECIPE")]

    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def reject_misspelt(self) -> None:
        """Raise UsageError for a remaining word that is nearly one of the verb's own options."""
        own = [f"--{entry.name.replace('_', '-')}" for entry in dataclasses.fields(self)]
        settings = [f"--{entry.name.replace('_', '-')}" for entry in dataclasses.fields(TrainConfig)]
        for word in self.overrides:
            if word.startswith("--") and "." not in word and word.replace("_", "-") not in settings:
                raise unknown_name("option", word, [*own, *settings])

    def resolve(self, latents: Path | None) -> TrainConfig:
        """Return the recipe for a latent store's shape with the remaining words applied."""
        from jlt.latents.manifest import read_manifest

        self.reject_misspelt()
        manifest = read_manifest(latents) if latents else None
        base = resolve_recipe(self.recipe, manifest.shape if manifest else None)
        prog = f"jlt {type(self).__name__.lower()} {self.recipe}"
        config = tyro.cli(TrainConfig, args=self.overrides, default=base, prog=prog, config=PARSING)
        return renamed(in_steps(config, manifest.count if manifest else images_of_recipe(self.recipe)))


PARSING = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
