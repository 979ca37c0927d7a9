"""Timing of several ways to do the same work in turn: what slows the machine for a while then slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jlt.runtime.progress import track


@dataclass(frozen=True)
class Rounds:
    """Seconds of each way in each round."""

    by_way: Mapping[str, Sequence[float]]

    def seconds(self, way: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.by_way[way])

    def ratios(self, way: str, other: str) -> list[float]:
        """Return how many times as fast as another a way is, round by round."""
        return [theirs / ours for ours, theirs in zip(self.by_way[way], self.by_way[other], strict=True)]

    def ratio(self, way: str, other: str) -> float:
        """Return the median of `ratios`."""
        return statistics.median(self.ratios(way, other))


def time_in_turn(ways: Mapping[str, Callable[[], float]], rounds: int, description: str) -> Rounds:
    """Run every way once in each round, after a round that warms up; a way returns the seconds that it took."""
    found = [{name: way() for name, way in ways.items()} for _ in track(range(1 + rounds), description)]
    return Rounds({name: [seconds[name] for seconds in found[1:]] for name in ways})
