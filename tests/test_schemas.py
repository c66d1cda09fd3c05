"""The JSON Schemas against every committed record and stream, and against what the readers refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.house import RESULTS
from dora_lab.runs.record import read_record
from dora_lab.runs.schemas import NAMES, schema
from dora_lab.runs.streams import STREAMS, read_stream
from dora_lab.runs.survey import survey
from dora_lab.spec import SpecError, from_dict

Records = dict[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def committed() -> Records:
    return {path: read_record(path) for path, _ in survey(RESULTS).runs}


@pytest.fixture
def record(committed: Records) -> dict[str, Any]:
    """A copy of one with an optimizer."""
    return copy.deepcopy(next(record for record in committed.values() if record["spec"]["optim"]))


def errors(name: str, value: Any) -> list[str]:
    return [error.json_path for error in Draft202012Validator(schema(name)).iter_errors(value)]


def shape(value: Any) -> Any:
    """What a schema can see of a stream's row: equal shapes are judged once."""
    return tuple(sorted((name, type(inner)) for name, inner in value.items()))


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_schema_and_a_command_prints_it(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))
    assert json.loads(CliRunner().invoke(app, ["schema", name]).stdout) == schema(name)


def test_every_committed_record_and_spec_fits(committed: Records) -> None:
    assert len(committed) > 300
    validators = {name: Draft202012Validator(schema(name)) for name in ("record", "spec")}
    for path, record in committed.items():
        assert not [*validators["record"].iter_errors(record), *validators["spec"].iter_errors(record["spec"])], path


@pytest.mark.parametrize("stream", STREAMS)
def test_every_committed_line_fits(stream: str, committed: Records) -> None:
    rows = {shape(row): row for path in committed for row in read_stream(path, stream)}
    assert rows
    validator = Draft202012Validator(schema(stream))
    for row in rows.values():
        assert not [*validator.iter_errors(row)], row


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed",), "0"), (("seed",), 0.5), (("tier",), "large"), (("model", "name"), None), (("data", "tasks"), [1]),
        (("data", "tasks"), "boolq"), (("method", "rank"), "8"), (("evaluation",), None), (("model", "nonsense"), 1),
        (("optim", "learning_rate"), "0.1"),
    ],
)  # fmt: skip
def test_it_refuses_what_the_reader_refuses(path: tuple[str, ...], value: Any, record: dict[str, Any]) -> None:
    spec = record["spec"]
    assert not errors("spec", spec)
    place = spec
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert errors("spec", spec) and errors("record", record)
    with pytest.raises(SpecError):
        from_dict(spec)


def test_a_field_that_is_missing_is_refused_unless_it_came_later(record: dict[str, Any]) -> None:
    spec = copy.deepcopy(record["spec"])
    del spec["model"]["name"]
    assert errors("spec", spec) == ["$.model"]
    spec = copy.deepcopy(record["spec"])
    spec["model"].pop("pad", None)
    assert not errors("spec", spec) and from_dict(spec)
    for name in ("spec_id", "status", "schema"):
        assert errors("record", {key: value for key, value in record.items() if key != name})
    assert errors("record", record | {"status": "done"}) == ["$.status"]
    assert errors("record", record | {"params": {"trainable": 0.5}}) == ["$.params.trainable"]
    assert errors("probe", {"step": 1, "module": "a", "kind": "q_proj", "delta_m": None, "delta_d": 0.1})
