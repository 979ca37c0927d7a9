"""Solvers of dz/dt = v(z, t) from noise at t = 0 to data at t = 1: a table, or a step, over a grid of times.

A solver sees a velocity and never labels, networks or guidance. With the clean prediction x^ (eq. 4), the exponential
ones treat the linear part of

    dz/dt = (x^ - z) / (1-t)

exactly: where x^ stays the same, one step from t to s is z_s = k z_t + (s - k t) x^ with k = (1-s) / (1-t). The step
to s = 1 returns x^ itself. No solver evaluates the velocity at the end of the grid, where a readout may be singular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from jlt.config import Solver
from jlt.errors import unknown_name
from jlt.prediction import clean_from_velocity
from jlt.timesteps import half_log_snr, uniform_grid

State = Float[Tensor, "b *rest"]
"""A batch of points z of the path, or of velocities there."""
Velocity = Callable[[State, float], State]
Noise = Callable[[int], State]
"""Fresh noise, of the scale of the first, for each step of a stochastic solver."""
StepEnd = Callable[[int, State], State]
"""Receives the number of a step and z at its end, and returns the z to go on with."""


@dataclass(frozen=True)
class RungeKutta:
    """An explicit method by its tableau: stage i is evaluated at t + nodes[i] h, moved by matrix[i] of the stages.

    The last step is Euler where a stage is at the end of the step (eq. 8).
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def solve(self, velocity: Velocity, z: State, grid: Sequence[float], _fresh: Noise, step_end: StepEnd) -> State:
        """Walk the grid; no noise is added."""
        last = EULER if 1.0 in self.nodes else self
        for number, (t, t_next) in enumerate(pairwise(grid)):
            method = last if number == len(grid) - 2 else self
            z = step_end(number, method.step(velocity, z, t, t_next))
        return z

    def step(self, velocity: Velocity, z: State, t: float, t_next: float) -> State:
        """Move z from t to t_next."""
        h = t_next - t
        slopes: list[Tensor] = []
        for node, row in zip(self.nodes, self.matrix, strict=True):
            # A stage at the end of the step takes the time of the grid, not one that rounding has moved.
            slopes.append(velocity(_moved(z, h, row, slopes), t_next if node == 1 else t + node * h))
        return _moved(z, h, self.weights, slopes)


def _moved(z: State, h: float, weights: Sequence[float], slopes: Sequence[State]) -> State:
    for weight, slope in zip(weights, slopes, strict=True):
        z = z + (h * weight) * slope if weight else z
    return z


def _multistep(velocity: Velocity, z: State, grid: Sequence[float], _fresh: Noise, step_end: StepEnd) -> State:
    """DPM-Solver++(2M) (Lu et al. 2022): x^ is extrapolated along lambda = log t/(1-t) from this step and the last one.

    One velocity a step. The first two steps and the last, where lambda is infinite, take x^ as it is.
    """
    before: Tensor | None = None
    width_before = math.inf
    for number, (t, t_next) in enumerate(pairwise(grid)):
        clean = clean_from_velocity(velocity(z, t), z, t)
        width = half_log_snr(t_next) - half_log_snr(t)
        extrapolated = clean
        if before is not None and math.isfinite(width) and math.isfinite(width_before):
            extrapolated = clean + width / (2 * width_before) * (clean - before)
        z = step_end(number, _mixed(z, extrapolated, t, t_next, keep=(1 - t_next) / (1 - t)))
        before, width_before = clean, width
    return z


def _ancestral(velocity: Velocity, z: State, grid: Sequence[float], fresh: Noise, step_end: StepEnd) -> State:
    """Each step but the last draws z_s from its distribution given z_t and x = x^: a solver of weak order 1.

    It is the first-order SDE solver of DPM-Solver++ (Lu et al. 2022) and, on this path, the posterior sampling of DDPM
    (Ho et al. 2020): with k = t (1-s)^2 / (s (1-t)^2), the noise left of z_t, z_s = k z_t + (s - k t) x^ plus noise of
    variance (1-s)^2 - k^2 (1-t)^2.
    """
    for number, (t, t_next) in enumerate(pairwise(grid)):
        clean = clean_from_velocity(velocity(z, t), z, t)
        keep = t / t_next * ((1 - t_next) / (1 - t)) ** 2
        z = _mixed(z, clean, t, t_next, keep)
        if t_next < 1:
            z = z + math.sqrt((1 - t_next) ** 2 - (keep * (1 - t)) ** 2) * fresh(number)
        z = step_end(number, z)
    return z


def _mixed(z: State, clean: State, t: float, t_next: float, keep: float) -> State:
    """Return the point at t_next that keeps a share of z and has x^ in the amount of eq. 1."""
    return keep * z + (t_next - keep * t) * clean


EULER = RungeKutta(nodes=(0.0,), matrix=((),), weights=(1.0,))
MIDPOINT = RungeKutta(nodes=(0.0, 0.5), matrix=((), (0.5,)), weights=(0.0, 1.0))
HEUN = RungeKutta(nodes=(0.0, 1.0), matrix=((), (1.0,)), weights=(0.5, 0.5))
SOLVERS: dict[Solver, Callable[[Velocity, State, Sequence[float], Noise, StepEnd], State]] = {
    "euler": EULER.solve,
    "heun": HEUN.solve,
    "midpoint": MIDPOINT.solve,
    "dpmpp_2m": _multistep,
    "ancestral": _ancestral,
}


def no_noise(step: int) -> Tensor:
    """Stand in for fresh noise where a solver needs none; ValueError if it does."""
    raise ValueError(f"step {step} needs fresh noise: a stochastic solver needs its source")


def unchanged(step: int, z: State) -> State:  # noqa: ARG001
    """Go on with z as it is."""
    return z


def solve(
    solver: Solver,
    velocity: Velocity,
    noise: State,
    grid: Sequence[float],
    fresh: Noise = no_noise,
    step_end: StepEnd = unchanged,
) -> State:
    """Walk a grid of increasing times from noise, at its first, to its last; JLTError for an unknown solver."""
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    return SOLVERS[solver](velocity, noise, grid, fresh, step_end)


def evaluated_times(solver: Solver, grid: Sequence[float]) -> list[float]:
    """Return the times at which `solve` evaluates the velocity, in order."""
    times: list[float] = []

    def velocity(z: State, t: float) -> State:
        times.append(t)
        return z

    solve(solver, velocity, torch.zeros(1), grid, fresh=lambda _: torch.zeros(1))
    return times


def network_evaluations(solver: Solver, steps: int) -> int:
    """Return the number of function evaluations (NFE) of `solve`, for each branch of guidance."""
    return len(evaluated_times(solver, uniform_grid(steps).tolist()))
