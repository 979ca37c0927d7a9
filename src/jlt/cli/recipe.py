"""Commands that take a recipe, and overrides of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jlt.cli.command import PARSING, Command, Positional, option_names
from jlt.config import TrainConfig, in_steps
from jlt.errors import unknown_name
from jlt.experiments.recipes import images_of_recipe, renamed, resolve_recipe


@dataclass(frozen=True, kw_only=True)
class RecipeCommand(Command):
    """A command whose remaining arguments override settings of a recipe."""

    recipe: Annotated[str, Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe, such as digits or imagenet256-jlt-b1, or the config.json of a run."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def resolve(self, latents: Path | None) -> TrainConfig:
        """Return the recipe for the shape of a latent store with the overrides applied."""
        from jlt.latents.manifest import read_manifest

        self._require_known_options()
        manifest = read_manifest(latents) if latents else None
        base = resolve_recipe(self.recipe, manifest.shape if manifest else None)
        prog = f"jlt {type(self).__name__.lower()} {self.recipe}"
        config = tyro.cli(TrainConfig, args=self.overrides, default=base, prog=prog, **PARSING)
        return renamed(in_steps(config, manifest.count if manifest else images_of_recipe(self.recipe)))

    def _require_known_options(self) -> None:
        """Raise UsageError for an override that is no setting, with the nearest option of the command or setting."""
        settings = option_names(TrainConfig)
        for argument in self.overrides:
            name = argument.partition("=")[0].replace("_", "-")
            if name.startswith("--") and "." not in name and name not in settings:
                raise unknown_name("option", name, [*option_names(type(self)), *settings])


def print_settings(command: str, recipe: str) -> None:
    """Print the help of a recipe's settings, with their values as defaults, and exit."""
    prog, description = f"jlt {command} {recipe}", "Settings of the recipe, which the command can override."
    base = resolve_recipe(recipe)
    tyro.cli(TrainConfig, args=["--help"], default=base, prog=prog, description=description, **PARSING)
