"""Result files: every class survives JSON, and the files that earlier versions wrote can be accepted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlt.config import TimestepConfig
from jlt.errors import JLTError
from jlt.results.ablation import Ablation
from jlt.results.evaluation import Evaluation
from jlt.results.files import parse_result, read_result, result_json, write_result
from jlt.results.geometry import ErrorByDirection, Geometry, TrainingModel
from jlt.results.sweep import Sweep
from jlt.storage.codec import from_json, to_json
from jlt.storage.files import read_json, sealed_text, without_seal, write_text

OLD = Path(__file__).parent / "old_results"
"""Written by the version before results had classes."""
JSON = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
SIMPLE = {
    Any: JSON,
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=3),
    TrainingModel: st.just(to_json(TrainingModel(TimestepConfig(), 0.05))),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return the JSON of values of a field's type; tuples of any length hold one value or two."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SIMPLE:
        return SIMPLE[hint]
    if origin is Annotated:
        (limits,) = hint.__metadata__
        high = None if limits.high == math.inf else limits.high
        if hint.__origin__ is int:
            return st.integers(int(limits.low), int(high or 2**63))
        return st.floats(limits.low, high, allow_infinity=False)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return st.fixed_dictionaries({entry.name: values(hints[entry.name]) for entry in dataclasses.fields(hint)})
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if kind is types.NoneType else values(kind) for kind in arguments))
    if origin is tuple and Ellipsis in arguments:
        return st.lists(values(arguments[0]), min_size=1, max_size=2)
    if origin is tuple:
        return st.tuples(*map(values, arguments)).map(list)
    assert issubclass(origin, Mapping)
    return st.dictionaries(values(arguments[0]).map(str), values(arguments[1]), max_size=2)


@pytest.mark.parametrize("kind", [Evaluation, Ablation, Sweep, Geometry, ErrorByDirection])
def test_every_result_survives_json(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "result.json"

    @settings(max_examples=20, deadline=None)
    @given(values(kind))
    def survives(content):
        result = from_json(kind, content)
        assert to_json(result) == content
        write_result(path, result)
        assert read_result(kind, path) == result

    survives()


@pytest.mark.parametrize("kind", [Evaluation, Ablation, Sweep])
def test_a_file_of_the_version_before_is_read_whole_once_it_is_accepted(kind, tmp_path):
    path = Path(shutil.copy(OLD / f"{kind.__name__.lower()}.json", tmp_path))
    with pytest.raises(JLTError, match=r"carries no hash of itself.* --seal"):
        read_result(kind, path)
    write_text(path, sealed_text(json.loads(path.read_text())))
    old = {key: value for key, value in without_seal(read_json(path)).items() if key not in kind.UNREAD}
    new = json.loads(json.dumps(result_json(read_result(kind, path))))
    # Only fields with a default are new.
    assert from_json(kind, {key: value for key, value in old.items() if key != "schema"}) == read_result(kind, path)
    assert is_part_of(old, new)


def is_part_of(old: Any, new: Any) -> bool:
    if isinstance(old, dict):
        return old.keys() <= new.keys() and all(is_part_of(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(is_part_of, old, new))
    return old == new


def test_a_sweep_without_a_stage_or_a_confirmed_setting_is_damaged(tmp_path):
    content = json.loads((OLD / "sweep.json").read_text())
    for key in ("stages", "confirmed"):
        write_text(tmp_path / "sweep.json", sealed_text({**content, key: []}))
        with pytest.raises(JLTError, match="damaged"):
            read_result(Sweep, tmp_path / "sweep.json")


def test_evaluations_are_compared_by_method_and_not_by_what_was_evaluated():
    evaluation = parse_result(Evaluation, OLD / "evaluation.json", json.loads((OLD / "evaluation.json").read_text()))

    def changed(**changes):
        return dataclasses.replace(evaluation, protocol={**evaluation.protocol, **changes})

    autoencoder = evaluation.protocol["autoencoder"]
    coordinates = {**autoencoder["normalisation"], "coordinates": {"anisotropy": 0.0}}
    reference = {**evaluation.protocol["reference"], "images": "digits"}
    alike = [
        changed(checkpoint="0" * 64),
        changed(ema_rebuilt={"from": 3}),
        changed(autoencoder={**autoencoder, "normalisation": coordinates}),
    ]
    assert {other.method for other in alike} == {evaluation.method}
    assert (
        changed(reference={**reference, "sha256": "1"}).method == changed(reference={**reference, "sha256": "2"}).method
    )
    other = changed(steps=evaluation.protocol["steps"] + 1)
    assert other.method != evaluation.method
    assert evaluation.differences(other) == [("steps", evaluation.protocol["steps"], other.protocol["steps"])]
