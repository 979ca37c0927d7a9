"""The command that writes a checkpoint for other programs: export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jlt.cli.command import AutoencoderPath, Command, Flat, Positional, Result
from jlt.errors import UsageError
from jlt.interop.pipeline_settings import ExportConfig, ExportFormat


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
