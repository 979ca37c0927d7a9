"""The command line: one data class per verb, parsed by tyro. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from jlt import processes
from jlt.cli_benchmark import BENCHMARKS
from jlt.cli_sweep import Sweep
from jlt.config import LossSpace, Prediction, SampleConfig, SampleFormat, TimestepConfig, TrainConfig, in_steps, to_dict
from jlt.data.config import EncodeConfig
from jlt.errors import JLTError, WrongWordsError, unknown_name
from jlt.experiments.recipes import DIGITS_SAMPLING, images_of_recipe, renamed, resolve_recipe
from jlt.progress import silence
from jlt.verbs import Result, Verb, command_line

STOPPED = os.EX_TEMPFAIL
"""Exit code of work that was asked to stop and is saved: the code by which a job asks to be run again."""
Positional = tyro.conf.Positional
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class RecipeVerb(Verb):
    """A verb whose remaining words override settings of a recipe."""

    recipe: Annotated[str, Positional, tyro.conf.arg(metavar="RECIPE")]

    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()

    def reject_misspelt(self) -> None:
        """Raise WrongWordsError for a remaining word that is nearly one of the verb's own options."""
        own = [f"--{entry.name.replace('_', '-')}" for entry in dataclasses.fields(self)]
        settings = [f"--{entry.name.replace('_', '-')}" for entry in dataclasses.fields(TrainConfig)]
        for word in self.overrides:
            if word.startswith("--") and "." not in word and word.replace("_", "-") not in settings:
                raise unknown_name("option", word, [*own, *settings])

    def resolve(self, latents: Path | None) -> TrainConfig:
        """Return the recipe for a latent store's shape with the remaining words applied."""
        from jlt.data.manifest import read_manifest

        self.reject_misspelt()
        manifest = read_manifest(latents) if latents else None
        base = resolve_recipe(self.recipe, manifest.shape if manifest else None)
        prog = f"jlt {type(self).__name__.lower()} {self.recipe}"
        config = tyro.cli(TrainConfig, args=self.overrides, default=base, prog=prog, config=PARSING)
        return renamed(in_steps(config, manifest.count if manifest else images_of_recipe(self.recipe)))


@dataclass(frozen=True, kw_only=True)
class Quickstart(Verb):
    """From scanned digits to a report on which prediction target their latent space favours.

    Interrupt it as you like: the same words continue it.

    For example:

      jlt quickstart --out quickstart --seeds 0 1 2
    """

    out: Path = Path("quickstart")
    """Folder for latents, runs and report."""
    seeds: tuple[int, ...] = (0,)
    """One training of each system per seed."""
    workers: int | None = None
    """Systems side by side (default: 2 on a CPU, 1 on a GPU)."""
    steps: int | None = None
    """Training steps of each system, for a shorter look."""

    def run(self) -> Result:
        from jlt.experiments.quickstart import quickstart
        from jlt.report.table import results_table

        summary = quickstart(self.out, self.seeds, self.workers, self.steps, command_line())
        return Result(summary, f"{results_table(self.out)}\n\nOpen {summary['report']}")


@dataclass(frozen=True, kw_only=True)
class Encode(Verb):
    """Encode images into a latent store, or adopt shards that the authors' program wrote.

    Several processes share the work: torchrun --nproc-per-node 8 -m jlt encode ...
    Shards of the authors' program are adopted where they lie: jlt encode --adopt DIR (with --help for its options)

    For example:

      jlt encode --images digits --autoencoder tiny --resolution 32 --out latents
    """

    config: Annotated[EncodeConfig, Flat]
    out: Path
    """Folder of the store; the same words continue it."""

    def run(self) -> Result:
        from jlt.data.encode import encode
        from jlt.protocol import default_device

        return _store_result(encode(self.config, self.out, default_device()), self.out)


