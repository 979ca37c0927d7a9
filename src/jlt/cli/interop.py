"""Commands on checkpoints of other programs, and for them: import, export."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jlt.cli.command import AutoencoderPath, CheckpointPath, Command, Flat, Positional, Result
from jlt.errors import UsageError
from jlt.experiments.recipes import renamed
from jlt.interop.import_config import ImportConfig
from jlt.interop.pipeline_settings import ExportConfig, ExportFormat

if TYPE_CHECKING:
    from jlt.interop.importing import Imported
    from jlt.training.checkpoint import Checkpoint


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
        from jlt.interop.importing import write_run
        from jlt.interop.read_authors import read_authors_file
        from jlt.interop.read_export import read_export
        from jlt.interop.sources import is_exported, local_path

        path = local_path(self.file)
        if not is_exported(path):
            imported = read_authors_file(path, self.file, self.config)
            imported = dataclasses.replace(imported, config=renamed(imported.config))
        elif self.config == ImportConfig():
            imported = read_export(path, self.file)
        else:
            raise UsageError(f"{self.file} states everything itself: leave out all options but --out.")
        checkpoint = write_run(imported, self.out)
        config = imported.config
        data = {
            "run": str(self.out),
            "checkpoint": str(checkpoint.folder),
            "name": config.name,
            "step": imported.step,
            "prediction": config.prediction,
            "ema": checkpoint.ema_names(),
            **imported.facts,
        }
        return Result(data, _description(imported, checkpoint, self.out))


def _description(imported: Imported, checkpoint: Checkpoint, out: Path) -> str:
    from jlt.networks.transformer import count_network

    config, facts = imported.config, imported.facts
    network, autoencoder = config.network, imported.latents["autoencoder"]
    shape = f"{network.channels}x{network.height}x{network.width}"
    embedding = f"{facts['patch_embedding']}, " if "patch_embedding" in facts else ""
    counts = {"updates": "updates", "epochs": "epochs; the number of updates is unknown", "nothing": "unknown"}
    assumed = ", ".join(f"{name} {value}" for name, value in facts.get("assumed", {}).items())
    unknown, absent = ", ".join(facts.get("not_reproduced", ())), facts.get("network_from", "model")
    positions = "fixed" if network.fixed_positions else "as stored" if network.learned_positions else ""
    lines = {
        "latents": f"{shape} of {autoencoder['name']}, {network.num_classes} classes",
        "patch embedding": f"{embedding}patch {network.patch_size}",
        "positions": positions and f"pos_embed, {positions}",
        "class tokens": network.context_tokens and f"{network.context_tokens}, before block {network.context_start}",
        "averages": ", ".join(checkpoint.ema_names()) or "none",
        "step": f"{imported.step}, {counts[facts['step_counts']]}",
        "raw weights": absent != "model" and f"absent: those of {absent} take their place",
        "assumed": assumed,
        "not reproduced": unknown and f"{unknown}: jlt train has no such setting",
    }
    head = f"{count_network(network) / 1e6:.1f} M parameters, predicts {config.prediction}"
    return "\n".join(
        [
            f"Imported into {out}: {config.name}, {head}",
            *(f"  {name:<15}  {line}" for name, line in lines.items() if line),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a checkpoint as a folder that diffusers loads without jlt.

    With --push the folder is also uploaded to the Hub. The same command leaves a complete folder as it is.

    For example:
      jlt export runs/jlt-b1 --out jlt-b1 --cfg-scale 2.9 --cfg-interval 0.1 1.0
    """

    checkpoint: Annotated[CheckpointPath, Positional, arg(metavar="RUN")]
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
        from jlt.interop.sources import open_source
        from jlt.runtime.environment import default_device

        if self.push:
            require_repository(self.push)
        checkpoint = open_source(self.checkpoint)
        if self.format == "safetensors":
            written = export_file(checkpoint, self.out, self.export)
        else:
            place = (self.autoencoder_path, self.push)
            written = export_folder(checkpoint, self.out, self.export, default_device(), *place)
        address = push_folder(written, self.push, self.private) if self.push else None
        return Result({"written": str(written), "address": address}, f"Exported: {address or written}")
