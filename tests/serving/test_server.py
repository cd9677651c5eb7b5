"""A replica as its clients see it: answers, errors, the V2 protocol."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipway.params import ServeParams
from slipway.serving import model as models
from slipway.serving.batching import Job
from slipway.serving.edge import Request, Response
from slipway.serving.metrics import Metrics
from slipway.serving.model import Sample
from slipway.serving.server import App
from slipway.workloads.base import Array, Query, Tensors
from tests.serving.conftest import Replica, Reply
from tests.serving.packages import ITEMS, MAX_LENGTH, key, seal

RECOMMEND = "/v1/recommend"
INFER = "/v2/models/ranker/infer"


def tensor(history: list[list[Any]], **changes: Any) -> dict[str, Any]:
    shape = [len(history), len(history[0])]
    return {"name": "history", "shape": shape, "datatype": "INT64", "data": history, **changes}


def test_a_ready_replica_recommends_what_its_engine_says(replica: Replica, package: Path) -> None:
    reply = replica.post(RECOMMEND, {"user": "u", "history": [key(3), key(9)], "k": 5})
    model = models.load(package, "7", 1)
    items, scores = model.engine.run({"history": np.array([[3, 9]])}, ["items", "scores"])
    assert reply.status == 200
    assert [entry["item"] for entry in reply.json["items"]] == [key(i) for i in items[0][:5]]
    assert [entry["score"] for entry in reply.json["items"]] == pytest.approx(scores[0][:5].tolist())
    assert (reply.json["model"], reply.json["version"], reply.json["ignored"]) == ("ranker", "7", [])
    assert reply.headers["x-slipway-version"] == "7"


def recommended(folder: Path, *bodies: dict[str, Any]) -> list[list[Any]]:
    """Items that a model of one's own recommends, without a server around it."""

    async def ask() -> list[Any]:
        app = App("1", ServeParams(), Metrics(), None)
        app.serve(models.load(folder, "1", 1))
        try:
            return [await app(Request("POST", RECOMMEND, json.dumps(body).encode())) for body in bodies]
        finally:
            app.close()

    return [[entry["item"] for entry in json.loads(answer.body)["items"]] for answer in asyncio.run(ask())]


def test_keys_may_be_written_as_numbers(tmp_path: Path) -> None:
    folder = seal(tmp_path / "numbers", prefix="")
    as_numbers, as_text = recommended(folder, {"history": [3, 9]}, {"history": ["3", "9"]})
    assert as_numbers == as_text != []


def test_unknown_items_are_ignored_and_named(replica: Replica) -> None:
    known = replica.post(RECOMMEND, {"history": [key(3)]}).json
    mixed = replica.post(RECOMMEND, {"history": ["nobody", key(3), 77, "nobody"]}).json
    assert mixed["items"] == known["items"]
    assert mixed["ignored"] == ["nobody", 77]
    many = replica.post(RECOMMEND, {"history": [f"unknown{n}" for n in range(1000)]}).json
    assert len(many["ignored"]) == 20


@pytest.mark.parametrize("history", [[], ["nobody"]], ids=["empty", "unknown"])
def test_without_a_known_item_the_most_popular_are_recommended(replica: Replica, history: list[str]) -> None:
    reply = replica.post(RECOMMEND, {"history": history, "k": 3})
    assert [entry["item"] for entry in reply.json["items"]] == [key(1), key(2), key(3)]


def test_of_a_very_long_history_the_last_items_count(replica: Replica) -> None:
    history = [key(1 + n % ITEMS) for n in range(4000)]
    reply = replica.post(RECOMMEND, {"history": history})
    assert reply.status == 200
    assert reply.json["items"] == replica.post(RECOMMEND, {"history": history[-MAX_LENGTH:]}).json["items"]


def test_a_small_catalogue_runs_out_without_padding_or_history(tmp_path: Path) -> None:
    folder = seal(tmp_path / "small", items=5)
    (items,) = recommended(folder, {"history": [key(1), key(4)], "k": 100})
    assert sorted(items) == [key(2), key(3), key(5)]


