"""Data classes to JSON and back, and the one reader and writer of result files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlt.errors import JLTError, UsageError
from jlt.results.files import ResultFile, read_result, write_result
from jlt.storage.codec import Share, from_json, to_json
from jlt.storage.files import sealed_text


@dataclass(frozen=True)
class Part:
    name: str
    values: tuple[float, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Whole(ResultFile):
    SCHEMA: ClassVar[int] = 4

    kind: Literal["x", "v"]
    count: int
    exact: bool
    parts: dict[int, Part]
    table: tuple[tuple[float, ...], ...]
    shares: dict[Literal["x", "v"], float] = field(default_factory=dict)
    anything: Any = None
    share: Share = 0.5


@dataclass(frozen=True)
class Grown:
    name: str
    later: bool = field(default=False, metadata={"omit_default": True})


def test_a_field_that_was_added_later_is_stored_only_where_it_is_used():
    assert to_json(Grown("a")) == {"name": "a"}
    for value in (Grown("a"), Grown("a", later=True)):
        assert from_json(Grown, to_json(value)) == value


PARTS = st.builds(
    Part,
    st.text(max_size=5),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    st.none() | st.text(max_size=3),
)
WHOLES = st.builds(
    Whole,
    st.sampled_from(["x", "v"]),
    st.integers(-(2**63), 2**63),
    st.booleans(),
    st.dictionaries(st.integers(0, 9), PARTS, max_size=3),
    st.lists(st.lists(st.floats(-1, 1), max_size=2).map(tuple), max_size=2).map(tuple),
    st.dictionaries(st.sampled_from(["x", "v"]), st.floats(0, 1)),
    st.none() | st.dictionaries(st.text(max_size=2), st.integers()),
)
EXAMPLE = Whole(
    "x", 3, True, {1: Part("a", (1.0, 2.5), "b"), 2: Part("c")}, ((0.5,), ()), {"v": 0.25}, {"k": [1, None]}
)


@given(WHOLES)
def test_a_data_class_survives_json(whole: Whole):
    assert from_json(Whole, json.loads(json.dumps(to_json(whole)))) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "eps"}, "kind must be one of x, v"),
        ({"count": 1.5}, "count must be int"),
        ({"count": True}, "count must be int"),
        ({"count": 10**30}, "count is a whole number of more than 64 bits"),
        ({"exact": 1}, "exact must be bool"),
        ({"share": 1.5}, "share must be from 0 to 1, not 1.5"),
        ({"share": True}, "share must be float"),
        ({"share": math.nan}, "share must be a finite number"),
        ({"table": [[math.inf]]}, "table must be a finite number"),
        ({"parts": [1]}, "parts must be"),
        ({"parts": {"1": [1]}}, "parts.1 must be"),
        ({"parts": {"one": {"name": "a"}}}, "no whole number"),
        ({"parts": {"1": {"nam": "a"}}}, "parts.1.nam"),
        ({"parts": {"1": {}}}, "parts.1.name is missing"),
        ({"table": [["a"]]}, "table must be float"),
        ({"table": 3}, "table must be"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str):
    with pytest.raises(JLTError, match=message):
        from_json(Whole, {**json.loads(json.dumps(to_json(EXAMPLE))), **change})


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    with pytest.raises(UsageError, match="did you mean count"):
        from_json(Whole, {"cuont": 1})


def test_a_result_file_round_trips_and_names_damage(tmp_path: Path):
    path = tmp_path / "whole.json"
    write_result(path, EXAMPLE)
    assert read_result(Whole, path) == EXAMPLE
    content = json.loads(path.read_text())
    assert content["schema"] == 4

    path.write_text(path.read_text().replace('"count": 3', '"count": 8'))
    with pytest.raises(JLTError, match="edited or damaged"):
        read_result(Whole, path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(JLTError, match=r"whole.json carries no hash of itself.*jlt verify .* --seal"):
        read_result(Whole, path)
    path.write_text(sealed_text({**content, "schema": 3}))
    with pytest.raises(JLTError, match="schema 3, and this version of jlt reads schema 4"):
        read_result(Whole, path)
    path.write_text(sealed_text({**content, "count": "many"}))
    with pytest.raises(JLTError, match=r"damaged or was written by another version: count must be int"):
        read_result(Whole, path)


def test_no_result_holds_what_json_cannot(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(tmp_path / "whole.json", Whole("x", 1, True, {}, ((float("nan"),),)))
