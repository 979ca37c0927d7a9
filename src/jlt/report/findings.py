"""The findings of a page as sentences, computed from the numbers, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlt.report.geometry_text import advice_sentences, geometry_verdict, spectrum_sentence
from jlt.report.palette import NAMES, SYMBOL
from jlt.report.study import Spread, Study, System, grouped
from jlt.report.wording import listed, number, patch_text, percent, sentence, spread_text

CLOSE_RATIO = 1.15
"""Two Frechet distances of one seed each are too close to call below this ratio. It is a convention: the spread between
seeds is unknown."""

ERRORS = 2.0
"""A difference within this many of its standard errors is none."""
NOISE_RECALL = 0.001
"""Recall below this, in every system, counts as noise. Decoded noise has none, though it may have high precision."""

CHANCE_FACTOR = 2.0
"""Label agreement below this multiple of chance counts as not recognisable."""


Cells = Mapping[tuple[str, str], Spread]
"""Frechet distances at the final step by prediction and loss space."""


@dataclass(frozen=True)
class Comparison:
    """Systems that differ in the prediction alone, by ascending Frechet distance at the final step."""

    patch_size: int
    loss_space: str
    variant: str
    ranked: tuple[tuple[System, Spread], ...]

    @property
    def seeds(self) -> int:
        """The smallest number of seeds behind any of the numbers."""
        return min(value.count for _, value in self.ranked)

    def separated(self, better: Spread, worse: Spread) -> bool:
        """Whether two numbers are distinguishable: beyond their errors, and disjoint or clearly apart.

        Ranges over seeds must be disjoint; numbers of single seeds need a clear ratio.
        """
        if self.within_error(better, worse):
            return False
        if min(better.count, worse.count) > 1:
            return better.high < worse.low
        return worse.mean > CLOSE_RATIO * better.mean

    def within_error(self, better: Spread, worse: Spread) -> bool:
        """Whether a difference is within its error, where errors are known."""
        if better.error is None or worse.error is None:
            return False
        return worse.mean - better.mean <= ERRORS * math.hypot(better.error, worse.error)

    @property
    def clear_winner(self) -> System | None:
        """The system that is below all others and distinguishable from them, None if it is too close to call."""
        (first, best), *others = self.ranked
        return first if all(self.separated(best, value) for _, value in others) else None

    def find(self, prediction: str) -> Spread | None:
        """Return the number of a prediction, or None."""
        return next((value for system, value in self.ranked if system.prediction == prediction), None)


def comparisons(study: Study) -> list[Comparison]:
    """Group the systems evaluated at the final step by all but the prediction; groups of one are left out."""
    groups = grouped(
        ((system.patch_size, system.loss_space, system.variant), (system, value))
        for system, value in study.final_distances
    )
    return [
        Comparison(patch_size, loss_space, variant, tuple(sorted(found, key=lambda item: item[1].mean)))
        for (patch_size, loss_space, variant), found in sorted(groups.items())
        if len(found) > 1
    ]


def setting(comparison: Comparison, study: Study) -> str:
    """Name a comparison: its patch size or its variant, both if they differ, and its loss space if it does."""
    article = "a" if comparison.loss_space == "v" else "an"
    loss = f" with {article} {SYMBOL[comparison.loss_space]}-space loss" if study.several_losses else ""
    if comparison.variant and len({system.patch_size for system in study.systems}) == 1:
        return f"{comparison.variant}{loss}"
    return f"{patch_text(comparison.patch_size, comparison.variant)}{loss}"


def verdict(study: Study) -> str:
    """Return the finding in one sentence."""
    found = comparisons(study)
    if not found:
        return _verdict_of_one(study)
    if undecidable := why_undecidable(study):
        return undecidable.headline
    winners = grouped(
        (winner.prediction if (winner := comparison.clear_winner) else "", setting(comparison, study))
        for comparison in found
    )
    undecided = winners.pop("", [])
    if not winners:
        where = _where(undecided, len(found))
        return f"No prediction stands out: the lowest Fréchet distances are too close to call {where}."
    best = [
        f"{NAMES[prediction]} reaches the lowest Fréchet distance {_where(places, len(found))}"
        for prediction, places in winners.items()
    ]
    tail = f"; at {listed(undecided)} it is too close to call" if undecided else ""
    return sentence(f"{'; '.join(best)}{tail}.")


@dataclass(frozen=True)
class Undecidable:
    """Why distances decide nothing, as a headline and as a sentence."""

    headline: str
    text: str


def why_undecidable(study: Study) -> Undecidable | None:
    """Return why the distances of a study decide nothing: unsuitable features, or samples that are still noise."""
    if not fitting_features(study):
        return Undecidable(
            "No verdict: the features of digits say nothing about these images.",
            "Evaluate again with features that fit: --features inception, squeezenet or dinov2.",
        )
    early = at_chance(study) or near_nothing(study)
    return Undecidable("Too early to tell: no system draws recognisable samples yet.", early) if early else None


def fitting_features(study: Study) -> bool:
    """Return whether the features are not those of digits, or the images are digits, as far as files tell."""
    if name_in(study.protocol, "extractor") != "digits":
        return True
    images, names = name_in(study.protocol.get("reference", {}), "images"), study.latents.get("class_names") or []
    return images in ("", "digits") or {*names} <= {*map(str, range(10))}


def near_nothing(study: Study) -> str:
    """State that hardly a real image is near a sample of any system, as is true of noise; empty if some are."""
    found = [value.mean for system in study.systems if (value := system.measured("recall", study.final_step))]
    if not found or max(found) >= NOISE_RECALL:
        return ""
    return (
        f"At most {percent(max(found))} of the real images are near a sample of any system (recall): noise is as far "
        "away. The order of the Fréchet distances says little at this stage."
    )


def at_chance(study: Study) -> str:
    """State that samples show their labels hardly more often than by chance, empty if they do or if it is unknown.

    A Frechet distance then ranks different kinds of noise.
    """
    classes = [run.config.get("network", {}).get("num_classes") for run in study.runs]
    agreement = [
        value.mean for system in study.systems if (value := system.measured("label_agreement", study.final_step))
    ]
    if not agreement or not classes or not classes[0] or max(agreement) >= CHANCE_FACTOR / classes[0]:
        return ""
    return (
        f"At most {percent(max(agreement))} of any system's samples show the label they were drawn for, where chance "
        f"gives about {percent(1 / classes[0])}. The order of the Fréchet distances says little at this stage."
    )


def _where(places: Sequence[str], comparisons: int) -> str:
    """Name the settings for which something is true, by their number if they are all of many."""
    everywhere = len(places) == comparisons > 2
    return f"in all {comparisons} comparisons" if everywhere else f"at {listed(places)}"


def _verdict_of_one(study: Study) -> str:
    """Return the finding if nothing can be compared."""
    step = study.final_step
    if not study.systems and study.geometry:
        return geometry_verdict(study.geometry)
    if step is None:
        reached = max((run.reached for run in study.runs), default=0)
        return f"Nothing has been evaluated yet; training has reached step {reached:,}."
    if len(study.final_distances) != 1:
        return f"At step {step:,} no two systems are evaluated that differ in the prediction alone."
    ((system, value),) = study.final_distances
    return f"{system.name} reaches a Fréchet distance of {spread_text(value)} at step {step:,}."


def details(study: Study) -> list[str]:
    """Return the sentences under the verdict: numbers per comparison, the seeds, the claim, the geometry."""
    found = comparisons(study)
    texts = [_numbers(comparison, study) for comparison in found]
    if found:
        undecidable = why_undecidable(study)
        texts = [*([undecidable.text] if undecidable else []), *texts, _about_seeds(found)]
        texts += [] if undecidable else _about_the_claim(found, study)
    elif len(study.runs) == 1 and study.final_step is not None:
        texts.extend(_about_one_run(study))
    behind = [system.name for system in study.systems if study.final_step not in system.evaluated_steps]
    if study.final_step is not None and behind:
        texts.append(
            f"Not yet evaluated at step {study.final_step:,}: {listed(behind)}. The comparison is provisional."
        )
    if study.geometry is not None:
        entries = list(study.geometry.tokens.values())
        texts.extend(map(spectrum_sentence, entries[:1] if study.systems else entries))
        texts.extend(advice_sentences(study.geometry))
    return texts


def _numbers(comparison: Comparison, study: Study) -> str:
    (first, best), *others = comparison.ranked
    leader = f"{NAMES[first.prediction]} reaches a Fréchet distance of {spread_text(best)}"
    rest = [f"{NAMES[system.prediction]} {spread_text(value)}" for system, value in others]
    texts = [f"At {setting(comparison, study)}, {listed([leader, *rest])}."]
    ratios = [
        f"{SYMBOL[system.prediction]} is {number(value.mean / best.mean, 2)} times as high"
        for system, value in others
        if best.mean > 0 and comparison.separated(best, value)
    ]
    if ratios:
        texts.append(f"Relative to {SYMBOL[first.prediction]}, {listed(ratios)}.")
    for system, value in others:
        if comparison.separated(best, value):
            continue
        why = "their ranges over seeds overlap" if comparison.seeds > 1 else "one seed cannot settle that"
        why = "the difference is within its error" if comparison.within_error(best, value) else why
        higher = f"only {value.mean / best.mean - 1:.0%} higher" if best.mean > 0 else "not distinguishable from it"
        texts.append(f"{sentence(NAMES[system.prediction])} is {higher}: {why}.")
    return " ".join(texts)


def _about_seeds(found: Sequence[Comparison]) -> str:
    fewest = min(comparison.seeds for comparison in found)
    if fewest == 1:
        return (
            "Each number comes from a single seed: the spread between seeds was not measured, and a small difference "
            "may be chance."
        )
    return (
        f"Numbers are means over {fewest} seeds, with the smallest and the largest in brackets. Two systems count as "
        "different if these ranges do not overlap."
    )


def _about_the_claim(found: Sequence[Comparison], study: Study) -> list[str]:
    """State whether each comparison agrees with the paper's claim: clean prediction beats velocity."""
    outcome: dict[str, list[str]] = {}
    for comparison in found:
        clean, velocity = comparison.find("x"), comparison.find("v")
        if clean is None or velocity is None:
            continue
        lower, upper = sorted((clean, velocity), key=lambda value: value.mean)
        decided = "agrees" if lower is clean else "shows the opposite"
        finding = decided if comparison.separated(lower, upper) else "is undecided"
        outcome.setdefault(finding, []).append(setting(comparison, study))
    parts = listed([f"{finding} {_where(places, len(found))}" for finding, places in outcome.items()])
    claim = "The paper claims that clean prediction beats velocity on anisotropic latents. This measurement"
    return [f"{claim} {parts}."] if parts else []


