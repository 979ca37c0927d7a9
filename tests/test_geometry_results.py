"""geometry.json and inside.json as data classes: round trips, and files of earlier versions of the same schema."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from fake_results import LATENTS, GaussianStore, analyze
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jlt.config import TimestepConfig
from jlt.errors import JLTError
from jlt.report.geometry_sentences import advice_sentences, caution_sentences, inside_sentences
from jlt.report.terminal import geometry_table
from jlt.results.files import read_result, result_json, write_result
from jlt.results.geometry import Band, ErrorByDirection, ErrorDifference, Geometry, NetworkError, TrainingModel
from jlt.storage.codec import from_json, to_json
from jlt.storage.files import sealed_text

SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=4),
    bool: st.booleans(),
    Any: st.integers() | st.text(max_size=4),
    TrainingModel: st.just(to_json(TrainingModel(TimestepConfig(), 0.05))),
}


def contents(hint: Any) -> st.SearchStrategy[Any]:
    """What JSON may hold for a field's type."""
    if hint in SIMPLE:
        return SIMPLE[hint]
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.fixed_dictionaries({entry.name: contents(hints[entry.name]) for entry in dataclasses.fields(hint)})
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(contents(arguments[0]), max_size=2)
    if origin in (typing.Union, types.UnionType):
        return st.none() | contents(arguments[0])
    assert issubclass(origin, Mapping)
    return st.dictionaries(contents(arguments[0]).map(str), contents(arguments[1]), max_size=2)


@pytest.mark.parametrize("kind", [Geometry, ErrorByDirection])
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_results_survive_json(kind: type, data: st.DataObject) -> None:
    content = data.draw(contents(kind))
    result = from_json(kind, content)
    assert to_json(result) == content
    assert from_json(kind, json.loads(json.dumps(content, allow_nan=False))) == result


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return analyze(GaussianStore(GaussianStore().latents[:60]), [1, 4], [8])


def inside() -> ErrorByDirection:
    """Two networks, two times and two directions."""
    rows = ((1.0, 0.5), (0.5, 0.25))
    band = Band(directions=2, error=(1.5, 0.75), beyond_optimum=(0.5, 0.25), low=0.01, high=0.1)
    network = NetworkError("JLT", "run", 7, "x", "ab" * 32, "0.99", rows, rows, (band,))
    return ErrorByDirection(
        patch_size=1,
        latents=LATENTS,
        count=10,
        seed=0,
        times=(0.05, 0.4),
        eigenvalues=(0.05, 0.02),
        optimum=rows,
        whole_optimum=rows,
        whole_estimate="exact",
        networks=(network, dataclasses.replace(network, run="other", prediction="v")),
        beyond_the_first=(ErrorDifference(rows, rows),),
    )


def test_a_measured_geometry_survives_its_file(geometry: Geometry, tmp_path: Path) -> None:
    assert geometry.cautions
    write_result(tmp_path / "geometry.json", geometry)
    assert read_result(Geometry, tmp_path / "geometry.json") == geometry
    write_result(tmp_path / "inside.json", inside())
    assert read_result(ErrorByDirection, tmp_path / "inside.json") == inside()


def test_a_geometry_of_an_earlier_version_loads_unchanged(geometry: Geometry, tmp_path: Path) -> None:
    """Earlier files of schema 3 hold the cautions and the advice as text, and no summary where there is none."""
    old = result_json(geometry)
    del old["cautions"]
    old["warnings"] = ["Patch size 1, 60 latents: ..."]
    del old["tokens"]["1"]["local"]["within neighbourhoods"]["effective_rank"]
    for entry in old["tokens"].values():
        for advice in entry["forecast"]["advice"]:
            advice["words"] = "Predict x ..."
    (tmp_path / "geometry.json").write_text(sealed_text(old))
    found = read_result(Geometry, tmp_path / "geometry.json")
    assert caution_sentences(found) == ["Patch size 1, 60 latents: ..."]
    assert advice_sentences(found) == advice_sentences(geometry)
    assert geometry_table(found) == geometry_table(geometry)
    assert found.tokens[4].eigenvalues == geometry.tokens[4].eigenvalues


def test_errors_of_an_earlier_version_load_unchanged(tmp_path: Path) -> None:
    """Earlier files of schema 1 name the bands as text."""
    old = result_json(inside())
    for network in old["networks"]:
        del network["ema_rebuilt"]
        for band in network["bands"]:
            del band["low"], band["high"]
            band["name"] = "with a hundredth to a tenth of it"
    (tmp_path / "inside.json").write_text(sealed_text(old))
    found = read_result(ErrorByDirection, tmp_path / "inside.json")
    assert inside_sentences(found) == inside_sentences(inside())
    assert "1.0 times as large in the 2 directions with a hundredth to a tenth of it" in inside_sentences(found)[0]


@pytest.mark.parametrize("content", [{}, {"schema": 3}])
def test_a_file_without_its_seal_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    for kind, name in ((Geometry, "geometry.json"), (ErrorByDirection, "inside.json")):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(JLTError, match=f"{name} carries no hash of itself"):
            read_result(kind, tmp_path / name)
    (tmp_path / "geometry.json").write_text(sealed_text({"schema": 2}))
    with pytest.raises(JLTError, match="has schema 2, and this version of jlt reads schema 3"):
        read_result(Geometry, tmp_path / "geometry.json")
