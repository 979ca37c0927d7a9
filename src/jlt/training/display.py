"""What a person sees of a training under way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jlt.runtime.progress import Bar, inform, step_bar

FIGURES: Mapping[str, Callable[[float], str]] = {
    "loss": lambda loss: f"loss {loss:.4g}",
    "img_per_second": lambda speed: f"{speed:,.0f} img/s" if speed >= 10 else f"{speed:.2g} img/s",
    "mfu": lambda mfu: f"MFU {mfu:.0%}",
    "memory_gib": lambda memory: f"{memory:.1f} GiB",
    "learning_rate": lambda rate: f"learning rate {rate:.3g}",
    "grad_norm": lambda norm: f"gradient {norm:.3g}",
}
"""The numbers of a step that are shown, in order of importance: a narrow terminal cuts off the last."""

WAITING_SHARE = 0.05
"""Share of the time spent waiting for data from which it is shown, before all else that is about speed."""


class TrainingDisplay:
    """Shows the logged steps of a training, and lines that stay."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def show(self, values: Mapping[str, Any], force: bool = False) -> None:
        """Show a logged step: its `step`, and of its other numbers those that FIGURES names.

        Off a terminal a step is passed over where the last line is only seconds old, unless `force` is set.
        """
        self._bar.show(values["step"], figures(values), force)

    def note(self, text: str) -> None:
        """Print a line that stays, above what is redrawn."""
        inform(text)


@contextlib.contextmanager
def training_display(name: str, step: int, total_steps: int) -> Iterator[TrainingDisplay]:
    """Show a training that goes on from `step` to `total_steps`; a silenced process shows nothing.

    The time left follows from the steps made since the block was entered.
    """
    with step_bar(name, total_steps) as bar:
        bar.show(step)
        yield TrainingDisplay(bar)


def figures(values: Mapping[str, Any]) -> str:
    """Return the numbers of a logged step as one line; those that are missing or None are left out."""
    words = {name: write(values[name]) for name, write in FIGURES.items() if values.get(name) is not None}
    waiting = values.get("waiting")
    if waiting is not None and waiting >= WAITING_SHARE:
        words["img_per_second"] = ", ".join(
            filter(None, [words.get("img_per_second"), f"waiting for data {waiting:.0%}"])
        )
    return ", ".join(words.values())
