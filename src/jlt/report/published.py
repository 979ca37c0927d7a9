"""What the paper reports of its systems (Fu et al. 2026, arXiv 2605.27102), to draw next to one's own curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SOURCE = "Fu et al. 2026: FLUX.2 latents of ImageNet at 256 pixels, 50,000 images by 50-step Heun with guidance"
EXTRACTOR = "inception"
"""The features in which these distances are."""
Points = Sequence[tuple[int, float]]
_STEPS = (50_000, 100_000, 150_000, 200_000, 250_000)

# FID on the way is read off a plot, and so approximate; the last value of each is from the table.
CURVES: Mapping[str, Mapping[str, Points]] = {
    "frechet_distance": {
        "JLT-B/1": tuple(zip(_STEPS, (11.5, 4.1, 3.3, 2.75, 2.56), strict=True)),
        "DiT-B/1": tuple(zip(_STEPS, (31.0, 11.5, 8.7, 7.2, 6.56), strict=True)),
        "JLT-B/2": tuple(zip(_STEPS, (40.0, 23.0, 18.5, 16.0, 14.81), strict=True)),
        "DiT-B/2": tuple(zip(_STEPS, (53.0, 39.0, 33.0, 31.0, 28.71), strict=True)),
    },
    "inception_score": {
        "JLT-B/1": ((250_000, 220.74),),
        "DiT-B/1": ((250_000, 132.12),),
        "JLT-B/2": ((250_000, 107.29),),
        "DiT-B/2": ((250_000, 58.46),),
    },
}


def published(metric: str, system: str, extractor: str | None) -> Points:
    """Return (step, value) as published of a system; nothing for other systems, and for other features."""
    return CURVES.get(metric, {}).get(system, ()) if extractor == EXTRACTOR else ()
