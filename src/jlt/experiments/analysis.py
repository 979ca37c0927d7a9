"""`jlt analyze`: the geometry of a latent store, and the errors of networks on it, in a folder with a page."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from jlt.errors import JLTError, UsageError
from jlt.experiments.error_by_direction import Networks, measure_error_by_direction, require_measurable
from jlt.geometry.accumulate import Latents, Moments, measure_moments
from jlt.geometry.assemble import assemble_geometry
from jlt.latents.store import LatentStore, ShardCheck
from jlt.patches import require_divisor
from jlt.report.geometry_text import caution_sentences
from jlt.report.page import write_report
from jlt.results.files import read_result, write_result
from jlt.results.geometry import GEOMETRY, INSIDE, ErrorByDirection, Geometry, TrainingModel
from jlt.runtime.processes import Group, SingleProcess, rank0_value
from jlt.runtime.progress import inform
from jlt.storage.folders import Claim


@dataclass(frozen=True)
class AnalysisConfig:
    """The patch sizes of an analysis, and the widths and the training that its forecast is for."""

    patch_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    model: TrainingModel

    def __post_init__(self) -> None:
        if not self.patch_sizes or min((*self.widths, *self.patch_sizes)) < 1:
            raise UsageError("Patch sizes and widths need numbers of 1 or more.")

    def geometry_of(self, moments: Moments, store: Latents) -> Geometry:
        """Return the geometry of a store from its moments; JLTError for latents without any variance."""
        return assemble_geometry(moments, store.identity(), self.patch_sizes, self.widths, self.model)


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
    group, inside = group or SingleProcess(), None
    if networks is not None:
        require_measurable(networks, store)
    for patch_size in config.patch_sizes:
        require_divisor(patch_size, store.shape.height, store.shape.width)
    claim = Claim(out, "analysis.json", {"latents": store.identity()})
    with contextlib.ExitStack() as held:
        group.on_rank0(lambda: held.enter_context(claim.hold()))
        group.on_rank0(claim.begin)
        further = (networks.patch_size,) if networks else ()
        geometry, moments = measure_geometry(store, out, config, device, group, further)
        if networks:
            inside = measure_error_by_direction(networks, store, moments, device, group)

        def write() -> None:
            if inside:
                write_result(out / INSIDE, inside)
            else:
                (out / INSIDE).unlink(missing_ok=True)
            write_report(out)

        group.on_rank0(write)
    return geometry, inside


def measure_geometry(
    store: Latents,
    folder: Path,
    config: AnalysisConfig,
    device: str = "cpu",
    group: Group | None = None,
    further: tuple[int, ...] = (),
) -> tuple[Geometry, Moments | None]:
    """Return the geometry in a folder, in all processes, and moments for further patch sizes, in the first one.

    JLTError for a store with a damaged shard. `geometry.json` is written, or kept if it is of the same configuration.
    """
    group = group or SingleProcess()
    stored = group.on_rank0(lambda: _stored(store, folder / GEOMETRY, config))
    patch_sizes = (*further, *(() if stored else config.patch_sizes))
    check = ShardCheck(store, group.rank, group.size) if patch_sizes and isinstance(store, LatentStore) else None
    with check or contextlib.nullcontext():
        moments = measure_moments(store, patch_sizes, device, group) if patch_sizes else None

    def write() -> Geometry:
        geometry = config.geometry_of(rank0_value(moments), store)
        for text in caution_sentences(geometry):
            inform(text)
        write_result(folder / GEOMETRY, geometry)
        return geometry

    return stored or group.on_rank0(write), moments


def _stored(store: Latents, path: Path, config: AnalysisConfig) -> Geometry | None:
    """Return the geometry in a file; None if there is no readable one of this store and configuration."""
    try:
        found = read_result(Geometry, path) if path.exists() else None
    except JLTError as error:
        inform(f"{error} The geometry is measured again.")
        return None
    wanted = (store.identity(), config.patch_sizes, config.widths, config.model)
    return found if found and (found.latents, found.patch_sizes, found.widths, found.training) == wanted else None
