"""The events of a training log as lines for a person."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
"""From this share of the time on, the wait for data is shown, before everything else about speed."""

NOTES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "saved": lambda event: f"Step {event['step']:,} is saved; training paused for {event['pause_seconds']:.2g} s.",
    "skipped": lambda event: f"{event['what']} The update is skipped.",
    "sampled": lambda event: f"Step {event['step']:,}: samples in {event['file']}",
    "evaluated": lambda event: f"Step {event['step']:,}: Frechet distance {event['metrics']['frechet_distance']:.4g}",
    "failed": lambda event: f"Step {event['step']:,}: {event['error']} The training goes on.",
}
"""The line that stays on the screen, by event."""


def figures(values: Mapping[str, Any]) -> str:
    """Return the numbers of a logged step as one line, without those that are missing or None."""
    texts = {name: write(values[name]) for name, write in FIGURES.items() if values.get(name) is not None}
    waiting = values.get("waiting")
    if waiting is not None and waiting >= WAITING_SHARE:
        speed = [texts["img_per_second"]] if "img_per_second" in texts else []
        texts["img_per_second"] = ", ".join([*speed, f"waiting for data {waiting:.0%}"])
    return ", ".join(texts.values())
