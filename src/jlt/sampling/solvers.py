"""Solvers of dz/dt = v(z, t) from noise at t = 0 to data at t = 1: a step each, over a grid of times.

A solver sees a velocity and never labels, networks or guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from jlt.config import Solver
from jlt.errors import unknown_name

Velocity = Callable[[Float[Tensor, "b *rest"], float], Float[Tensor, "b *rest"]]
Step = Callable[[Velocity, Float[Tensor, "b *rest"], float, float], Float[Tensor, "b *rest"]]


def euler_step(velocity: Velocity, z: Float[Tensor, "b *rest"], t: float, t_next: float) -> Float[Tensor, "b *rest"]:
    """First order: follow the velocity at the start of the step."""
    return z + (t_next - t) * velocity(z, t)


def heun_step(velocity: Velocity, z: Float[Tensor, "b *rest"], t: float, t_next: float) -> Float[Tensor, "b *rest"]:
    """Second order: follow the mean of the velocities at the start and at the Euler step's end."""
    start = velocity(z, t)
    end = velocity(z + (t_next - t) * start, t_next)
    return z + (t_next - t) / 2 * (start + end)


STEPS: dict[Solver, Step] = {"euler": euler_step, "heun": heun_step}
EVALUATIONS: dict[Solver, int] = {"euler": 1, "heun": 2}


def solve(
    solver: Solver, velocity: Velocity, noise: Float[Tensor, "b *rest"], grid: Sequence[float]
) -> Float[Tensor, "b *rest"]:
    """Eq. 8: walk the grid from noise; the last step is Euler, so the velocity is never asked for at the grid's end."""
    if solver not in STEPS:
        raise unknown_name("solver", solver, STEPS)
    z = noise
    intervals = list(pairwise(grid))
    for t, t_next in intervals[:-1]:
        z = STEPS[solver](velocity, z, t, t_next)
    return euler_step(velocity, z, *intervals[-1])


def network_evaluations(solver: Solver, steps: int) -> int:
    """Return the number of function evaluations (NFE) of `solve`, for each branch of guidance."""
    return EVALUATIONS[solver] * (steps - 1) + 1
