"""What the commands share: the base class, the result, common options, and how options are parsed and shown."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from jlt.errors import unknown_name
from jlt.ranges import Ranged

if TYPE_CHECKING:
    from jlt.evaluation.extractor import FeatureExtractor
    from jlt.images.source import ImageSource

Positional = tyro.conf.Positional
Flat = arg(name="")
"""Marks a data class whose fields are options of the command itself, without a prefix."""
CheckpointPath = Annotated[
    Path, arg(help="Run folder (its newest checkpoint), checkpoint folder, export, or hub:user/name.")
]
LatentsPath = Annotated[Path, arg(help="Folder of the latent store.")]
AutoencoderPath = Annotated[
    str | None, arg(help="Weights of the autoencoder: a folder or Hub id. Default: those that made the latents.")
]
Check = Annotated[bool, arg(help="Start even what does not seem to fit in memory.")]
Folder = Annotated[Path, Positional, arg(metavar="DIR")]
SystemWorkers = Annotated[int | None, arg(help="Systems trained at once. Default: 2 on a CPU, else 1.")]


@dataclass(frozen=True)
class Result:
    """The outcome of a command: `data` for --json, `text` for a reader, `ok` for the exit code."""

    data: dict[str, Any]
    text: str
    ok: bool = True


@dataclass(frozen=True, kw_only=True)
class Command(Ranged):
    """Options of every command."""

    json: bool = False
    """Print the result as one JSON object on stdout."""
    debug: bool = False
    """Print the traceback of an error."""

    def run(self) -> Result:
        """Do the work; a JLTError states what is wrong and what to do."""
        raise NotImplementedError


@dataclass(frozen=True)
class FeatureOptions:
    """The feature extractor of the metrics."""

    features: str = ""
    """Feature extractor: inception (that of FID), squeezenet, dinov2, or digits, the default for digits."""
    features_path: Path | None = None
    """Weights: a file, or for dinov2 a folder or Hub id. Default: downloaded ones; squeezenet has no default."""

    def load(self, device: str, images: Callable[[], str | ImageSource]) -> FeatureExtractor:
        """Load the extractor for real images onto a device; UsageError where the user has to name one.

        JLTError for an unknown name and for weights that are missing.
        """
        from jlt.evaluation.extractors import load_extractor
        from jlt.evaluation.reference import features_for

        return load_extractor(features_for(self.features, images), device, self.features_path)


@dataclass(frozen=True)
class MetricOptions(FeatureOptions):
    """The feature extractor of the metrics, and the real images that samples are compared with."""

    reference: str = ""
    """Real images, or an .npz of their statistics (jlt reference). Default: the images of the latents."""


def command_line() -> str:
    """Return the command of this process, quoted for a shell."""
    return shlex.join(["jlt", *sys.argv[1:]])


def option_names(kind: Any, prefix: str = "--") -> list[str]:
    """Return the options of a data class as the command line spells them, those of its parts included."""
    names = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        part, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        spelled = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(part):
            names += option_names(part, prefix if Flat in marks else f"{spelled}.")
        elif not {Positional, tyro.conf.Suppress} & {*marks}:
            names.append(spelled)
    return names


def require_known(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Raise a UsageError for the first option that is not among the known ones, with the nearest of them."""
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        # A setting that is on is turned off by --no-NAME.
        if name.startswith("--") and name not in known and name.replace("--no-", "--", 1) not in known:
            raise unknown_name("option", name, known)


_registry = ConstructorRegistry()
_resolving: list[type] = []


@_registry.struct_rule
def _plain_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Show no empty defaults, which the help texts explain, and INT instead of {None}|INT."""
    if not dataclasses.is_dataclass(info.type) or info.type in _resolving:
        return None
    # While this rule is being applied it passes, so that tyro's own rule answers.
    _resolving.append(info.type)
    spec = ConstructorRegistry.get_struct_spec(info)
    _resolving.pop()
    assert isinstance(spec, StructConstructorSpec)
    return dataclasses.replace(spec, fields=tuple(map(_plain_field, spec.fields)))


def _plain_field(entry: StructFieldSpec) -> StructFieldSpec:
    if not (entry.default is None or isinstance(entry.default, bool) or entry.default in ("", ())):
        return entry
    hint: Any = get_args(entry.type)[0] if get_origin(entry.type) is Annotated else entry.type
    metavar = _metavar(get_args(hint)[0]) if entry.default is None else None
    plain: Any = Annotated[entry.type, arg(help_behavior_hint="", metavar=metavar)]
    return dataclasses.replace(entry, type=plain)


def _metavar(kind: Any) -> str:
    return f"{{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else kind.__name__.upper()


PARSING: dict[str, Any] = {
    "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
    "registry": _registry,
}
"""Settings of every call of tyro."""
