"""The model card of an exported folder: what it is, how to load it, samples, and every evaluation with its protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlt import __version__
from jlt.errors import JLTError
from jlt.images.contact_sheet import SheetText, draw_sheet
from jlt.interop.importing import IMPORTED
from jlt.interop.pipeline_settings import WEIGHTS, ExportConfig, PipelineSettings
from jlt.networks.sizes import size_name
from jlt.networks.transformer import count_network
from jlt.results.evaluation import SPREAD_OF, Evaluation
from jlt.results.files import read_result
from jlt.results.run import evaluation_files
from jlt.runtime.progress import inform
from jlt.sampling.save import MIN_SIDE
from jlt.storage.files import atomic_path, without_paths, write_text
from jlt.storage.weights import require_reachable
from jlt.training.checkpoint import Checkpoint

SAMPLES = "samples.png"
TARGETS = {"x": "the clean latent (x)", "eps": "the noise (eps)", "v": "the velocity (v)"}
SAMPLER = (
    *("ema", "solver", "steps", "shift", "grid", "cfg_scale", "cfg_interval", "autoguide"),
    *("t_eps", "labels", "seed", "count"),
)
"""Keys of a protocol that the Hub's metadata repeats, where they have a value."""
COLUMNS = 4


@dataclass(frozen=True)
class Card:
    """What a model card is made of."""

    checkpoint: Checkpoint
    settings: PipelineSettings
    config: ExportConfig
    vae_copied: bool
    place: str
    """Where it is loaded from in the example."""

    @property
    def license(self) -> str:
        """The licence of the weights; that of other people's weights is theirs to state."""
        imported = self.checkpoint.read_state().imported is not None
        return self.config.license or ("unknown" if imported else "apache-2.0")

    @property
    def referenced(self) -> bool:
        """Whether the autoencoder is named by its Hub id, and not in the folder."""
        return not self.vae_copied and self.settings.autoencoder["name"] != "pixels"


def write_card(folder: Path, card: Card, device: str) -> None:
    """Write `README.md` into a pipeline folder, and `samples.png`, drawn by the pipeline that is there.

    There are no samples where the autoencoder is named by a Hub id that cannot be loaded; a message reports it.
    """
    drawn = bool(card.config.samples) and _draw_samples(folder, card, device)
    evaluations = evaluations_of(card.checkpoint)
    text = f"---\n{metadata(card, evaluations)}---\n\n{_body(card, evaluations, drawn)}"
    write_text(folder / "README.md", text)


def _draw_samples(folder: Path, card: Card, device: str) -> bool:
    """Load the folder as its users will, and draw; return whether that was possible."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    config = card.config
    labels = sample_labels(card)
    source = card.settings.autoencoder["source"]
    call: dict[str, Any] = {"guidance_scale": config.cfg_scale, "guidance_interval": config.cfg_interval}
    try:
        if card.referenced:
            require_reachable(source, [f"vae/{WEIGHTS}", WEIGHTS], "its weights are needed.")
        logging.disable_progress_bar()
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False).to(device)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(labels, num_inference_steps=config.steps, output_type="pil", **call).images
    except (OSError, JLTError) as error:
        inform(f"No samples are drawn for the model card: {error}")
        return False
    finally:
        logging.enable_progress_bar()
    captions = [card.settings.id2label.get(label, str(label)) for label in labels]
    sheet = draw_sheet(np.stack(images), COLUMNS, SheetText(captions=captions), MIN_SIDE)
    with atomic_path(folder / SAMPLES) as temporary:
        sheet.save(temporary)
    return True


def sample_labels(card: Card) -> list[int]:
    """Return the classes of the samples, at equal distances over all of them."""
    classes, count = card.checkpoint.config.network.num_classes, card.config.samples
    return [index * classes // count if count < classes else index % classes for index in range(count)]


def evaluations_of(checkpoint: Checkpoint) -> list[Evaluation]:
    """Return the evaluations of a checkpoint in its run, of any of its averages."""
    found = [read_result(Evaluation, path) for path in evaluation_files(checkpoint.run)]
    return [evaluation for evaluation in found if evaluation.protocol.get("checkpoint") == checkpoint.sha256]


def metadata(card: Card, evaluations: Sequence[Evaluation]) -> str:
    """Return the Hub's metadata as YAML; its results are those of the exported weights."""
    from huggingface_hub import ModelCardData

    ours = [evaluation for evaluation in evaluations if evaluation.protocol.get("ema") == card.settings.training.ema]
    data = ModelCardData(
        license=card.license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["jlt", "class-conditional", "latent-diffusion", "flow-matching", "arxiv:2605.27102"],
        model_name=card.settings.training.name,
        eval_results=[result for evaluation in ours for result in _results(evaluation)] or None,
    )
    return f"{data.to_yaml()}\n"


def _results(evaluation: Evaluation) -> list[Any]:
    from huggingface_hub import EvalResult

    protocol = evaluation.protocol
    images = protocol.get("reference", {}).get("images", {})
    images = images if isinstance(images, Mapping) else {}
    features = _features(evaluation)
    arguments = {key: protocol[key] for key in SAMPLER if protocol.get(key) not in (None, [])}
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Class-conditional image generation",
            dataset_type=str(images.get("kind", "unknown")),
            dataset_name=_images_name(images),
            metric_type=metric_type(metric, features),
            metric_name=f"{metric_name(metric, features)} ({evaluation.metrics.count:,} images, {features} features)",
            metric_value=evaluation.metrics[metric],
            metric_args=without_paths({**arguments, "features": features}),
        )
        for metric in _measured(evaluation)
    ]


