from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from slipway import config
from slipway.errors import ParamsError
from tests.conftest import ROOT


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


def test_the_params_of_the_checkout_pass_their_own_checks() -> None:
    params = config.load(ROOT / "params.yaml")
    assert params.workload == "ranker"
    assert type(params.model).__name__ == "RankerParams"


def test_every_value_of_the_file_bears_a_comment() -> None:
    for number, line in enumerate((ROOT / "params.yaml").read_text().splitlines(), start=1):
        if ":" in line.split("#")[0] and not line.split("#")[0].rstrip().endswith(":"):
            assert "#" in line, f"params.yaml:{number} has no comment: {line}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.epochs", 0, "train.epochs: Input should be greater than or equal to 1 (got 0); allowed: Passes over"),
        ("train.epochs", "ten", "train.epochs: Input should be a valid integer (got 'ten')"),
        ("train.epoch", 3, "train.epoch: unknown key; allowed here: batch_size, checkpoint_every_s, communication"),
        ("trian.epochs", 3, "trian: unknown key; allowed here: canary"),
        ("canary.step_weights", [0.5, 0.2], "canary: step_weights must rise"),
        ("ranker.heads", 3, "ranker: width must be a multiple of heads, got 128 and 3"),
        ("stack.airflow_port", 18080, "stack: every port must be given once only"),
        ("workload", "rnaker", "workload: no workload 'rnaker'; there are: classifier, llm, ranker"),
        ("compress.max_drop", 1.5, "compress.max_drop: Input should be less than or equal to 1 (got 1.5)"),
        ("model", {}, "model: unknown key"),
    ],
)
def test_a_wrong_value_is_told_with_file_key_value_and_what_is_allowed(
    params_file: Path, key: str, value: Any, message: str
) -> None:
    before = params_file.read_text()
    with pytest.raises(ParamsError) as error:
        config.override(params_file, {key: value})
    assert f"{params_file}: {message}" in str(error.value)
    assert params_file.read_text() == before, "a refused value was half written"


def test_a_password_in_a_url_is_refused_and_not_repeated(params_file: Path) -> None:
    with pytest.raises(ParamsError, match="ingest.source: a password in the URL") as error:
        config.override(params_file, {"ingest.source": "https://me:hush@example.org/events.csv"})
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "not valid YAML"),
        ("- a\n- b\n", "must hold sections of keys and values, got list"),
        ("", "must hold sections of keys and values, got NoneType"),
        ("train: 3\n", "train: Input should be a valid dictionary or instance of TrainParams (got 3)"),
    ],
)
def test_a_file_of_another_shape_is_refused(params_file: Path, text: str, message: str) -> None:
    params_file.write_text(text)
    with pytest.raises(ParamsError, match="params.yaml") as error:
        config.load(params_file)
    assert message in str(error.value)


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="no such file; run from the root of the checkout"):
        config.load(tmp_path / "params.yaml")


def test_an_override_keeps_the_comments_and_changes_one_line(params_file: Path) -> None:
    before = params_file.read_text().splitlines()
    params = config.override(params_file, {"train.epochs": 7})
    changed = [(a, b) for a, b in zip(before, params_file.read_text().splitlines(), strict=True) if a != b]
    assert params.train.epochs == 7
    assert [b.strip() for _, b in changed] == [
        "epochs: 7                     # passes over the training data (1..10000, form)"
    ]


@given(epochs=st.integers(min_value=-5, max_value=20_000), step=st.floats(min_value=-1, max_value=2))
def test_the_form_and_the_file_allow_the_same(epochs: int, step: float) -> None:
    """What JSON schema lets through, the file's checks let through: nothing is refused later than the form."""
    import jsonschema

    fields = {field.key: field.schema for field in config.form(config.load(ROOT / "params.yaml"))}
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for key, value in (("train.epochs", epochs), ("slo.max_error_ratio", step)):
        section, leaf = key.split(".")
        allowed_by_form = jsonschema.Draft202012Validator(fields[key]).is_valid(value)
        try:
            config.parse({**raw, section: {**raw[section], leaf: value}})
            allowed_by_file = True
        except ParamsError:
            allowed_by_file = False
        assert allowed_by_form == allowed_by_file, (key, value)


def test_the_form_offers_what_a_user_turns_with_its_help() -> None:
    fields = {field.key: field for field in config.form(config.load(ROOT / "params.yaml"))}
    assert set(fields) >= {
        "workload",
        "ingest.source",
        "train.epochs",
        "train.world_size",
        "compress.recipes",
        "canary.step_weights",
        "slo.p99_ms",
    }
    assert fields["workload"].schema["enum"] == config.workload_names()
    assert all(field.schema["description"] for field in fields.values())
    json.dumps([field.default for field in fields.values()])
