"""Users' events and what is answered from them: real Redis, real replicas, killed at the worst moment."""

from __future__ import annotations

import json
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from slipway import artifacts, eventlog
from slipway.params import Params
from slipway.workloads.ranker.ingest import ingest
from tests.conftest import needs, until
from tests.serving.conftest import PARAMS, Replica, Start
from tests.serving.packages import ITEMS, MAX_LENGTH, key
from tests.serving.test_feedback import Store

pytestmark = needs("redis-server")

CAP = 50
SERVE = json.dumps({**PARAMS, "history_events": CAP, "max_body_bytes": 262_144})


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="slipway") as folder:
        running = Store(Path(folder) / "state.sock")
        yield running
        running.stop()


def environment(store: Store, events: Path) -> dict[str, str]:
    return {"SLIPWAY_STATE": str(store.socket), "SLIPWAY_EVENTS": str(events), "SLIPWAY_SERVE": SERVE}


@pytest.fixture(scope="module")
def events_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events")


@pytest.fixture(scope="module")
def personal(package: Path, store: Store, events_folder: Path) -> Iterator[Replica]:
    running = Replica(package, store.socket.with_name("log"), **environment(store, events_folder))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.close()


def recommend(replica: Replica, user: str, k: int = 10) -> Any:
    reply = replica.get(f"/v1/recommend?user={quote(user, safe='')}&k={k}")
    assert reply.status == 200, reply.body
    return reply.json


def names(answer: Any) -> list[str]:
    return [entry["item"] for entry in answer["items"]]


def took(user: str, *items: int) -> list[dict[str, Any]]:
    return [{"user": user, "item": key(item)} for item in items]


def history(store: Store, user: str) -> list[str]:
    with store.client() as client:
        return [json.loads(member)[1] for member in client.zrange(f"slipway:history:{user}", 0, -1)]


def logged(folder: Path) -> Counter[tuple[str, str]]:
    eventlog.sweep(folder)
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return Counter((row["user"], row["id"]) for row in rows)


def settled(replica: Replica) -> None:
    """Wait until Redis has every accepted event: a busy machine may have been too slow for it at first."""
    until(lambda: replica.metric("slipway_events_waiting") == 0)


def test_an_answer_rests_on_the_users_history_and_shows_nothing_of_it(personal: Replica, store: Store) -> None:
    assert personal.post("/v1/events", took("ann/é?", 3, 9)).json == {"accepted": 2}
    assert personal.post("/v1/events", took("ann/é?", 5)[0]).status == 202
    settled(personal)
    assert history(store, "ann/é?") == [key(3), key(9), key(5)]
    until(lambda: recommend(personal, "ann/é?")["events"] == 3)
    answer = recommend(personal, "ann/é?", 20)
    plain = personal.post("/v1/recommend", {"history": [key(3), key(9), key(5)], "k": 20}).json
    assert (answer["items"], answer["version"]) == (plain["items"], "7")


def test_what_lies_beyond_the_models_length_is_not_shown_either(personal: Replica) -> None:
    older, newer = range(1, 21), range(100, 100 + MAX_LENGTH)
    personal.post("/v1/events", took("long", *older, *newer))
    until(lambda: recommend(personal, "long")["events"] == 20 + MAX_LENGTH)
    got = names(recommend(personal, "long", 100))
    assert not set(got) & {key(item) for item in (*older, *newer)}
    # The model gives 100 at most, some of which were seen: popular ones fill the rest.
    assert len(got) == len(set(got)) == 100
    assert len(names(personal.post("/v1/recommend", {"history": [key(i) for i in newer], "k": 100}).json)) == 100


def test_a_newcomer_gets_what_is_popular(personal: Replica) -> None:
    answer = recommend(personal, "nobody", 5)
    assert names(answer) == [key(item) for item in range(1, 6)]
    assert answer["events"] == 0


def test_a_history_keeps_the_newest_whoever_writes_at_once(personal: Replica, store: Store) -> None:
    def send(part: int) -> int:
        events = [{"user": "busy", "item": key(n), "time": 1000 + n, "id": str(n)} for n in range(part, 201, 4)]
        return personal.post("/v1/events", events).status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(send, [1, 2, 3, 4, 1, 2])) == {202}  # some of them twice
    settled(personal)
    assert history(store, "busy") == [key(n) for n in range(201 - CAP, 201)]


def test_an_event_with_an_id_is_one_event_however_often_it_comes(
    personal: Replica, store: Store, events_folder: Path
) -> None:
    for _ in range(3):
        assert personal.post("/v1/events", {"user": "twice", "item": key(1), "id": "a"}).status == 202
    settled(personal)
    assert history(store, "twice") == [key(1)]
    assert logged(events_folder)["twice", "a"] == 1
    personal.post("/v1/events", {"user": "twice", "item": key(1), "id": "a"})
    assert logged(events_folder)["twice", "a"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"user": "", "item": "a"},
        {"user": "u", "item": "a", "time": 1_700_000_000_000},  # milliseconds
        {"user": "u", "item": "a", "time": -1},
        {"user": "u", "item": "a", "more": 1},
        [{"user": "u", "item": "a"}] * 1001,
        [{"user": "u", "item": "a"}, {"user": "u"}],
    ],
)
def test_events_that_are_none_are_refused_whole(personal: Replica, store: Store, body: Any) -> None:
    reply = personal.post("/v1/events", body)
    assert reply.status == 400, reply.body
    assert history(store, "u") == []