BAD_BODIES = {
    "not JSON": (b"history", "not valid JSON"),
    "no body": (b"", "not valid JSON"),
    "cut off": (b'{"history": ["item1"', "not valid JSON"),
    "not UTF-8": (b'{"history": ["\xff"]}', "not valid JSON"),
    "half a surrogate": (b'{"history": ["\\ud800"]}', "not valid JSON"),
    "deeply nested": (b"[" * 60_000, "the body"),
    "a list": (b"[]", "the body: Expected `object`, got `array`"),
    "no history": (b'{"k": 3}', "missing required field `history`"),
    "no list": (b'{"history": "item1"}', "Expected `array`, got `str` - at `history`"),
    "an item that is a float": (b'{"history": [1.5]}', "Expected `int | str`, got `float` - at `history[0]`"),
    "an item that is a list": (b'{"history": [["a"]]}', "Expected `int | str`, got `array` - at `history[0]`"),
    "an item that is null": (b'{"history": [null]}', "got `null` - at `history[0]`"),
    "k too small": (b'{"history": [], "k": 0}', "Expected `int` >= 1 - at `k`"),
    "k too large": (b'{"history": [], "k": 101}', "Expected `int` <= 100 - at `k`"),
    "k no number": (b'{"history": [], "k": "ten"}', "Expected `int`, got `str` - at `k`"),
    "an unknown field": (b'{"history": [], "count": 3}', "unknown field `count`"),
    "too long a history": (json.dumps({"history": [1] * 10_001}).encode(), "length <= 10000 - at `history`"),
    "too long a key": (json.dumps({"history": ["x" * 513]}).encode(), "length <= 512 - at `history[0]`"),
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_request_is_told_what_is_wrong_and_harms_nobody(replica: Replica, body: bytes, message: str) -> None:
    reply = replica.post(RECOMMEND, body)
    assert reply.status == 400
    assert message in reply.json["error"].replace("Expected `array` of ", "")
    assert reply.headers["x-slipway-version"] == "7"
    assert replica.post(RECOMMEND, {"history": [key(3)]}).status == 200


def test_paths_and_methods_that_are_not_there_are_named(replica: Replica) -> None:
    assert replica.get("/v3").status == 404
    assert "/v1/recommend" in replica.get("/v2/models/other").json["error"]
    assert replica.get("/v2/models/ranker/versions/8").status == 404
    wrong = replica.get(RECOMMEND)
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert replica.post("/v2/health/live", {}).status == 405


def test_the_protocol_tells_of_server_and_model(replica: Replica) -> None:
    assert replica.get("/v2/health/live").json == {"live": True}
    assert replica.get("/v2/health/ready?verbose=1").json == {"ready": True}
    assert replica.get("/v2").json["name"] == "slipway"
    for path in ("/v2/models/ranker", "/v2/models/ranker/versions/7"):
        told = replica.get(path).json
        assert (told["name"], told["versions"]) == ("ranker", ["7"])
        assert told["inputs"] == [{"name": "history", "datatype": "INT64", "shape": [-1, -1]}]
        assert {"name": "logits", "datatype": "FP32", "shape": [-1, ITEMS + 1]} in told["outputs"]
        assert replica.get(f"{path}/ready").status == 200


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_infer_gives_what_the_engine_gives(replica: Replica, package: Path, flat: bool) -> None:
    history = [[0, 3, 9], [4, 5, 6]]
    data = [*history[0], *history[1]] if flat else history
    body = {"id": "a", "inputs": [tensor(history, data=data)], "outputs": [{"name": "logits"}, {"name": "items"}]}
    reply = replica.post(INFER, body).json
    model = models.load(package, "7", 1)
    logits, items = model.engine.run({"history": np.array(history)}, ["logits", "items"])
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("a", "ranker", "7")
    assert [(o["name"], o["shape"]) for o in reply["outputs"]] == [("logits", [2, ITEMS + 1]), ("items", [2, 100])]
    assert reply["outputs"][1]["data"] == items.ravel().tolist()
    finite = np.isfinite(logits).ravel()
    assert np.array(reply["outputs"][0]["data"], dtype=float)[finite] == pytest.approx(logits.ravel()[finite])


BAD_INPUTS = {
    "another name": (tensor([[1]], name="h"), "expected history once each"),
    "another type": (tensor([[1]], datatype="FP32"), "history.datatype: expected INT64, got FP32"),
    "a float": (tensor([[1.5]]), "history.data: Expected `int`, got `float`"),
    "text": (tensor([["1"]]), "history.data: Expected `int`, got `str`"),
    "beyond 64 bits": (tensor([[1 << 70]]), "history.data: not a INT64 tensor"),
    "ragged": (tensor([[1, 2], [3]]), "history.data: not a INT64 tensor"),
    "another shape": (tensor([[1, 2]], shape=[2, 1]), "history.data: expected shape [2, 1], got [1, 2]"),
    "too few": (tensor([[1, 2]], data=[1]), "history.data: expected shape [1, 2], got [1]"),
    "no samples": (tensor([[1]], shape=[0, 1], data=[]), "history.shape: expected [-1, -1]"),
    "one dimension": (tensor([[1]], shape=[1], data=[1]), "history.shape: expected [-1, -1]"),
    "too many samples": (tensor([[1]] * 9), "history.shape: expected at most 8 samples, got 9"),
    "too long": (tensor([[1] * 21]), "history: expected 1..20 items a row, got 21"),
    "an unknown id": (tensor([[1, ITEMS + 1]]), f"history: expected ids in 0..{ITEMS} (0: padding), got {ITEMS + 1}"),
    "a negative id": (tensor([[-1]]), "got -1"),
}


@pytest.mark.parametrize(("given_input", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_bad_tensor_never_reaches_the_engine(replica: Replica, given_input: dict[str, Any], message: str) -> None:
    reply = replica.post(INFER, {"inputs": [given_input]})
    assert reply.status == 400
    assert message in reply.json["error"]


def test_an_output_that_is_not_there_is_named(replica: Replica) -> None:
    reply = replica.post(INFER, {"inputs": [tensor([[1]])], "outputs": [{"name": "probabilities"}]})
    assert reply.status == 400
    assert "expected some of items, logits, scores" in reply.json["error"]


histories = st.lists(st.lists(st.integers(1, ITEMS), min_size=1, max_size=MAX_LENGTH), min_size=2, max_size=8)


@given(rows=histories)
@settings(max_examples=40, deadline=None)
def test_a_batched_answer_is_the_single_answer(loaded: models.Model, rows: list[list[int]]) -> None:
    samples = [Sample(Query({"history": np.array(row)}, {"k": 10, "ignored": []}), ("items", "scores")) for row in rows]
    for sample, together in zip(samples, loaded.predict(samples), strict=True):
        (alone,) = loaded.predict([sample])
        assert together["scores"] == pytest.approx(alone["scores"], abs=1e-4)
        first, second = (loaded.endpoint.encode(sample.query, outputs)["items"] for outputs in (together, alone))
        assert {e["item"] for e in first[:5]} <= {e["item"] for e in second} | {e["item"] for e in first}


@pytest.fixture(scope="module")
def loaded(package: Path) -> models.Model:
    return models.load(package, "7", 1)


def test_many_clients_at_once_get_their_own_answers(replica: Replica) -> None:
    bodies = [{"history": [key(n)], "k": 3} for n in range(1, 65)]
    alone = [replica.post(RECOMMEND, body).json["items"] for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: replica.post(RECOMMEND, body).json["items"], bodies))
    for one, other in zip(alone, together, strict=True):
        assert [e["item"] for e in one] == [e["item"] for e in other]


def test_metrics_count_what_was_answered(replica: Replica) -> None:
    series = 'slipway_requests_total{code="200",endpoint="recommend"}'
    before = replica.metric(series)
    replica.post(RECOMMEND, {"history": [key(1)]})
    assert replica.metric(series) == before + 1
    assert replica.metric("slipway_ready") == 1
    assert replica.metric("slipway_queue_length") == 0
    for name in ("queue_seconds", "engine_seconds", "batch_size"):
        assert replica.metric(f"slipway_{name}_count") > 0
    assert replica.metric('slipway_request_seconds_count{endpoint="recommend"}') > 0


def test_nothing_of_a_request_is_logged(replica: Replica) -> None:
    replica.post(RECOMMEND, {"history": ["a-secret-item"], "user": "a-secret-user"})
    replica.post(RECOMMEND, b"a-secret-body")
    assert "secret" not in replica.log


def test_a_client_says_how_long_it_waits(replica: Replica) -> None:
    def ask(milliseconds: str) -> Reply:
        return replica.call("POST", RECOMMEND, {"history": [key(3)]}, headers={"X-Deadline-Ms": milliseconds})

    assert ask("1500").status == 200
    assert (late := ask("0.0001")).status == 504
    assert "time was up" in late.json["error"]
    for wrong in ("soon", "-1", "0", "nan", "inf"):
        assert ask(wrong).status == 400


class Gated:
    """A model whose runs wait until they are let go."""

    def __init__(self, model: models.Model) -> None:
        self.go, self._run = threading.Event(), model.engine.run
        self.name, self.inputs, self.outputs = "gated", model.engine.inputs, model.engine.outputs

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        self.go.wait(30)
        return self._run(inputs, outputs)


def test_what_the_queue_cannot_take_is_refused_at_once_and_counted_and_an_idle_queue_refuses_nothing(
    package: Path,
) -> None:
    metrics, model = Metrics(), models.load(package, "1", 1)
    engine = Gated(model)
    request = Request("POST", RECOMMEND, b'{"history": []}')

    async def test() -> None:
        app = App("1", ServeParams(max_queue=2, max_batch=1), metrics, None)
        answers: list[Response] = []
        app.serve(dataclasses.replace(model, engine=engine))
        app.welcome()
        try:
            first, second, third = (app.begin(request, answers.append) for _ in range(3))
            assert not isinstance(first, Response)
            assert not isinstance(second, Response)
            assert isinstance(third, Response)
            assert third.status == 429
            assert (b"retry-after", b"1") in third.headers
            assert b"try again" in third.body
            hurried = app.begin(msgspec.structs.replace(request, headers={b"x-deadline-ms": b"9"}), answers.append)
            assert isinstance(hurried, Response)
            assert hurried.status == 429
            second.cancel()
            assert not isinstance(app.begin(request, answers.append), Response)  # it left its place
            engine.go.set()
            while len(answers) < 2:
                await asyncio.sleep(0.01)
            assert [answer.status for answer in answers] == [200, 200]
            assert not isinstance(app.begin(request, answers.append), Response)
        finally:
            app.close()

    asyncio.run(asyncio.wait_for(test(), 30))
    assert b'slipway_requests_total{code="429",endpoint="recommend"} 2.0' in metrics.exposition()


def test_a_small_body_is_asked_by_calls_alone_and_what_may_take_long_in_a_task(package: Path) -> None:
    bodies = [json.dumps({"history": [key(1 + n % ITEMS) for n in range(count)]}).encode() for count in (3, 3000)]
    small, large = (Request("POST", RECOMMEND, body) for body in bodies)

    async def test() -> None:
        app = App("1", ServeParams(), Metrics(), None)
        app.serve(models.load(package, "1", 1))
        app.welcome()
        answers: list[Response] = []
        asked = [app.begin(request, answers.append) for request in (small, large, Request("GET", "/v2", b""))]
        assert [type(pending) for pending in asked] == [Job, asyncio.Task, asyncio.Task]
        bad = app.begin(Request("POST", RECOMMEND, b"{"), answers.append)
        assert isinstance(bad, Response)
        assert bad.status == 400
        while len(answers) < 3:
            await asyncio.sleep(0.01)
        assert [answer.status for answer in answers] == [200, 200, 200]
        app.close()

    asyncio.run(asyncio.wait_for(test(), 30))


class Faulty:
    """An engine that stalls until it is let go, then ends its thread."""

    name, inputs, outputs = "faulty", ["history"], ["items"]

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, inputs: Tensors, outputs: Sequence[str]) -> list[Array]:
        self.go.wait(30)
        raise SystemExit


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_whose_engine_stalls_or_is_dead_is_not_ready(package: Path) -> None:
    engine = Faulty()

    async def test() -> None:
        async def ready() -> Response:
            return await app(Request("GET", "/v2/health/ready", b""))

        app = App("1", ServeParams(), Metrics(), None)
        app.serve(dataclasses.replace(models.load(package, "1", 1), engine=engine))
        assert b"warming up" in (await ready()).body
        app.welcome()
        assert (await ready()).status == 200
        asked = asyncio.create_task(app(Request("POST", RECOMMEND, b'{"history": []}')))
        while (answer := await ready()).status == 200:
            await asyncio.sleep(0.01)
        assert b"has not come back for " in answer.body
        engine.go.set()
        assert (await asked).status == 503
        assert b"dead" in (await ready()).body
        await app.died()

    asyncio.run(asyncio.wait_for(test(), 30))