@dataclass(frozen=True, kw_only=True)
class Adopt(Verb):
    """Make a latent store of the authors' shards, where they lie: write the manifest beside them.

    For example:

      jlt encode --adopt shards --resolution 256
    """

    adopt: Path
    """Folder of latents_rank*_shard*.safetensors."""
    autoencoder: str = "flux2"
    """What made the latents, and will decode samples."""
    autoencoder_path: str | None = None
    """Where its weights are: a local folder or a Hub id."""
    resolution: int | None = None
    """Side of the images in pixels (default: the latents' height times the autoencoder's downsampling)."""
    class_names: Path | None = None
    """A text file with one class name a line (default: the numbers)."""

    def run(self) -> Result:
        from jlt.data.adopt import adopt
        from jlt.data.sources.labels import read_class_names

        names = read_class_names(self.class_names) if self.class_names else None
        manifest = adopt(self.adopt, self.autoencoder, self.autoencoder_path, self.resolution, names)
        return _store_result(manifest, self.adopt)


def _store_result(manifest: Any, folder: Path) -> Result:
    shape = f"{manifest.channels}x{manifest.height}x{manifest.width}"
    text = f"{manifest.count} latents of {shape} in {folder}, overall standard deviation {manifest.std:.3f}"
    if manifest.skipped:
        first, more = manifest.skipped[0], len(manifest.skipped) - 1
        text += f"\nnot in it, and listed in its manifest: {first.image}, which {first.reason}"
        text += f", and {more} more" if more else ""
    return Result(manifest.content(), text)


@dataclass(frozen=True, kw_only=True)
class Verify(Verb):
    """Read a latent store or a checkpoint whole and name everything that is wrong; exits 1 if anything is.

    For example:

      jlt verify latents
    """

    folder: Annotated[Path, Positional, tyro.conf.arg(metavar="DIR")]

    def run(self) -> Result:
        from jlt.data.store import verify_store
        from jlt.training.checkpoint import is_checkpoint_or_run, verify_checkpoints

        problems = verify_checkpoints(self.folder) if is_checkpoint_or_run(self.folder) else verify_store(self.folder)
        text = "\n".join(problems) or f"{self.folder} is sound."
        return Result({"folder": str(self.folder), "problems": problems}, text, sound=not problems)