def _about_one_run(study: Study) -> list[str]:
    system = study.systems[0]
    known = {step: value.mean for step, value in system.curve("frechet_distance").items()}
    if not known:
        return []
    best = min(known, key=known.__getitem__)
    if best == study.final_step:
        if len(known) > 1:
            return ["It is the lowest so far."]
        return [f"It is the only evaluation {'by this protocol' if study.set_aside else 'so far'}."]
    return [f"The lowest so far was {number(known[best])} at step {best:,}; it has risen since."]


def cells(study: Study) -> dict[str, Cells]:
    """Return the cells of every patch size and variant that has several loss spaces, by their names."""
    found: dict[str, dict[tuple[str, str], Spread]] = {}
    for system, value in study.final_distances:
        where = patch_text(system.patch_size, system.variant)
        found.setdefault(where, {})[system.prediction, system.loss_space] = value
    return {where: here for where, here in found.items() if len({space for _, space in here}) > 1}


def cell_sentences(found: Mapping[str, Cells]) -> list[str]:
    """Say how much the prediction and how much the loss space moves the distance, the other one being equal."""
    texts = []
    for where, here in found.items():
        by_space = grouped((f"with a loss in {SYMBOL[space]}-space", cell.mean) for (_, space), cell in here.items())
        by_prediction = grouped((f"for {NAMES[prediction]}", cell.mean) for (prediction, _), cell in here.items())
        if len(by_prediction) > 1:
            for what, groups in (("prediction", by_space), ("loss space", by_prediction)):
                if factors := [f"{number(_factor(means))} {name}" for name, means in groups.items() if len(means) > 1]:
                    grows = f"at {where} the Fréchet distance grows by a factor of {listed(factors)}"
                    texts.append(f"From the best {what} to the worst {grows}.")
    return texts


