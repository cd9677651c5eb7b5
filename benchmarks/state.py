"""Events and personal answers: how many events one replica accepts, and what an answer from a history costs more.

    python -m benchmarks.state [--json FILE]

A replica of a tiny ranker with a real Redis; 32 clients, each of which sends on as soon as it is answered.
Plain and personal answers take turns, from the same 20 items. Every event that was acknowledged is looked
for in the log at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import claims, load
from benchmarks.claims import Claim
from benchmarks.serving.sides import Running
from slipway import eventlog
from tests.conftest import until
from tests.serving import packages
from tests.serving.conftest import Replica
from tests.serving.test_feedback import Store

CLIENTS, SECONDS, ROUNDS, MANY = 32, 3.0, 5, 100
COMMAND = "python -m benchmarks.state"


def rate(replica: Replica, requests: list[bytes], status: int) -> tuple[float, float]:
    """Good answers/s, and processor time of one in the replica (µs)."""
    server = Running(replica.port, replica.process.pid)
    used = server.cpu_s()
    seen = load.closed_loop(server.address, requests, CLIENTS, SECONDS)
    assert set(seen) == {status}, f"answers by status: {dict(seen)}"
    return seen[status] / SECONDS, (server.cpu_s() - used) / seen[status] * 1e6


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slipway") as name:
        folder = Path(name)
        store, events = Store(folder / "state.sock"), folder / "events"
        environment = {"SLIPWAY_STATE": str(store.socket), "SLIPWAY_EVENTS": str(events)}
        replica = Replica(packages.seal(folder / "package"), folder / "log", **environment)
        try:
            replica.wait_until_ready()
            rows = measure(replica, events)
        finally:
            replica.close()
            store.stop()
    claims.tell("Events and personal answers, one replica", COMMAND, rows, options.json)


def measure(replica: Replica, events: Path) -> list[Claim]:
    """Take everything in turn."""
    users, seen = [f"u{n}" for n in range(100)], [packages.key(n) for n in range(1, 21)]
    for user in users:
        assert replica.post("/v1/events", [{"user": user, "item": item} for item in seen]).status == 202
    until(lambda: replica.metric("slipway_events_waiting") == 0)
    plain = [load.post("/v1/recommend", {"user": user, "history": seen}) for user in users]
    own = [load.get(f"/v1/recommend?user={user}") for user in users]
    cost = [(rate(replica, plain, 200)[1], rate(replica, own, 200)[1]) for _ in range(ROUNDS)]
    until(lambda: replica.get("/v1/recommend?user=u0").json["events"] == len(seen), 5)
    of_plain, of_own = (statistics.median(each) for each in zip(*cost, strict=True))
    ratio = statistics.median(one / other for one, other in cost)
    one = [load.post("/v1/events", {"user": f"e{n}", "item": packages.key(1 + n % 300)}) for n in range(1000)]
    many = [
        load.post("/v1/events", [{"user": f"m{n}-{i}", "item": packages.key(1 + i)} for i in range(MANY)])
        for n in range(20)
    ]
    singly, together = rate(replica, one, 202)[0], rate(replica, many, 202)[0] * MANY
    acknowledged = int(replica.metric("slipway_events_total"))
    replica.process.kill()
    replica.process.wait()
    eventlog.sweep(events)
    found = sum(pq.read_metadata(path).num_rows for path in events.glob("*.parquet"))
    lost = max(0, acknowledged - found)
    return [
        Claim("events/s acknowledged, one a request; a hundred a request", "", f"{singly:,.0f}", f"{together:,.0f}",
              together / singly, True),
        Claim("processor time of a personal answer over a plain one", "", f"{of_plain:.0f} µs", f"{of_own:.0f} µs",
              ratio, ratio >= 0.5),
        Claim("acknowledged events that the log lacks after SIGKILL", "0", "", f"{lost} of {acknowledged:,}",
              1.0, lost == 0),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