@dataclass(frozen=True, kw_only=True)
class Analyze(Verb):
    """Measure the target geometry of a latent store, and say which prediction it favours: eq. 9-13 of docs/notation.md.

    Several processes share the work: torchrun --nproc-per-node 8 -m -- jlt analyze ...

    For example:

      jlt analyze --latents latents --out geometry --patch-size 1 2 --width 768
    """

    latents: Path
    out: Path
    """Folder for geometry.json and report.html."""
    patch_size: tuple[int, ...] = (1, 2)
    """How latents are cut into tokens."""
    width: tuple[int, ...] = ()
    """Widths of networks that the advice is for (default: those of --checkpoint, else 768, that of JLT-B)."""
    timesteps: Annotated[TimestepConfig, Flat] = field(default_factory=TimestepConfig)
    """The training times that the advice is for."""
    t_eps: float = 0.05
    """Clamp of the matched loss that the advice is for (eq. 5); 0 takes eq. 13 as it stands."""
    loss_space: LossSpace = "v"
    """Space of that loss."""
    noise_scale: float = 1.0
    """Standard deviation of that training's noise."""
    checkpoint: tuple[Path, ...] = ()
    """Runs or checkpoints, trained on these latents, whose errors by direction and time are measured too."""
    ema: str = ""
    """Which of their weights; empty takes a run's first EMA."""
    num: int = 1024
    """Latents that the networks are shown."""

    def run(self) -> Result:
        from jlt.data.store import LatentStore
        from jlt.experiments.geometry import Question, analyze_into
        from jlt.experiments.inside import Networks
        from jlt.geometry.forecast import TrainingModel
        from jlt.processes import joined
        from jlt.protocol import default_device
        from jlt.report.table import geometry_table
        from jlt.training.checkpoint import open_checkpoint

        opened = [open_checkpoint(path) for path in self.checkpoint]
        networks = Networks(opened, self.num, self.ema) if opened else None
        known = sorted({checkpoint.config.network.hidden_size for checkpoint in opened})
        widths = self.width or tuple(known) or (768,)
        if not self.patch_size or min((*widths, *self.patch_size)) < 1:
            raise WrongWordsError("--patch-size and --width need numbers of 1 or more.")
        model = TrainingModel(self.timesteps, self.t_eps, self.loss_space, self.noise_scale)
        question = Question(self.patch_size, widths, model)
        store, device = LatentStore.open(self.latents), default_device()
        with joined(device) as group:
            geometry = analyze_into(store, self.out, question, networks, device, group)
        return Result(geometry, f"{geometry_table(geometry)}\n\nOpen {self.out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class Train(RecipeVerb):
    """Train a recipe on a latent store; the same words continue an interrupted run.

    Any setting of the recipe can be overridden, and --print-config lists them all. RUN/config.json is a recipe too.

    For example:

      jlt train digits --latents latents --out run --prediction v --network.depth 4
    """

    latents: Path | None = None
    """Folder of the latent store."""
    out: Path | None = None
    """Folder of the run."""
    verify_latents: bool = False
    """Read the whole store first, and compare it with its hashes."""
    print_config: bool = False
    """Print the resolved run and leave."""

    def run(self) -> Result:
        config = self.resolve(self.latents)
        if self.print_config:
            return Result(to_dict(config), json.dumps(to_dict(config), indent=2))
        if self.latents is None or self.out is None:
            raise WrongWordsError("Training needs --latents DIR and --out RUN.")
        from jlt.experiments.training import train_and_watch

        checkpoint = train_and_watch(config, self.latents, self.out, self.verify_latents)
        return Result({"run": str(self.out), "checkpoint": str(checkpoint)}, f"Trained: {checkpoint}")


@dataclass(frozen=True, kw_only=True)
class Plan(RecipeVerb):
    """Forecast memory, disk and hours of a recipe before it is paid for, each figure with where it comes from.

    Any setting of the recipe can be overridden, as in jlt train.

    For example:

      jlt plan imagenet256-jlt-b1 --gpus 8 --gpu H200 --micro-batch-size 64
    """

    gpus: int = 1
    """How many, one process each."""
    gpu: str = "H100"
    """Its name, as A100-80, H200 or RTX-4090; cpu is this machine."""
    mfu: float | None = None
    """Share of the peak rate that training reaches (default: an assumption; jlt benchmark train measures it)."""
    latents: Path | None = None
    """A latent store whose shape and count to take (default: the recipe's)."""

    def run(self) -> Result:
        config = self.resolve(self.latents)
        from jlt.data.manifest import read_manifest
        from jlt.experiments.plan import DEFAULT_MFU, describe_hardware, describe_latents, make_plan
        from jlt.report.plan import plan_table

        manifest = read_manifest(self.latents) if self.latents else None
        latents = describe_latents(config, images_of_recipe(self.recipe), manifest)
        hardware = describe_hardware(self.gpu, self.gpus, config)
        mfu = DEFAULT_MFU if self.mfu is None else self.mfu
        plan = make_plan(config, latents, hardware, mfu).to_dict()
        return Result(plan, plan_table(plan))


@dataclass(frozen=True, kw_only=True)
class Sample(Verb):
    """Draw images from a checkpoint; image i of a seed is always the same.

    Several processes share the work: torchrun --nproc-per-node 8 -m -- jlt sample ...
    The same words continue what was interrupted.

    For example:

      jlt sample --checkpoint run --out samples --num 64 --format grid
    """

    checkpoint: Path
    """Run folder (its newest checkpoint) or checkpoint folder."""
    out: Path
    config: Annotated[SampleConfig, Flat] = field(default_factory=SampleConfig)
    format: SampleFormat = "png"
    steps_strip: bool = False
    """Draw one picture of what the network takes for the clean image (x^) along the way from noise."""
    interpolate: bool = False
    """Draw one picture of the ways from the noise of image 0 to that of 1, from 2 to 3, and so on."""
    compare: Path | None = None
    """Another run or checkpoint, drawn from the same noise and labels, for one picture of both."""
    autoencoder_path: str | None = None
    """Where the autoencoder of the latents lies, if not where its name says."""

    def run(self) -> Result:
        if self.steps_strip or self.interpolate or self.compare:
            return self._picture()
        from jlt.processes import joined
        from jlt.protocol import default_device
        from jlt.sampling.sampler import open_sampler
        from jlt.sampling.save import save_samples
        from jlt.training.checkpoint import open_checkpoint

        checkpoint, device = open_checkpoint(self.checkpoint), default_device()
        sampler = open_sampler(checkpoint, self.config, device, self.autoencoder_path)
        with joined(device) as group:
            written = save_samples(sampler, self.out, self.format, group)
        return Result({"written": str(written), "protocol": sampler.protocol()}, f"{self.config.num} images: {written}")

    def _picture(self) -> Result:
        from jlt.processes import joined
        from jlt.protocol import default_device
        from jlt.sampling.pictures import save_picture
        from jlt.sampling.sampler import open_sampler
        from jlt.training.checkpoint import open_checkpoint

        if self.steps_strip and self.interpolate:
            raise WrongWordsError("One picture is either --steps-strip or --interpolate.")
        if self.format != "png":
            raise WrongWordsError("--steps-strip, --interpolate and --compare draw one PNG: leave --format out.")
        kind = "strip" if self.steps_strip else "interpolation" if self.interpolate else "pairs"
        paths = [self.checkpoint, *([self.compare] if self.compare else [])]
        checkpoints = [open_checkpoint(path) for path in paths]
        samplers = [open_sampler(one, self.config, default_device(), self.autoencoder_path) for one in checkpoints]
        names = [f"{one.run.name}, step {one.step:,}" for one in checkpoints]
        with joined(default_device()) as group:
            written = group.on_first(lambda: save_picture(samplers, self.out, kind, names))
        protocols = [sampler.protocol() for sampler in samplers]
        return Result({"written": str(written), "protocols": protocols}, f"Open {written}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Measure a checkpoint's samples, or a folder or .npz of images, against real images.

    For example:

      jlt evaluate --checkpoint run --reference digits --num 1000
    """

    checkpoint: Path | None = None
    """Run folder (its newest checkpoint) or checkpoint folder; or name --samples."""
    samples: Path | None = None
    """Folder of images, or an .npz with `arr_0`."""
    reference: str = "digits"
    """An .npz of statistics, a folder of class folders, or the name of a bundled set."""
    features: str = "digits"
    """Feature extractor: digits, inception (on which FID is defined) or dinov2."""
    features_path: Path | None = None
    """Where its weights are, if they are not bundled: a file for inception, a folder or Hub id for dinov2."""
    config: Annotated[SampleConfig, Flat] = field(default_factory=lambda: SampleConfig(num=1000))
    autoencoder_path: str | None = None
    """Where the autoencoder of the latents lies, if not where its name says."""

    def run(self) -> Result:
        from jlt.evaluation.features import load_extractor
        from jlt.experiments.evaluate import evaluate_checkpoint, evaluate_files
        from jlt.processes import joined
        from jlt.protocol import default_device
        from jlt.report.table import metrics_table

        device = default_device()
        if (samples := self.samples) and not self.checkpoint:
            extractor = load_extractor(self.features, device, self.features_path)
            with joined(device) as group:
                result = group.on_first(lambda: evaluate_files(samples, self.reference, extractor))
        elif self.checkpoint and not self.samples:
            extractor = load_extractor(self.features, device, self.features_path)
            with joined(device) as group:
                result = evaluate_checkpoint(
                    self.checkpoint, self.reference, extractor, self.config, self.autoencoder_path, group
                )
        else:
            raise WrongWordsError("Evaluation needs either --checkpoint or --samples.")
        return Result(result, metrics_table(result["metrics"]))


@dataclass(frozen=True, kw_only=True)
class Reference(Verb):
    """Measure real images once, for evaluations to compare samples with: statistics and single features.

    Several processes share the work: torchrun --nproc-per-node 8 -m jlt reference ...

    For example:

      jlt reference --images digits --resolution 32 --out digits.npz
    """

    images: str
    """A folder of class folders, parquet or tar files, or the name of a bundled set."""
    out: Path
    """The .npz to write; what it was made of goes into a .json beside it."""
    resolution: int = 256
    """Side in pixels that the images are brought to: that of the samples."""
    split: str | None = None
    """Which files of a folder, as train."""
    features: str = "digits"
    """Feature extractor: digits, inception or dinov2."""
    features_path: Path | None = None
    """Where its weights are, if not in the usual place."""

    def run(self) -> Result:
        from jlt.data.sources.registry import open_source
        from jlt.evaluation.features import load_extractor
        from jlt.experiments.reference import make_reference
        from jlt.protocol import default_device

        if self.resolution < 1:
            raise WrongWordsError("--resolution must be 1 or more.")
        device = default_device()
        extractor = load_extractor(self.features, device, self.features_path)
        source = open_source(self.images, self.split)
        identity = make_reference(source, extractor, self.resolution, self.out, device)
        return Result(identity, f"Statistics of {identity['count']:,} images: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Fetch(Verb):
    """Download published weights into $JLT_CACHE, or .cache/jlt at home: inception, on which FID is defined.

    For example:

      jlt fetch inception
    """

    weights: Annotated[str, Positional, tyro.conf.arg(metavar="NAME")]

    def run(self) -> Result:
        from jlt.evaluation.fetch import fetch

        path = fetch(self.weights)
        return Result({"path": str(path)}, f"Fetched: {path}")


@dataclass(frozen=True, kw_only=True)
class Ablate(RecipeVerb):
    """Train, measure and report systems that differ in the named axes and in nothing else. For example:

    jlt ablate digits --latents latents --out ablation --prediction x v --patch-size 1 2 --seed 0 1 2
    """

    latents: Path
    out: Path
    prediction: tuple[Prediction, ...] = ("x", "v")
    loss_space: tuple[LossSpace, ...] = ("v",)
    patch_size: tuple[int, ...] = (1,)
    seed: tuple[int, ...] = (0,)
    anisotropy: tuple[float, ...] = ()
    """Train in coordinates whose eigenvalues are raised to these powers: 0 is whitened, 1 untouched."""
    width: tuple[int, ...] = ()
    """Widths of the network (default: the recipe's)."""
    sample: SampleConfig = DIGITS_SAMPLING
    reference: str = ""
    """Real images or an .npz of their statistics; empty takes the images that the store was made from."""
    features: str = "digits"
    """Feature extractor: digits, inception or dinov2."""
    features_path: str = ""
    """Where its weights are, if not in the usual place."""
    evaluations: int = 6
    """Points of each training curve."""
    workers: int | None = None
    """Systems side by side (default: 2 on a CPU, 1 on a GPU)."""

    def run(self) -> Result:
        from jlt.experiments.ablation import AblationConfig, ablate
        from jlt.report.page import write_report
        from jlt.report.table import results_table

        config = AblationConfig(
            train=self.resolve(self.latents),
            prediction=self.prediction,
            loss_space=self.loss_space,
            patch_size=self.patch_size,
            seed=self.seed,
            sample=self.sample,
            evaluations=self.evaluations,
            extractor=self.features,
            features_path=self.features_path,
            reference=self.reference,
            anisotropy=self.anisotropy,
            width=self.width,
            title=f"Ablation of {self.recipe}",
            recipe=self.recipe,
        )
        summary = ablate(config, self.latents, self.out, self.workers, command_line())
        report = write_report(self.out)
        return Result({**summary, "report": str(report)}, f"{results_table(self.out)}\n\nOpen {report}")


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write report.html for a run (also one under way), an ablation, a quickstart, a sweep or an analysis.

    For example:

      jlt report quickstart
    """

    folder: Annotated[Path, Positional, tyro.conf.arg(metavar="DIR")]

    def run(self) -> Result:
        from jlt.report.page import write_report

        page = write_report(self.folder)
        return Result({"report": str(page)}, f"Open {page}")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Verb):
    """Measure speed, utilisation and memory on this machine: of training, of sampling, of reading data, of encoding.

    For example:

      jlt benchmark train --preset JLT-B/1 --batch-size 8 --compile
    """


VERBS: tuple[type[Verb], ...] = (
    Quickstart,
    Encode,
    Verify,
    Analyze,
    Plan,
    Train,
    Sample,
    Evaluate,
    Reference,
    Fetch,
    Sweep,
    Ablate,
    Report,
    Benchmark,
)
PARSING = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
DESCRIPTION = "Latent diffusion transformers that predict x, eps or v: train, sample, evaluate and explain them."


def parse(arguments: Sequence[str]) -> Verb:
    """Return the verb that the words make; wrong ones are a SystemExit of 2 or an WrongWordsError."""
    if arguments[:1] == ["benchmark"]:
        return _parse(list(arguments[1:]), BENCHMARKS, "jlt benchmark", inspect.getdoc(Benchmark) or "")
    named: dict[str, type[Verb]] = {verb.__name__.lower(): verb for verb in VERBS}
    if any(word.partition("=")[0] == "--adopt" for word in arguments):
        named["encode"] = Adopt
    return _parse(list(arguments), named, "jlt", DESCRIPTION)


def _parse(arguments: list[str], named: dict[str, type[Verb]], prog: str, description: str) -> Verb:
    # The list of verbs shows one line for each; the help of a verb shows its example too.
    chosen = arguments[0] if arguments else None
    if chosen and not chosen.startswith("-") and chosen not in named:
        raise unknown_name("verb" if prog == "jlt" else "benchmark", chosen, named)
    kinds = [
        Annotated[verb, tyro.conf.subcommand(name, description=None if name == chosen else _summary(verb))]
        for name, verb in named.items()
    ]
    union: Any = Union[tuple(kinds)]  # noqa: UP007
    options: dict[str, Any] = {"prog": prog, "description": description, "config": PARSING}
    verb, rest = tyro.cli(union, args=arguments, return_unknown_args=True, **options)
    if isinstance(verb, RecipeVerb):
        return dataclasses.replace(verb, overrides=tuple(rest))
    # Parsing once more without leave for unknown words explains them.
    return tyro.cli(union, args=arguments, **options) if rest else verb


def _summary(verb: type[Verb]) -> str:
    return re.split(r"[.;:](?=\s|$)", verb.__doc__ or "", maxsplit=1)[0].replace("\n    ", " ") + "."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when done, 1 on failure, 2 when the words were wrong, 75 when asked to stop."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if processes.rank() > 0:
        # The first process speaks for all; an error is said by whom it befell.
        silence()
    try:
        verb = parse(words)
        result = verb.run()
    except SystemExit as leave:
        return int(leave.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in words:
            traceback.print_exc()
        return _leave(_explain(error))
    if processes.rank() > 0:
        return 0 if result.sound else 1
    try:
        print(json.dumps(result.data) if verb.json else result.text, flush=True)
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; the interpreter must not complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if result.sound else 1


def _leave(code: int) -> int:
    """Return the exit code; among several processes with GPUs, end with it at once."""
    torch = sys.modules.get("torch")
    if processes.world_size() > 1 and torch is not None and torch.cuda.is_initialized():
        # Taking a GPU's connections down would wait for a process that may be gone.
        sys.stdout.flush()
        os._exit(code)
    return code


def _explain(error: BaseException) -> int:
    """Say in one sentence on stderr what went wrong, and return the exit code."""
    from jlt.signals import Stopped

    if isinstance(error, (Stopped, KeyboardInterrupt)):
        sentence = f"{str(error) or 'Interrupted.'} The same words continue it."
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        sentence = "jlt: The disk is full. What was saved stays good; make room, and the same words continue it."
    elif isinstance(error, OSError) and error.strerror:
        sentence = f"jlt: {error.strerror}: {error.filename}" if error.filename else f"jlt: {error.strerror}"
    elif isinstance(error, JLTError):
        sentence = f"jlt: {error}"
    else:
        sentence = f"jlt: {type(error).__name__}: {error} (--debug shows where)"
    process = f"[process {processes.rank()}] " if processes.world_size() > 1 else ""
    where = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    print(f"{process}{sentence}{where}", file=sys.stderr, flush=True)
    if isinstance(error, Stopped):
        return STOPPED
    return 2 if isinstance(error, WrongWordsError) else 1


if __name__ == "__main__":
    sys.exit(main())
