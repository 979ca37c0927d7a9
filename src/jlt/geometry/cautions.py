"""Reasons to trust the geometry of some latents less: too few of them, or directions without variance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from jlt.geometry.accumulate import Moments
from jlt.geometry.spectrum import sampling_error
from jlt.geometry.tokens import MIN_LATENTS, MeasuredTokens
from jlt.results.geometry import Caution

LARGE_ERROR = 0.1
"""Relative error of eigenvalues above which there is a caution."""


def cautions(moments: Moments, measured: Iterable[MeasuredTokens]) -> tuple[Caution, ...]:
    """Return the cautions about a store, and then about each patch size."""
    found = [*_constant_channels(moments), *_few_for_classes(moments)]
    for tokens in measured:
        found += [*_few_tokens(tokens), *_constant_directions(tokens)]
    return *found, *_few_for_frequencies(moments)


def _constant_channels(moments: Moments) -> Iterator[Caution]:
    variance = next(iter(moments.tokens.values())).channel_variance
    constant = (variance <= variance.max() * torch.finfo(torch.float32).eps ** 2).nonzero().flatten().tolist()
    if 0 < len(constant) < len(variance):
        yield Caution("constant_channels", channels=tuple(constant))


def _few_for_classes(moments: Moments) -> Iterator[Caution]:
    classes = len(moments.classes.counts)
    if classes == 1:
        yield Caution("one_class")
    elif not moments.classes.enough:
        yield Caution("few_for_classes", {"latents": moments.stationary.images, "classes": classes})


def _few_tokens(measured: MeasuredTokens) -> Iterator[Caution]:
    tokens, estimate = measured.tokens, measured.estimates[0]
    d, n = tokens.dimension, estimate.independent
    numbers = {"patch_size": tokens.patch_size, "latents": tokens.images}
    enough = math.ceil(tokens.images / n * max(2 / LARGE_ERROR**2, d / LARGE_ERROR))
    goal = {"enough_latents": enough, "goal": LARGE_ERROR}
    if tokens.images < MIN_LATENTS:
        yield Caution("few_latents", {**numbers, "fewest": MIN_LATENTS})
    elif not estimate.enough:
        yield Caution("few_tokens", {**numbers, "tokens": tokens.count, "directions": d, **goal})
    elif max(sampling_error(n), d / n) > LARGE_ERROR:
        yield Caution("large_errors", {**numbers, "error": sampling_error(n), "smallest_bias": d / n, **goal})


def _constant_directions(measured: MeasuredTokens) -> Iterator[Caution]:
    tokens, spread = measured.tokens, measured.along.relative_spread
    constant = int((spread == 0).sum())
    if 0 < constant < len(spread) and tokens.count > tokens.dimension:
        numbers = {"patch_size": tokens.patch_size, "latents": tokens.images}
        yield Caution("constant_directions", {**numbers, "constant": constant, "directions": len(spread)})


def _few_for_frequencies(moments: Moments) -> Iterator[Caution]:
    images, channels = moments.stationary.images, moments.stationary.shape[0]
    if images <= channels:
        yield Caution("few_for_frequencies", {"latents": images, "channels": channels})
