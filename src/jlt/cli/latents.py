"""Commands on latent stores: encode, verify, analyze."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jlt.cli.command import Command, Flat, Folder, LatentsPath, Result
from jlt.config import LossSpace, Prediction, TimestepConfig
from jlt.errors import few
from jlt.latents.encode_config import EncodeConfig
from jlt.runtime.processes import join_group

if TYPE_CHECKING:
    from jlt.latents.manifest import StoreManifest


@dataclass(frozen=True, kw_only=True)
class Encode(Command):
    """Encode images into a latent store.

    Run the same command again to resume. Several processes share the work:
      jlt --processes 8 encode ...

    To adopt shards that the authors' program wrote, without copying them:
      jlt encode --adopt DIR --help

    For example:
      jlt encode --images digits --autoencoder tiny --resolution 32 --out latents
    """

    out: Path
    """Folder of the latent store."""
    config: Annotated[EncodeConfig, Flat]

    def run(self) -> Result:
        from jlt.latents.encoding import encode
        from jlt.runtime.environment import default_device

        return _store_result(encode(self.config, self.out, default_device()), self.out)


@dataclass(frozen=True, kw_only=True)
class Adopt(Command):
    """Make a latent store of shards that the authors' program wrote: only a manifest is added to their folder.

    For example:
      jlt encode --adopt shards --resolution 256
    """

    adopt: Path
    """Folder of latents_rank*_shard*.safetensors."""
    autoencoder: str = "flux2"
    """Autoencoder that made the latents and decodes samples: flux2, taef2, kl, pixels or tiny."""
    autoencoder_path: str | None = None
    """Weights of the autoencoder: a folder or Hub id. Default: the published ones; kl has no default."""
    resolution: int | None = None
    """Side of the images in pixels. Default: the height of the latents times the autoencoder's downsampling."""
    class_names: Path | None = None
    """Text file with one class name per line. Default: the class numbers."""

    def run(self) -> Result:
        from jlt.images.sharded import read_class_names
        from jlt.latents.adoption import adopt

        names = read_class_names(self.class_names) if self.class_names else None
        manifest = adopt(self.adopt, self.autoencoder, self.autoencoder_path, self.resolution, names)
        return _store_result(manifest, self.adopt)


LISTED_CLASSES = 10


def _store_result(manifest: StoreManifest, folder: Path) -> Result:
    shape = f"{manifest.channels}x{manifest.height}x{manifest.width}"
    text = f"{manifest.count} latents of {shape} in {folder}, overall standard deviation {manifest.std:.3f}"
    number = len(manifest.class_names)
    text += f"\n{number:,} class{'es' if number > 1 else ''}: {few(manifest.class_names, LISTED_CLASSES)}"
    if manifest.skipped:
        first, more = manifest.skipped[0], len(manifest.skipped) - 1
        text += f"\nSkipped, and listed in the manifest: {first.image}, which {first.reason}"
        text += f", and {more} more" if more else ""
    return Result(manifest.content(), text)


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check every file that jlt wrote into a folder.

    Reads stores, runs, checkpoints, samples and results, compares them with their hashes, and lists every problem. The
    exit code is 1 if there is one.

    For example:
      jlt verify latents
    """

    folder: Folder
    """Folder of a latent store, a run, a checkpoint, samples, a comparison or an analysis."""
    seal: bool = False
    """Accept files without a hash as they are (an earlier version wrote them, or you edited them), and seal them."""

    def run(self) -> Result:
        from jlt.experiments.verification import verify

        problems = verify(self.folder, self.seal)
        text = "\n".join(problems) or f"{self.folder} is valid."
        return Result({"folder": str(self.folder), "problems": problems}, text, ok=not problems)


@dataclass(frozen=True, kw_only=True)
class Analyze(Command):
    """Forecast from a latent store which prediction suits it.

    Measures the target geometry of eq. 9-13 of docs/notation.md. Several processes share the work:
      jlt --processes 8 analyze ...

    For example:
      jlt analyze --latents latents --out geometry --patch-size 1 2 --width 768
    """

    latents: LatentsPath
    out: Path
    """Folder for geometry.json and report.html."""
    patch_size: tuple[int, ...] = (1, 2)
    """Patch sizes: sides of a token in latent positions."""
    width: tuple[int, ...] = ()
    """Widths of the networks in the forecast. Default: those of --checkpoint, or 768 (JLT-B)."""
    timesteps: Annotated[TimestepConfig, Flat] = field(default_factory=TimestepConfig)
    """The training times in the forecast."""
    t_eps: float = 0.05
    """Smallest denominator of a readout in the matched loss of the forecast (eq. 5); 0 gives eq. 13 without a clamp."""
    loss_space: LossSpace = "v"
    """Space of the loss in the forecast: x, eps, v or another prediction."""
    prediction: tuple[Prediction, ...] = ()
    """Predictions to forecast in addition to x, eps and v: edm, skip=S or mix=R."""
    noise_scale: float = 1.0
    """Standard deviation s of the noise in the forecast (eq. 1)."""
    checkpoint: tuple[Path, ...] = ()
    """Runs or checkpoints that were trained on these latents, or exports: also measure their error by direction."""
    ema: str = ""
    """Weights of --checkpoint, such as an EMA decay (0.9999) or none. Default: the first EMA of a run."""
    num: int = 1024
    """Latents on which the networks of --checkpoint are evaluated."""
    samples: int = 0
    """Samples of each network to compare with the data, by direction and by spatial frequency; 0 draws none."""
    steps: int = 50
    """Steps of the Heun solver that draws --samples."""
    decoder: str | None = None
    """Decoder to measure with --samples: flux2, taef2 or NAME:PLACE. Default: that of the latents."""

    def run(self) -> Result:
        from jlt.experiments.analysis import AnalysisConfig, analyze_into
        from jlt.experiments.error_by_direction import Networks
        from jlt.interop.sources import open_source
        from jlt.latents.store import LatentStore
        from jlt.report.terminal import geometry_table
        from jlt.results.files import result_json
        from jlt.results.geometry import TrainingModel
        from jlt.runtime.environment import default_device, device_of_float64

        opened = [open_source(path) for path in self.checkpoint]
        networks = Networks(opened, self.num, self.ema, self.samples, self.steps, self.decoder) if opened else None
        known = sorted({checkpoint.config.network.hidden_size for checkpoint in opened})
        widths = self.width or tuple(known) or (768,)
        model = TrainingModel(self.timesteps, self.t_eps, self.loss_space, self.noise_scale, further=self.prediction)
        config = AnalysisConfig(self.patch_size, widths, model)
        store, device = LatentStore.open(self.latents), device_of_float64(default_device())
        with join_group(device) as group:
            geometry, inside = analyze_into(store, self.out, config, networks, device, group)
        data = result_json(geometry) | ({"inside": result_json(inside)} if inside else {})
        return Result(data, f"{geometry_table(geometry, inside)}\n\nOpen {self.out / 'report.html'}")
