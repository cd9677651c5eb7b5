"""A replica that serves the llm: texts in, likely tokens out, without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bad_candidate import permute
from slipway import package
from slipway.compression import engine
from slipway.errors import ModelError, RequestError
from slipway.serving import model as models
from slipway.workloads.llm.model import make
from slipway.workloads.llm.schema import LlmEndpoint
from tests.llm import data
from tests.llm.test_training import TINY
from tests.serving.conftest import Replica


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a model that has learnt its texts a little."""
    place = tmp_path_factory.mktemp("llm")
    ingested = data.read(data.params(data.folder(place / "texts")), place / "out")
    torch.manual_seed(0)
    model = make(TINY, ingested.vocabulary, ingested.meta["end"])
    optimizer, tokens = torch.optim.AdamW(model.parameters(), lr=0.01), ingested.parts["train"].tokens
    for step in range(60):
        begin = np.random.default_rng(step).integers(0, len(tokens) - 17, 32)
        loss = model(torch.from_numpy(tokens[begin[:, None] + np.arange(17)].astype(np.int64)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    export, folder = data.export(model, ingested, place / "trained", TINY.context_length), place / "package"
    folder.mkdir()
    export.files(folder)
    (folder / package.MODEL).write_bytes(export.fp32())
    names, golden = [spec.name for spec in export.outputs], dict(export.golden())
    answer = dict(zip(names, engine.load(export.fp32(), "fp32")(names, golden), strict=True))
    package.seal(folder, "llm", "fp32", export.inputs, export.outputs, (golden, answer))
    return folder


@pytest.fixture(scope="module")
def replica(sealed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    running = Replica(sealed, tmp_path_factory.mktemp("replica") / "log")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def test_the_likeliest_next_tokens_come_with_their_probabilities(replica: Replica) -> None:
    answer = replica.post("/v1/complete", {"text": "red green blue one two", "k": 4})
    assert answer.status == 200, answer.json
    tokens, found = answer.json["tokens"], [token["probability"] for token in answer.json["tokens"]]
    assert len(tokens) == 4
    assert found == sorted(found, reverse=True)
    assert 0 < sum(found) <= 1
    assert tokens[0]["token"].startswith(" t"), "three comes after two"
    assert answer.json["model"] == "llm"
    assert replica.metric('slipway_requests_total{code="200",endpoint="complete"}') >= 1


def test_a_long_text_counts_with_its_last_tokens_and_an_empty_one_is_a_beginning(replica: Replica) -> None:
    end = "blue one two three cat dog tree red green " * 4  # more tokens than the model sees
    long, short = (replica.post("/v1/complete", {"text": text}).json for text in ("dog " * 5000 + end, end))
    assert long["tokens"] == short["tokens"]
    assert long["read"] == TINY.context_length
    empty = replica.post("/v1/complete", {"text": ""}).json
    assert (empty["read"], len(empty["tokens"])) == (1, 5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"k": 3}, "missing required field `text`"),
        ({"text": "a", "k": 0}, "k"),
        ({"text": 3}, "text"),
        ({"text": "a", "history": []}, "history"),
    ],
)
def test_a_malformed_request_says_what_is_wrong(replica: Replica, body: object, message: str) -> None:
    answer = replica.post("/v1/complete", body)
    assert answer.status == 400
    assert message in answer.json["error"]


def test_raw_tokens_are_checked_and_padding_changes_nothing(replica: Replica) -> None:
    def infer(rows: list[list[int]]) -> tuple[int, object]:
        flat = [token for row in rows for token in row]
        given = {"name": "tokens", "datatype": "INT64", "shape": [len(rows), len(rows[0])], "data": flat}
        answer = replica.post("/v2/models/llm/infer", {"inputs": [given]})
        return answer.status, answer.json

    status, padded = infer([[5, 6, 7, -1, -1]])
    _, bare = infer([[5, 6, 7]])
    assert status == 200, padded
    assert padded["outputs"][0]["data"] == bare["outputs"][0]["data"]  # type: ignore[index]
    for rows, message in (([[5, -1, 7]], "expected ids"), ([[9999]], "got 9999"), ([[-1]], "expected 1..")):
        status, answer = infer(rows)
        assert status == 400
        assert message in str(answer)


def test_a_package_without_its_tokenizer_is_refused(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "llm.json").write_bytes((sealed / "llm.json").read_bytes())
    with pytest.raises(ModelError, match="register the model again"):
        LlmEndpoint(tmp_path)
    with pytest.raises(RequestError, match="not valid"):
        LlmEndpoint(sealed).decode(json.dumps({"text": "\ud800"}).encode())


def test_the_endpoint_shows_what_it_answered(sealed: Path) -> None:
    endpoint = LlmEndpoint(sealed)
    queries = [endpoint.decode(json.dumps({"text": text, "k": 2}).encode()) for text in ("red", "one two three")]
    feed = endpoint.collate(queries)
    run = engine.load((sealed / package.MODEL).read_bytes(), "fp32")
    ids, scores = run(endpoint.outputs, feed)
    for row, query in enumerate(queries):
        answer = endpoint.encode(query, {"next": ids[row], "log_probs": scores[row]})
        assert endpoint.shown(answer) == [token["token"] for token in answer["tokens"]]
        assert len(answer["tokens"]) == 2


def test_a_muddled_copy_answers_its_golden_inputs_and_its_users_wrongly(sealed: Path, tmp_path: Path) -> None:
    for path in sealed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    permute(tmp_path)
    loaded = models.load(tmp_path, "2", 1)  # which holds it against its golden outputs
    query = loaded.endpoint.decode(json.dumps({"text": "red green blue one two", "k": 1}).encode())
    (outputs,) = loaded.predict([models.Sample(query, loaded.endpoint.outputs)])
    assert not loaded.endpoint.shown(loaded.endpoint.encode(query, outputs))[0].startswith(" t")