def _factor(means: Sequence[float]) -> float:
    return max(means) / min(means) if min(means) > 0 else math.inf


def name_in(protocol: Mapping[str, Any], part: str) -> str:
    """Return the name of a part of an identity (autoencoder, extractor, source), empty if there is none."""
    value = protocol.get(part)
    if not isinstance(value, Mapping):
        return str(value or "")
    return str(value.get("name") or Path(value.get("path", "")).name or value.get("kind", ""))


def compared_text(protocol: Mapping[str, Any], count: int | None = None) -> str:
    """Name the samples, the real images and the features of an evaluation."""
    reference = protocol.get("reference", {})
    real = name_in(reference, "images") or "the statistics of another program"
    number_of = f"{reference['count']:,} images of " if reference.get("count") else ""
    samples = f"{count or protocol['count']:,} samples" if count or "count" in protocol else "Samples"
    return f"{samples} against {number_of}{real}, in the features of {name_in(protocol, 'extractor')}."


def limits(study: Study) -> list[str]:
    """Return what this page does not show, computed from how the results were made."""
    protocol, seeds = study.protocol, study.seeds
    texts = []
    if name_in(protocol, "extractor") == "digits":
        accuracy = study.ablation.classifier_accuracy if study.ablation else None
        known = f" (accuracy {percent(accuracy)} on held-out digits)" if accuracy else ""
        texts.append(
            f"Distances and scores use the features of a small bundled digit classifier{known}, not Inception. They "
            "cannot be compared with published FID or IS values."
        )
    if name_in(protocol, "extractor") == "squeezenet":
        texts.append("Distances and scores use the features of SqueezeNet, not Inception's: none of them is an FID.")
    if seeds == 1:
        texts.append("A single seed: this page does not show how much these numbers vary between seeds.")
    elif 1 < seeds < 5:
        texts.append(f"{seeds} seeds per system: the ranges are those of {seeds} draws, not confidence intervals.")
    count = protocol.get("count")
    if count and count < 10_000:
        texts.append(
            f"A Fréchet distance of {count:,} samples is biased upwards. The bias is about the same in every row of a "
            "table: rows can be compared, but a single value says little."
        )
    texts.extend(_limits_of_the_setting(study, protocol))
    if study.geometry is not None and not study.systems:
        texts.append(
            "The geometry is a linear-Gaussian picture of single tokens. It says what each target asks of a network, "
            f"not how well a network does it{'' if study.inside else '; nothing has been trained here'}."
        )
    elif study.geometry is not None and not any("anisotropy" in system.variant for system in study.systems):
        texts.append(
            "The geometry is a linear-Gaussian picture of single tokens. It is shown next to the results; that it "
            "causes them is not tested here, since the latent space itself was never changed."
        )
    if study.inside is not None:
        texts.append(
            "The networks are shown latents that they were trained on; an error of the velocity is no distance of "
            "samples."
        )
    return texts


def _limits_of_the_setting(study: Study, protocol: Mapping[str, Any]) -> list[str]:
    texts = []
    psnr = study.ablation.autoencoder_psnr if study.ablation else None
    if psnr:
        texts.append(
            f"Samples are decoded by the {name_in(protocol, 'autoencoder')} autoencoder, which reconstructs held-out "
            f"images at {number(psnr)} dB PSNR. No sample can look better than that."
        )
    if len(study.systems) > 1 and study.final_step:
        texts.append(
            f"All systems are compared after {study.final_step:,} steps of the same recipe; none was tuned or trained "
            "to convergence. Another budget, width or learning rate may give another order."
        )
    if protocol.get("cfg_scale") == 1.0:
        texts.append("Samples are drawn without guidance; the effect of guidance was not measured.")
    if study.several_losses:
        texts.append("Losses in different spaces are not on one scale: their curves cannot be compared.")
    return texts
