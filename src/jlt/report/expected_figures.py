"""The figure of what was expected against what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from jlt.report.expected import Check
from jlt.report.figures import Figure, Panel, draw, plain_log
from jlt.report.palette import INK, MUTED
from jlt.report.wording import listed, number, percent

MARKERS = "osD^v"


def expected_figure(found: Sequence[Check]) -> Figure | None:
    """Draw the ratio of distances against what was expected, and against the anisotropy where that is an axis."""
    if len(found) < 2:
        return None
    kinds = list(dict.fromkeys((check.patch_size, check.width) for check in found))
    panels = [_panel(found, kinds)]
    if len({check.anisotropy for check in found}) > 1:
        panels.insert(0, _along_anisotropy(found, kinds))
    caption = (
        "The Fréchet distance of velocity over that of clean prediction, pair by pair of equal seeds: above 1 the "
        "clean latent wins. Points are means over seeds, bars run from the smallest to the largest. Expected is by how "
        "many of all directions of a token velocity needs more than the clean latent (eq. 13)."
    )
    return Figure("Expected and measured", tuple(panels), caption)


def _plot(axes: Axes, x: Sequence[float], part: Sequence[Check], marker: str, label: str, line: bool) -> None:
    means = [check.ratio.mean for check in part]
    below = [check.ratio.mean - check.ratio.low for check in part]
    above = [check.ratio.high - check.ratio.mean for check in part]
    axes.errorbar(
        x, means, yerr=[below, above], marker=marker, markersize=5, linestyle="-" if line else "none", capsize=2,
        linewidth=1.2, color=INK.light, label=label,
    )  # fmt: skip


def _finish(axes: Axes, found: Sequence[Check], several: bool) -> None:
    axes.axhline(1.0, color=MUTED.light, linewidth=1)
    axes.set_yscale("log")
    plain_log(axes.yaxis, [bound for check in found for bound in (check.ratio.low, check.ratio.high, 1.0)])
    if several:
        axes.legend(fontsize=8, frameon=False)


def _along_anisotropy(found: Sequence[Check], kinds: Sequence[tuple[int, int]]) -> Panel:
    def paint(axes: Axes) -> None:
        for (patch_size, width), marker in zip(kinds, MARKERS * 9, strict=False):
            part = [check for check in found if (check.patch_size, check.width) == (patch_size, width)]
            part = sorted((c for c in part if c.anisotropy is not None), key=lambda check: check.anisotropy or 0.0)
            powers = [check.anisotropy or 0.0 for check in part]
            _plot(axes, powers, part, marker, f"patch {patch_size}, width {width}", line=True)
        _finish(axes, found, len(kinds) > 1)
        axes.set_title("Distance of velocity over clean")
        axes.set_xlabel("power of the eigenvalues (0 whitened, 1 untouched)")

    told = [f"{number(check.ratio.mean)} at {check.setting}" for check in found]
    return draw(paint, f"Ratio of distances against the power of the eigenvalues: {listed(told)}.")


def _panel(found: Sequence[Check], kinds: Sequence[tuple[int, int]]) -> Panel:
    def paint(axes: Axes) -> None:
        for (patch_size, width), marker in zip(kinds, MARKERS * 9, strict=False):
            part = [check for check in found if (check.patch_size, check.width) == (patch_size, width)]
            _plot(
                axes, [check.expected for check in part], part, marker, f"patch {patch_size}, width {width}", line=False
            )
        axes.axvline(0.0, color=MUTED.light, linewidth=1)
        _finish(axes, found, len(kinds) > 1)
        axes.set_title("Measured against expected")
        axes.set_xlabel("directions that velocity needs beyond clean")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))

    told = [f"expected {percent(check.expected)}, measured {number(check.ratio.mean)}" for check in found]
    return draw(paint, f"Ratio of distances against what was expected: {listed(told)}.")