def _images_name(source: Mapping[str, Any]) -> str:
    """Return what a reader knows images by: the last part of their place, with the kind of their files."""
    kind, place = str(source.get("kind", "unknown")), source.get("path")
    return f"{Path(place).name} ({kind})" if isinstance(place, str) and Path(place).name else kind


def _features(evaluation: Evaluation) -> str:
    return str(evaluation.protocol.get("extractor", {}).get("name", "unknown"))


def metric_type(metric: str, features: str) -> str:
    """Return the Hub's name of a metric: `fid` is a Fréchet distance of Inception's features, and of no others."""
    return "fid" if metric == "frechet_distance" and features == "inception" else metric


def metric_name(metric: str, features: str = "") -> str:
    """Return the name of a metric, with these features, for a reader."""
    if metric_type(metric, features) == "fid":
        return "FID"
    return metric.replace("_", " ").replace("frechet", "Fréchet")


def _body(card: Card, evaluations: Sequence[Evaluation], drawn: bool) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("jlt.interop"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    settings, config, training = card.settings, card.config, card.settings.training
    labels = sample_labels(card) or [0]
    columns, rows = _table(evaluations)
    return environment.get_template("model_card.md").render(
        title=training.name,
        target=TARGETS.get(settings.prediction, f"the target {settings.prediction}, a mixture of latent and noise"),
        # A run that was imported without a count of updates counts epochs.
        steps=f"{training.step:,}" if card.checkpoint.updates else "",
        version=__version__,
        facts=_facts(card),
        place=card.place,
        call=_call(config),
        example_labels=labels[:4],
        sample_labels=labels,
        num_classes=card.checkpoint.config.network.num_classes,
        named=bool(settings.id2label),
        label_dropout=training.label_dropout,
        referenced=card.referenced,
        autoencoder=settings.autoencoder,
        samples=drawn,
        columns=columns,
        rows=rows,
        protocols=[json.dumps(without_paths(evaluation.protocol), indent=2) for evaluation in evaluations],
        license=card.license,
    )


def _call(config: ExportConfig) -> str:
    guidance = f", guidance_scale={config.cfg_scale:g}, guidance_interval={config.cfg_interval}"
    return f"num_inference_steps={config.steps}{guidance if config.cfg_scale != 1 else ''}, seed=0"


def _facts(card: Card) -> list[tuple[str, str]]:
    """Return what the card's first table states."""
    train, identity = card.checkpoint.config, card.settings.autoencoder
    network, side, ema = train.network, identity["downsampling"], card.settings.training.ema
    optional = {
        "bottleneck": network.bottleneck_size,
        "fixed positions": network.fixed_positions,
        "learned positions": network.learned_positions,
        "context tokens": network.context_tokens,
    }
    return [
        ("network", f"{size_name(network)}, patch size {network.patch_size}"),
        ("parameters", f"{count_network(network):,}"),
        *((name, str(value)) for name, value in optional.items() if value),
        ("images", f"{network.height * side} x {network.width * side} pixels, {network.num_classes} classes"),
        ("latents", f"{network.channels} x {network.height} x {network.width}, of the autoencoder {identity['name']}"),
        *_training_facts(card),
        ("weights", f"EMA {ema}" if ema != "none" else "as trained, without EMA"),
        ("checkpoint", f"`{card.checkpoint.sha256[:16]}`"),
    ]


def _training_facts(card: Card) -> list[tuple[str, str]]:
    """Return what is known of the training: of an imported run neither its images nor, for certain, its batch."""
    source = card.checkpoint.latents["source"]
    if IMPORTED in source:
        known = source["kind"] != IMPORTED
        return [("training images", source["kind"] if known else "unknown: the checkpoint is another program's")]
    return [
        ("training images", _images_name(source)),
        ("batch size", f"{card.checkpoint.config.batch_size:,}"),
    ]


def _table(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of evaluations, with the metrics that any of them has."""
    measured = [dict.fromkeys(_measured(evaluation)) for evaluation in evaluations]
    metrics = list(dict.fromkeys(metric for names in measured for metric in names))
    header = ["protocol", "EMA", "images", "features", "sampler", *(metric_name(metric) for metric in metrics)]
    return header, [[str(number), *_row(entry, metrics)] for number, entry in enumerate(evaluations, 1)]


def _measured(evaluation: Evaluation) -> list[str]:
    """Return the metrics that an evaluation has, without their errors."""
    left_out = {"count", "frechet_distance_bias", "inception_score_whole", *SPREAD_OF.values()}
    return [name for name, value in vars(evaluation.metrics).items() if value is not None and name not in left_out]


def _row(evaluation: Evaluation, metrics: Sequence[str]) -> list[str]:
    protocol = evaluation.protocol
    sampler = f"{protocol.get('solver')}, {protocol.get('steps')} steps"
    if protocol.get("grid"):
        sampler += " at own times"
    elif protocol.get("shift", 1) != 1:
        sampler += f", shift {protocol['shift']:g}"
    if protocol.get("cfg_scale") != 1:
        kind = "autoguidance" if protocol.get("autoguide") else "guidance"
        sampler += f", {kind} {protocol.get('cfg_scale')} on {protocol.get('cfg_interval')}"
    values = ["" if (value := evaluation.metrics[metric]) is None else f"{value:.4g}" for metric in metrics]
    return [str(protocol.get("ema")), f"{evaluation.metrics.count:,}", _features(evaluation), sampler, *values]
