"""Commands on checkpoints of other programs, and for them: import, export."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jlt.cli.command import AutoencoderPath, Command, Flat, Positional, Result
from jlt.errors import UsageError
from jlt.experiments.recipes import renamed
from jlt.interop.import_config import ImportConfig
from jlt.interop.pipeline_settings import ExportConfig, ExportFormat

if TYPE_CHECKING:
    from jlt.interop.importing import Imported


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Make a run of a checkpoint of JLT's authors or of JiT, or of what jlt export wrote.

    The run is sampled, evaluated, analysed and fine-tuned like any other. No code of the file runs. What a file of
    another program does not state is assumed as published, and listed.

    For example:
      jlt import checkpoint-last.pth --out runs/theirs
      jlt import hub:user/name/checkpoint-last.pth --out runs/theirs
      jlt import hub:user/exported --out runs/back
    """

    file: Annotated[str, Positional, arg(metavar="FILE")]
    """Checkpoint file (.pth), exported folder or file (.safetensors), hub:user/name/file or hub:user/name."""
    out: Path
    """Folder of the run."""
    config: Annotated[ImportConfig, Flat]

    def run(self) -> Result:
        from jlt.interop.import_pipeline import import_pipeline
        from jlt.interop.importing import read_authors_file, write_run
        from jlt.interop.sources import is_exported, local_path

        path = local_path(self.file)
        if is_exported(path):
            if self.config != ImportConfig():
                raise UsageError(f"{self.file} states everything itself: leave out all options but --out.")
            run = import_pipeline(path, self.out)
            return Result({"run": str(run)}, f"Imported: {run}")
        imported = read_authors_file(path, self.file, self.config)
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


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a checkpoint as a folder that diffusers loads without jlt.

    With --push the folder is also uploaded to the Hub. The same command leaves a complete folder as it is.

    For example:
      jlt export runs/jlt-b1 --out jlt-b1 --cfg-scale 2.9 --cfg-interval 0.1 1.0
    """

    checkpoint: Annotated[Path, Positional, arg(metavar="RUN")]
    """Run folder (its newest checkpoint) or checkpoint folder."""
    out: Path
    """Folder to write; with --format safetensors a file."""
    format: ExportFormat = "diffusers"
    """diffusers: a pipeline folder with its code; safetensors: one file of weights and settings."""
    export: Annotated[ExportConfig, Flat] = field(default_factory=ExportConfig)
    autoencoder_path: AutoencoderPath = None
    push: str = ""
    """Also upload the folder to this repository on the Hub, as user/name."""
    private: bool = False
    """Create the repository as a private one."""

    def run(self) -> Result:
        if self.push and self.format != "diffusers":
            raise UsageError("--push uploads a pipeline folder: leave out --format.")
        from jlt.interop.export import export_file, export_folder, push_folder, require_repository
        from jlt.runtime.environment import default_device
        from jlt.training.checkpoint import open_checkpoint

        if self.push:
            require_repository(self.push)
        checkpoint = open_checkpoint(self.checkpoint)
        if self.format == "safetensors":
            written = export_file(checkpoint, self.out, self.export)
        else:
            place = (self.autoencoder_path, self.push)
            written = export_folder(checkpoint, self.out, self.export, default_device(), *place)
        address = push_folder(written, self.push, self.private) if self.push else None
        return Result({"written": str(written), "address": address}, f"Exported: {address or written}")
