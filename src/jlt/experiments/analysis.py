"""`jlt analyze`: the geometry of a latent store, and the errors of networks on it, in a folder with a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jlt.errors import JLTError
from jlt.experiments.error_by_direction import Networks, measure_error_by_direction, require_comparable
from jlt.geometry.accumulate import Latents, Moments, measure_moments
from jlt.geometry.assemble import assemble_geometry
from jlt.patches import require_divisor
from jlt.report.geometry_sentences import caution_sentences
from jlt.report.page import write_report
from jlt.results.files import read_result, write_result
from jlt.results.geometry import GEOMETRY, INSIDE, ErrorByDirection, Geometry, TrainingModel
from jlt.runtime.processes import Group, SingleProcess, rank0_value
from jlt.runtime.progress import inform
from jlt.storage.files import claim_folder


@dataclass(frozen=True)
class AnalysisConfig:
    """The patch sizes of an analysis, and the widths and the training that its forecast is for."""

    patch_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    model: TrainingModel

    def geometry_of(self, moments: Moments, store: Latents) -> Geometry:
        """Return the geometry of a store from its moments; JLTError for latents without any variance."""
        return assemble_geometry(moments, store.identity(), self.patch_sizes, self.widths, self.model)

    def matches(self, geometry: Geometry, store: Latents) -> bool:
        """Return whether a geometry is of this store and this configuration."""
        stored = (geometry.latents, geometry.patch_sizes, geometry.widths, geometry.training)
        return stored == (store.identity(), self.patch_sizes, self.widths, self.model)


def measure_geometry(
    store: Latents, folder: Path, config: AnalysisConfig, device: str = "cpu", group: Group | None = None
) -> Geometry:
    """Write `geometry.json` into a folder, or keep the one that is there if it is of the same configuration."""
    group = group or SingleProcess()
    stored = _stored(store, folder, config, group)
    return stored or _write(measure_moments(store, config.patch_sizes, device, group), store, folder, config, group)


def analyze_into(
    store: Latents,
    out: Path,
    config: AnalysisConfig,
    networks: Networks | None = None,
    device: str = "cpu",
    group: Group | None = None,
) -> tuple[Geometry, ErrorByDirection | None]:
    """Measure the geometry of a store in a folder of its own, and the errors of networks on it; write the page.

    A stored geometry of the same configuration is kept, and the store is read once. Returns the results in all
    processes. JLTError for networks that cannot be compared on this store.
    """
    group = group or SingleProcess()
    if networks is not None:
        require_comparable(networks.checkpoints, store)
    for patch_size in config.patch_sizes:
        require_divisor(patch_size, store.shape.height, store.shape.width)
    group.on_rank0(lambda: claim_folder(out, "analysis.json", {"latents": store.identity()}))
    if networks is None:
        geometry, inside = measure_geometry(store, out, config, device, group), None
        group.on_rank0(lambda: (out / INSIDE).unlink(missing_ok=True))
    else:
        geometry, inside = _analyze_with(networks, store, out, config, device, group)
    group.on_rank0(lambda: write_report(out))
    return geometry, inside


def _analyze_with(
    networks: Networks, store: Latents, out: Path, config: AnalysisConfig, device: str, group: Group
) -> tuple[Geometry, ErrorByDirection]:
    """Write `geometry.json` and `inside.json` from one pass over the store."""
    geometry = _stored(store, out, config, group)
    patch_sizes = (networks.patch_size, *(() if geometry else config.patch_sizes))
    moments = measure_moments(store, patch_sizes, device, group)
    geometry = geometry or _write(moments, store, out, config, group)
    inside = measure_error_by_direction(networks, store, moments, device, group)
    group.on_rank0(lambda: write_result(out / INSIDE, inside))
    return geometry, inside


def _stored(store: Latents, folder: Path, config: AnalysisConfig, group: Group) -> Geometry | None:
    """Return the geometry in a folder, in all processes; None if there is no readable one of this configuration."""
    stored = group.on_rank0(lambda: _readable(folder / GEOMETRY))
    return stored if stored is not None and config.matches(stored, store) else None


def _readable(path: Path) -> Geometry | None:
    try:
        return read_result(Geometry, path) if path.exists() else None
    except JLTError as error:
        inform(f"{error} The geometry is measured again.")
        return None


def _write(moments: Moments | None, store: Latents, folder: Path, config: AnalysisConfig, group: Group) -> Geometry:
    """Write the geometry of a store from the moments in the first process, and return it in all."""

    def write() -> Geometry:
        geometry = config.geometry_of(rank0_value(moments), store)
        for text in caution_sentences(geometry):
            inform(text)
        write_result(folder / GEOMETRY, geometry)
        return geometry

    return group.on_rank0(write)
