"""One run of an ablation, and how far all of them are, read from the logs that their workers write."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.config import LossSpace, SampleConfig, TrainConfig
from jlt.networks.transformer import forward_flops, training_flops
from jlt.results.run import evaluation_files
from jlt.runtime.progress import bar
from jlt.sampling.solvers import network_evaluations


@dataclass(frozen=True)
class AblationRun:
    """One run of an ablation: what is trained, where, and how it is measured. Sent to worker processes."""

    config: TrainConfig
    run: Path
    latents: Path
    reference: Path
    extractor: str
    sample: SampleConfig
    device: str
    features_path: str = ""
    anisotropy: float | None = None
    width: int | None = None
    """The point on either axis, None if it is no axis of the ablation."""

    @property
    def variant(self) -> str:
        """The point on the axes that the network's name does not show, as text; empty if there is no such axis."""
        parts = {"anisotropy": self.anisotropy, "width": self.width}
        return ", ".join(f"{axis} {value:g}" for axis, value in parts.items() if value is not None)

    @property
    def setting(self) -> tuple[str, int, LossSpace]:
        """Variant, patch size and loss space: systems that share them share a forecast."""
        return self.variant, self.config.network.patch_size, self.config.loss.space

    @property
    def evaluated_steps(self) -> list[int]:
        """Steps at which the run is measured: its checkpoints."""
        return [
            *range(self.config.checkpoint_every, self.config.steps, self.config.checkpoint_every),
            self.config.steps,
        ]


class AblationProgress(contextlib.AbstractContextManager["AblationProgress"]):
    """Shows how much of all arithmetic is done, and the time left."""

    def __init__(self, systems: Sequence[AblationRun]) -> None:
        self.systems = systems
        self.total = sum(_work(system, system.config.steps, len(system.evaluated_steps)) for system in systems)

    def __enter__(self) -> AblationProgress:
        self._bar = bar("training and evaluating", self.total)
        self._bar.__enter__()
        self.poll()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def poll(self) -> None:
        """Show the present state."""
        done, active = 0.0, []
        for system in self.systems:
            step, evaluated = last_step(system.run), _evaluated(system)
            done += _work(system, step, evaluated)
            if step > 0 and evaluated < len(system.evaluated_steps):
                active.append(f"{system.config.name} {step}/{system.config.steps}")
        self._bar.show(done, ", ".join(active))


def _work(system: AblationRun, steps: int, evaluations: int) -> float:
    """Return the arithmetic of some steps and evaluations, in operations."""
    network, sample = system.config.network, system.sample
    evaluation = forward_flops(network) * network_evaluations(sample.solver, sample.steps) * sample.num
    return training_flops(network) * system.config.batch_size * steps + evaluation * evaluations


def _evaluated(system: AblationRun) -> int:
    """Return how many of the ablation's own steps are measured; the run may have further evaluations."""
    found = {path.name.partition("-")[0] for path in evaluation_files(system.run)}
    return len(found & {f"step_{step:07d}" for step in system.evaluated_steps})


def last_step(run: Path) -> int:
    """Return the last logged step of a run, 0 before the first."""
    path = run / "log.jsonl"
    if not path.exists():
        return 0
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(line).get("step", 0)
    return 0
