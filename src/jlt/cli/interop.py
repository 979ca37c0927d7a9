"""Commands on checkpoints of other programs: import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jlt.cli.command import Command, Flat, Positional, Result
from jlt.experiments.recipes import renamed
from jlt.interop.import_config import ImportConfig

if TYPE_CHECKING:
    from jlt.interop.importing import Imported


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Make a run of a checkpoint of another program: that of JLT's authors, or JiT.

    The run is sampled, evaluated, analysed and fine-tuned like any other. No code of the file runs. What the file
    does not state is assumed as published, and listed.

    For example:
      jlt import checkpoint-last.pth --out runs/theirs
      jlt import hub:user/name/checkpoint-last.pth --out runs/theirs
    """

    file: Annotated[str, Positional, arg(metavar="FILE")]
    """Checkpoint file of PyTorch's (.pth), or hub:user/name/file."""
    out: Path
    """Folder of the run."""
    config: Annotated[ImportConfig, Flat]

    def run(self) -> Result:
        from jlt.interop.importing import read_source, write_run

        imported = read_source(self.file, self.config)
        imported = dataclasses.replace(imported, config=renamed(imported.config))
        checkpoint = write_run(imported, self.out)
        config = imported.config
        facts = {"prediction": config.prediction, "ema": list(config.ema), **imported.facts}
        data = {
            "run": str(self.out),
            "checkpoint": str(checkpoint),
            "name": config.name,
            "step": imported.step,
            **facts,
        }
        return Result(data, _description(imported, self.out))


def _description(imported: Imported, out: Path) -> str:
    from jlt.networks.transformer import count_network

    config, facts = imported.config, imported.facts
    network, autoencoder = config.network, imported.latents["autoencoder"]
    shape = f"{network.channels}x{network.height}x{network.width}"
    parameters = f"{count_network(network) / 1e6:.1f} M parameters"
    lines = [
        f"Imported into {out}: {config.name}, {parameters}, predicts {config.prediction}",
        f"  latents          {shape} of {autoencoder['name']}, {network.num_classes} classes",
        f"  patch embedding  {facts['patch_embedding']}, patch {network.patch_size}",
    ]
    if network.fixed_positions or network.learned_positions:
        lines.append(f"  positions        pos_embed, {'fixed' if network.fixed_positions else 'as stored'}")
    if network.context_tokens:
        lines.append(f"  class tokens     {network.context_tokens}, before block {network.context_start}")
    lines.append(f"  averages         {', '.join(map(repr, config.ema)) or 'none'}")
    counts = {"updates": "updates", "epochs": "epochs; the number of updates is unknown", "nothing": "unknown"}
    lines.append(f"  step             {imported.step}, {counts[facts['step_counts']]}")
    if facts["network_from"] != "model":
        lines.append(f"  raw weights      absent: those of {facts['network_from']} take their place")
    if facts["assumed"]:
        assumed = ", ".join(f"{name} {value}" for name, value in facts["assumed"].items())
        lines.append(f"  assumed          {assumed}")
    if facts["not_reproduced"]:
        lines.append(f"  not reproduced   {', '.join(facts['not_reproduced'])}: jlt train has no such setting")
    return "\n".join(lines)
