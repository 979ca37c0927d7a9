"""How far an ablation is, read from its run folders: workers write logs, and nobody has to talk to anybody."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlt.networks.flops import forward_flops, training_flops
from jlt.runtime.progress import bar
from jlt.sampling.solvers import network_evaluations

if TYPE_CHECKING:
    from jlt.experiments.ablation_run import AblationRun


class AblationProgress(contextlib.AbstractContextManager["AblationProgress"]):
    """Shows the share of all arithmetic that is done, with time left, while the runs of an ablation go on."""

    def __init__(self, systems: Sequence[AblationRun]) -> None:
        self.systems = systems
        self.total = sum(_work(system, system.config.steps, len(system.evaluated_steps)) for system in systems)

    def done(self) -> float:
        """Return the arithmetic that is behind us, in operations."""
        return sum(_work(system, last_step(system.run), _evaluated(system)) for system in self.systems)

    def __enter__(self) -> AblationProgress:
        self._bar = bar("training and evaluating", self.total)
        self._bar.__enter__()
        self.poll()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def poll(self) -> None:
        """Show the present state."""
        active = [
            f"{system.config.name} {last_step(system.run)}/{system.config.steps}"
            for system in self.systems
            if last_step(system.run) > 0 and _evaluated(system) < len(system.evaluated_steps)
        ]
        self._bar.show(self.done(), ", ".join(active))


def _work(system: AblationRun, steps: int, evaluations: int) -> float:
    network, sample = system.config.network, system.sample
    evaluation = forward_flops(network) * network_evaluations(sample.solver, sample.steps) * sample.num
    return training_flops(network) * system.config.batch_size * steps + evaluation * evaluations


def _evaluated(system: AblationRun) -> int:
    """Return how many of the system's own points are measured; other evaluations may lie beside them."""
    found = {path.name.partition("-")[0] for path in system.run.glob("evaluations/step_*.json")}
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
