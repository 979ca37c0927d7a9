"""Metrics and the loss of all systems against the training step, and the distance by prediction and loss space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes

from jlt.config import NAMED, PREDICTIONS, Prediction
from jlt.report import figures, palette
from jlt.report.figures import Figure, Line, Panel
from jlt.report.findings import Cells
from jlt.report.palette import PREDICTION, SHORT_NAMES, SYMBOL
from jlt.report.study import MEASUREMENTS, Study, System, grouped, spread
from jlt.report.wording import listed, metric_name, number, percent, sentence
from jlt.results.evaluation import LOWER_IS_BETTER, SHARES

PUBLISHED_BY = "Fu et al. 2026: FLUX.2 latents of ImageNet at 256 pixels, 50,000 images by 50-step Heun with guidance"
PUBLISHED_STEPS = (50_000, 100_000, 150_000, 200_000, 250_000)
# FID on the way is read off a plot, and so approximate; the last value of each is from the table.
PUBLISHED: Mapping[str, Mapping[str, Sequence[float]]] = {
    "frechet_distance": {
        "JLT-B/1": (11.5, 4.1, 3.3, 2.75, 2.56),
        "DiT-B/1": (31.0, 11.5, 8.7, 7.2, 6.56),
        "JLT-B/2": (40.0, 23.0, 18.5, 16.0, 14.81),
        "DiT-B/2": (53.0, 39.0, 33.0, 31.0, 28.71),
    },
    "inception_score": {"JLT-B/1": (220.74,), "DiT-B/1": (132.12,), "JLT-B/2": (107.29,), "DiT-B/2": (58.46,)},
}
"""By metric and system, on features of Inception, at the last of PUBLISHED_STEPS."""


def training_figure(study: Study) -> Figure | None:
    """Draw metrics and the loss against the training step; None before the first number.

    Every loss space and variant has its own panels: with several variants only those of the distance and the loss.
    """
    variants = {system.variant for system in study.systems}
    metrics = MEASUREMENTS[: 1 if len(variants) > 1 else None]
    panels: list[Panel | None] = []
    for suffix, systems in systems_that_compare(study.systems).items():
        panels += [*(_metric_panel(systems, metric, suffix) for metric in metrics), _loss_panel(systems, suffix)]
    several = len(study.systems) > 1
    texts = ["Colour and marker name the prediction, the dash of the line the patch size."] if several else []
    if study.seeds > 1:
        texts.append("Lines are means over seeds, bands run from the smallest to the largest.")
    texts.append("The loss is a moving average over a twentieth of the training.")
    if any(_published(metric, system) for metric in MEASUREMENTS for system in study.systems):
        texts.append(f"Dotted lines with open markers are as published ({PUBLISHED_BY}), in part read off a plot.")
    texts.append(
        "Look at how early the curves part, and whether the order still changes at the end."
        if several
        else "Look at whether the curves still move at the end."
    )
    return figures.figure_of("Along the training", panels, " ".join(texts), figures.system_legend(study.systems))


def systems_that_compare(systems: Sequence[System]) -> dict[str, list[System]]:
    """Group systems by loss space and variant; the keys name both for titles, empty if all systems share them."""
    spaces = {system.loss_space for system in systems}

    def name(system: System) -> str:
        loss = f"{SYMBOL[system.loss_space]}-space loss" if len(spaces) > 1 else ""
        parts = ", ".join(filter(None, [loss, system.variant]))
        return f" ({parts})" if parts else ""

    return grouped((name(system), system) for system in systems)


def _metric_panel(systems: Sequence[System], metric: str, suffix: str) -> Panel | None:
    found = [(system, system.curve(metric)) for system in systems]
    if not any(len(points) > 1 for _, points in found):
        # Single points are in the table of results.
        return None
    lines = [Line.of(system.name, points, figures.curve_style(system)) for system, points in found if points]
    known = {system.name: system for system, curve in found if curve and _published(metric, system)}
    for name, system in known.items():
        style = {**figures.curve_style(system), "dashes": (1, 2), "markerfacecolor": "none", "linewidth": 1.2}
        del style["markeredgecolor"], style["markeredgewidth"]
        points = _published(metric, system)
        lines.append(Line(f"{name} as published", list(points), list(points.values()), style))
    share = metric in SHARES
    direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    title = f"{sentence(metric_name(metric))}{suffix or f', {direction}'}"
    return figures.step_panel(title, lines, write=percent if share else number, linear=share)


def _published(metric: str, system: System) -> dict[int, float]:
    """Return what was published of a system by step; nothing for other systems, and for other features."""
    extractors = {found.protocol["extractor"]["name"] for run in system.runs for found in run.evaluations}
    values = PUBLISHED.get(metric, {}).get(system.name, ()) if extractors == {"inception"} else ()
    return dict(zip(PUBLISHED_STEPS[-len(values) :], values, strict=True)) if values else {}


def _loss_panel(systems: Sequence[System], suffix: str) -> Panel | None:
    lines = []
    for system in systems:
        by_step: dict[int, list[float | None]] = {}
        for run in system.runs:
            smooth = figures.moving_average([logged.loss for logged in run.log.steps])
            for logged, loss in zip(run.log.steps, smooth, strict=True):
                by_step.setdefault(logged.step, []).append(loss)
        points = {step: value for step in sorted(by_step) if (value := spread(by_step[step]))}
        if points:
            lines.append(Line.of(system.name, points, {**figures.curve_style(system), "marker": ""}))
    return figures.step_panel(f"Training loss{suffix or f' in {SYMBOL[systems[0].loss_space]}-space'}", lines)


def cells_figure(found: Mapping[str, Cells]) -> Figure | None:
    """Draw the final distance in every cell of prediction x loss space, a panel per setting; None without any."""
    if not found:
        return None
    caption = (
        "Final Fréchet distance of every prediction, by the space in which its loss is measured. Points are means over "
        "seeds, bars run from the smallest to the largest. A loss in x-space is the squared error of the velocity "
        "times (1 \N{MINUS SIGN} t)²; one in ε-space is the same error times t²."
    )
    panels = tuple(_cells_panel(where, cells) for where, cells in found.items())
    legend = figures.prediction_legend(_in_order(prediction for cells in found.values() for prediction, _ in cells))
    return Figure("Prediction and loss space", panels, caption, legend)


def _in_order(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Return different predictions: x, eps and v first, the others in alphabetical order."""
    return sorted(set(predictions), key=lambda name: (name not in PREDICTIONS, name not in NAMED, name))


