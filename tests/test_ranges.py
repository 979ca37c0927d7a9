"""Every number that a user can set has a range, and one outside it is refused with its option before any work."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from data_helpers import NoiseSource, PatchAutoencoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlt.cli.benchmark import BENCHMARKS
from jlt.cli.evaluation import FixedSampling, PricedSampling
from jlt.cli.experiments import Ablate
from jlt.cli.latents import Adopt
from jlt.cli.main import COMMANDS, main
from jlt.cli.training import RecipeCommand
from jlt.config import NetworkConfig, OptimizerConfig, SampleConfig, TrainConfig
from jlt.errors import UsageError
from jlt.latents.encode_config import EncodeConfig
from jlt.latents.encoding_job import EncodingJob
from jlt.ranges import Range, RangeError, ranges_of
from jlt.storage.codec import from_json

ARGUMENTS = {
    "quickstart": "",
    "encode": "--images x --autoencoder tiny --out x",
    "encode --adopt x": "",
    "analyze": "--latents x --out x",
    "plan": "digits",
    "train": "digits",
    "sample": "--checkpoint x --out x",
    "demo": "x",
    "reference": "--images x --out x",
    "evaluate": "--checkpoint x",
    "sweep": "--checkpoint x",
    "price": "--checkpoint x",
    "ablate": "digits --latents x --out x",
    "import": "x --out x",
    "export": "x --out x",
    **{f"benchmark {name}": "" for name in BENCHMARKS},
}
"""What a command needs besides the option; nothing of this name exists."""
FIXED = {FixedSampling: {"cfg_scale", "cfg_interval"}, PricedSampling: {"steps", "shift", "grid", "cfg_interval"}}


def is_number(hint: Any) -> bool:
    return hint in (int, float) or (get_origin(hint) is not Literal and any(map(is_number, get_args(hint))))


def numbers(kind: type, prefix: str = "") -> Iterator[tuple[type, str, str]]:
    """Yield the class, the name and the option of every number in a data class and its parts."""
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            flat = get_origin(marked[entry.name]) is not None
            yield from numbers(hint, prefix if flat else f"{prefix}{entry.name}.")
        elif is_number(hint) and entry.name not in FIXED.get(kind, ()):
            yield kind, entry.name, f"--{prefix}{entry.name}".replace("_", "-")


def options() -> list[tuple[str, str, Range]]:
    """Return all options that take numbers: the command, the option, and its range."""
    kinds = {kind.__name__.lower(): kind for kind in COMMANDS} | {"encode --adopt x": Adopt}
    kinds |= {f"benchmark {name}": kind for name, kind in BENCHMARKS.items()}
    found = []
    for command, kind in kinds.items():
        # An ablation reads the shape of its latents before the settings of its recipe, which are those of a training.
        parts = [kind, *([TrainConfig] if issubclass(kind, RecipeCommand) and kind is not Ablate else [])]
        for owner, name, option in [entry for part in parts for entry in numbers(part)]:
            assert name in ranges_of(owner), f"{owner.__name__}.{name} has no range: add it to jlt.ranges"
            found.append((command, option, ranges_of(owner)[name]))
    return found


def outside(values: Range, draw: float) -> list[str]:
    """Return texts of numbers that are not in a range."""
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    low, high = (values.low - 1, values.high + 1) if whole else (values.low - draw, values.high + draw)
    return [str(low), str(high), str(10**30)]


def test_every_number_of_every_command_has_a_range():
    assert len(options()) > 150


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_number_outside_its_range_is_refused_by_its_option(data, capsys):
    command, option, values = data.draw(st.sampled_from(options()))
    text = data.draw(st.sampled_from(outside(values, 0.5)))
    words = [*command.split(), *ARGUMENTS[command].split(), f"{option}={text}"]
    if option.endswith(("betas", "cfg-interval")):
        words = [*words[:-1], option, text, text]
    if text.startswith("-") and len(words) > 2 and words[-2] == text:
        return
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"jlt: {option} must be {values}, not "), message
    assert message.count("\n") == 1


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e400"])
@pytest.mark.parametrize("option", ["--optimizer.learning_rate", "--optimizer.weight-decay", "--timesteps.P_mean"])
def test_numbers_that_are_not_finite_are_refused(option, text, capsys):
    assert main(["plan", "digits", f"{option}={text}"]) == 2
    assert capsys.readouterr().err.startswith(f"jlt: {option} must be ")


@given(
    low=st.integers(-100, 100),
    width=st.integers(0, 100),
    above=st.booleans(),
    below=st.booleans(),
    value=st.floats(-250, 250) | st.just(math.nan) | st.just(math.inf),
)
def test_a_range_holds_what_its_text_says(low, width, above, below, value):
    values = Range(low, low + width, above, below)
    expected = (value > low if above else value >= low) and (value < low + width if below else value <= low + width)
    assert (value in values) is expected
    assert str(values).startswith("above" if above else "from")
    assert ("below" in str(values)) is below


def test_python_and_files_get_the_same_answer():
    with pytest.raises(RangeError, match=r"^num must be from 1 to 10,000,000, not 0\.$") as caught:
        SampleConfig(num=0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(UsageError, match=r"^network\.depth must be from 1 to 4,096, not 0\.$"):
        from_json(NetworkConfig, {"channels": 1, "height": 1, "width": 1, "num_classes": 1, "depth": 0}, "network.")
    with pytest.raises(UsageError, match=r"betas must be from 0 to below 1, not 2"):
        OptimizerConfig(betas=(0.9, 2.0))


def test_a_batch_beyond_the_memory_of_the_machine_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(UsageError, match=r"A batch of 1,048,576 images needs .* GiB of memory or more"):
        EncodingJob(NoiseSource(4), PatchAutoencoder(), EncodeConfig("x", "x", batch_size=2**20), tmp_path)