@pytest.mark.parametrize(
    "query", ["", "user=", "user=a&user=b", "user=a&k=0", "user=a&k=101", "user=%ff", "u=a", "user=a&k=x"]
)
def test_a_query_that_is_none_is_refused(personal: Replica, query: str) -> None:
    reply = personal.get(f"/v1/recommend?{query}")
    assert reply.status == 400
    assert "error" in reply.json


def removed(replica: Replica, user: str) -> Any:
    """Remove a user, again if Redis was late, for which nothing was done."""
    for _ in range(20):
        reply = replica.call("DELETE", f"/v1/users/{user}")
        if reply.status != 503:
            break
        time.sleep(0.5)
    assert reply.status == 200, reply.body
    return reply.json


def test_a_removed_user_is_gone_from_history_and_log(personal: Replica, store: Store, events_folder: Path) -> None:
    personal.post("/v1/events", [*took("lea", 1, 2), *took("max", 3)])
    eventlog.sweep(events_folder)  # two of hers in Parquet, one in a journal
    personal.post("/v1/events", took("lea", 4))
    settled(personal)
    assert [removed(personal, "lea") for _ in range(2)] == [{"history": 3, "log": 3}, {"history": 0, "log": 0}]
    assert history(store, "lea") == []
    assert {user for user, _ in logged(events_folder)} >= {"max"}
    assert b"lea" not in b"".join(path.read_bytes() for path in events_folder.rglob("*") if path.is_file())
    assert recommend(personal, "lea")["events"] == 0
    personal.post("/v1/events", took("lea", 7))  # and may come back
    until(lambda: recommend(personal, "lea")["events"] == 1)


def test_no_accepted_event_is_lost_when_replicas_are_killed(start: Start, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "events"
    replicas = [start(**environment(store, folder)) for _ in range(2)]
    for replica in replicas:
        replica.wait_until_ready()
    accepted: list[str] = []
    enough = threading.Event()

    def load(client: int) -> None:
        replica = replicas[client % 2]
        with suppress(OSError, HTTPException):
            for n in range(10_000):
                ids = [f"{client}-{n}-{i}" for i in range(5)]
                body = [{"user": f"u{client}", "item": key(1 + n % ITEMS), "id": each} for each in ids]
                if replica.post("/v1/events", body).status == 202:
                    accepted.extend(ids)
                if len(accepted) > 400:
                    enough.set()

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(load, client) for client in range(6)]
        assert enough.wait(60)
        for replica in replicas:
            replica.process.kill()
        for each in running:
            each.result()
    found = logged(folder)
    assert set(accepted) <= {name for _, name in found}
    assert max(found.values()) == 1


def test_events_that_were_posted_are_the_next_releases_data(start: Start, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "events"
    replica = start(**environment(store, folder))
    replica.wait_until_ready()
    for user in range(4):
        events = [{**event, "time": 1_700_000_000 + n} for n, event in enumerate(took(f"u{user}", 1, 2, 3))]
        assert replica.post("/v1/events", events).status == 202
    assert eventlog.journals(folder).exists()
    columns = {"user": "user", "item": "item", "time": "time"}
    given = Params.model_validate(
        {"ingest": {"source": str(folder), "columns": columns, "min_user_events": 3, "min_item_events": 1}}
    )
    report: dict[str, Any] = {}
    with artifacts.writing(tmp_path / "data") as out:
        ingest(given, out, report)  # while the replica runs, and before its journal's time
    assert (report["rows"], report["events"], report["users"], report["items"]) == (12, 12, 4, 3)
    assert pq.read_table(tmp_path / "data" / "users.parquet")["key"].to_pylist() == ["u0", "u1", "u2", "u3"]


def test_without_redis_events_are_accepted_and_answers_are_popular(start: Start, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="slipway") as folder:
        store = Store(Path(folder) / "state.sock")
        try:
            replica = start(**environment(store, tmp_path / "events"))
            replica.wait_until_ready()
            store.process.send_signal(signal.SIGSTOP)  # the worst case: connections open, no answers
            for n in range(5):
                assert replica.post("/v1/events", {"user": "ann", "item": key(9), "id": str(n)}).status == 202
                answer = recommend(replica, "ann", 3)
                assert (names(answer), answer["events"]) == ([key(1), key(2), key(3)], None)
            assert replica.call("DELETE", "/v1/users/bob").status == 503  # half of it would be a lie
            assert replica.metric("slipway_events_waiting") == 5
            store.stop()
            store.start()
            until(lambda: recommend(replica, "ann")["events"] == 5)
            assert key(9) not in names(recommend(replica, "ann"))
        finally:
            store.stop()
    assert len(logged(tmp_path / "events")) == 5


def test_a_workload_or_a_replica_without_a_log_takes_no_events(replica: Replica) -> None:
    assert replica.post("/v1/events", took("u", 1)).status == 404
    assert replica.get("/v1/recommend?user=u").status == 405
    assert replica.call("DELETE", "/v1/users/u").status == 404