def _cells_panel(where: str, cells: Cells) -> Panel:
    spaces = _in_order(space for _, space in cells)
    predictions = _in_order(prediction for prediction, _ in cells)

    def paint(axes: Axes) -> None:
        for place, prediction in enumerate(predictions):
            found = [
                (at + 0.12 * (place - (len(predictions) - 1) / 2), cells[prediction, space])
                for at, space in enumerate(spaces)
                if (prediction, space) in cells
            ]
            style = {"color": PREDICTION[prediction].light, "marker": palette.MARKER[prediction]}
            figures.draw_spreads(axes, found, **style)
        figures.make_log(axes, [bound for cell in cells.values() for bound in (cell.low, cell.high)])
        axes.set_xticks(range(len(spaces)), [f"{SYMBOL[space]}-space" for space in spaces])
        axes.grid(visible=False, axis="x")
        title = f"Fréchet distance, {where}"
        axes.set(title=title, xlabel="space of the loss", xlim=(-0.4, len(spaces) - 0.6))

    values = [
        f"{SHORT_NAMES[prediction]} with a loss in {SYMBOL[space]}-space {number(cell.mean)}"
        for (prediction, space), cell in cells.items()
    ]
    return figures.draw(paint, f"Fréchet distance by prediction and loss space, {where}: {listed(values)}.")
