"""A replica from its start to its end: what makes it ready, what is refused, and how it drains."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from slipway import package as packages_
from slipway.errors import ModelError
from slipway.serving import engines
from slipway.serving import model as models
from slipway.serving.__main__ import main
from tests.conftest import free_port
from tests.serving.conftest import Replica, Start
from tests.serving.packages import key, seal

BODY = json.dumps({"history": [key(3)], "k": 3}).encode()


def copied(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "copy"))


def refused(replica: Replica) -> str:
    """The one line of a replica that ended with exit code 2."""
    assert replica.process.wait(30) == 2, replica.log
    lines = replica.log.strip().splitlines()
    assert len(lines) == 1, replica.log
    return lines[0]


def test_a_torn_file_is_refused(start: Start, package: Path, tmp_path: Path) -> None:
    folder = copied(package, tmp_path)
    with (folder / "model.onnx").open("r+b") as model:
        model.seek(-10, 2)
        model.write(b"\0")
    assert "model.onnx: corrupt, its SHA-256 is not the one that was sealed" in refused(start(folder))


def test_a_sealed_model_that_answers_otherwise_is_refused(start: Start, package: Path, tmp_path: Path) -> None:
    folder = copied(package, tmp_path)
    other = seal(tmp_path / "other", seed=1)
    shutil.copy(other / "model.onnx", folder / "model.onnx")
    opened = packages_.load(package)
    packages_.seal(folder, "ranker", "fp32", opened.inputs, opened.outputs, opened.golden())
    assert "is not the golden one" in refused(start(folder))


def test_a_model_that_the_engine_cannot_load_is_refused(package: Path, tmp_path: Path) -> None:
    folder = copied(package, tmp_path)
    (folder / "model.onnx").write_bytes(b"no model")
    opened = packages_.load(package)
    packages_.seal(folder, "ranker", "fp32", opened.inputs, opened.outputs, opened.golden())
    with pytest.raises(ModelError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        models.load(folder, "7", 1)


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model package"):
        models.load(tmp_path / "nothing", "7", 1)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--model", "ranker"], {}, "expected WORKLOAD/REFERENCE such as ranker/champion"),
        (["--package", "x"], {}, "--package needs --version"),
        (["--package", "x", "--version", "a\nb"], {}, "version: expected letters"),
        (["--package", "x", "--version", "1"], {"SLIPWAY_SERVE": '{"max_batch": 0}'}, "SLIPWAY_SERVE: max_batch: "),
        (["--package", "x", "--version", "1"], {"SLIPWAY_SERVE": "{"}, "SLIPWAY_SERVE: "),
    ],
)
def test_a_wrong_call_is_told_what_is_right(
    arguments: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", "--port", str(free_port()), *arguments])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_golden_check_forgives_ties_and_other_processors_but_not_other_models() -> None:
    random = np.random.default_rng(0)
    scores = np.sort(random.normal(size=(8, 100)).astype(np.float32))[:, ::-1]
    items = np.argsort(random.normal(size=(8, 1000)))[:, :100]
    noisy = scores + random.normal(scale=0.02, size=scores.shape).astype(np.float32)
    assert engines._fault(noisy, scores, "int8") == ""
    assert "standard deviations" in engines._fault(noisy, scores, "fp32")
    assert engines._fault(items[:, ::-1], items, "fp32") == ""
    assert "agree" in engines._fault(items + 500, items, "int8")
    assert "instead of" in engines._fault(scores[:, :50], scores, "int8")
    broken = scores.copy()
    broken[0, 0] = np.nan
    assert "inf" in engines._fault(broken, scores, "int8")
    masked = np.concatenate([scores, np.full((8, 1), -np.inf, np.float32)], axis=1)
    assert engines._fault(masked.copy(), masked, "fp32") == ""
    assert "inf" in engines._fault(np.nan_to_num(masked, neginf=0.0), masked, "int8")


def test_golden_inputs_that_do_not_run_are_refused(package: Path, tmp_path: Path) -> None:
    folder = copied(package, tmp_path)
    opened = packages_.load(package)
    inputs, outputs = opened.golden()
    wrong = {"history": inputs["history"] + 10_000}
    packages_.seal(folder, "ranker", "fp32", opened.inputs, opened.outputs, (wrong, outputs))
    with pytest.raises(ModelError, match="the golden inputs do not run"):
        engines.verify(engines.OnnxEngine(packages_.load(folder), 1), packages_.load(folder))


def test_a_replica_listens_on_loopback_alone_and_loads_nothing_heavy(start: Start) -> None:
    replica = start()
    replica.wait_until_ready()
    with pytest.raises(ConnectionRefusedError), socket.create_connection((_outer_address(), replica.port), timeout=2):
        pass
    maps = Path(f"/proc/{replica.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert not any(heavy in maps for heavy in ("libtorch", "pyarrow", "matplotlib"))
    assert replica.stop() == 0


def _outer_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks for the route
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_a_drain_under_load_loses_nothing(start: Start) -> None:
    replica = start()
    replica.wait_until_ready()
    answered, refused_connections, resets, wrong = [0], [0], [0], list[str]()
    statuses: set[int] = set()
    stopped = threading.Event()

    def client() -> None:
        """Send one request after another on a kept connection until nobody listens any more."""
        while not stopped.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", replica.port, timeout=10)
            try:
                connection.connect()
            except ConnectionRefusedError:
                refused_connections[0] += 1
                return
            try:
                while True:
                    connection.request("POST", "/v1/recommend", BODY)
                    response = connection.getresponse()
                    response.read()
                    statuses.add(response.status)
                    answered[0] += 1
                    if response.will_close:
                        break
            except ConnectionResetError:
                resets[0] += 1  # at the end the kernel resets whom nobody accepted any more: it was never served
            except (OSError, http.client.HTTPException) as error:
                wrong.append(repr(error))
            finally:
                connection.close()

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        time.sleep(0.5)
        assert replica.stop() == 0
    finally:
        stopped.set()
        for thread in clients:
            thread.join(10)
    assert wrong == []
    assert statuses == {200}
    assert resets[0] <= 4
    assert answered[0] > 20
    assert refused_connections[0] == 4


def test_a_draining_replica_is_live_but_not_ready_and_lets_a_begun_request_finish(start: Start) -> None:
    replica = start()
    replica.wait_until_ready()
    with socket.create_connection(("127.0.0.1", replica.port), timeout=10) as slow:
        head = f"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
        slow.sendall(head + BODY[:5])
        time.sleep(0.1)
        replica.process.terminate()
        end = time.monotonic() + 5
        while (ready := replica.get("/v2/health/ready")).status == 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert (ready.status, ready.json["error"]) == (503, "not ready: this replica is draining")
        assert replica.get("/v2/health/live").status == 200
        time.sleep(0.5)  # the socket that listens is closed by now
        slow.sendall(BODY[5:])
        answer = slow.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"Connection: close" in answer
    assert replica.process.wait(10) == 0


def test_a_request_that_never_ends_does_not_hold_a_drain_for_ever(start: Start) -> None:
    replica = start(SLIPWAY_SERVE=json.dumps({"drain_s": 0.5}))
    replica.wait_until_ready()
    with socket.create_connection(("127.0.0.1", replica.port), timeout=10) as stuck:
        stuck.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n")
        time.sleep(0.1)
        began = time.monotonic()
        assert replica.stop() == 0
        assert time.monotonic() - began < 5


def test_a_killed_replica_comes_up_again_on_its_port(start: Start) -> None:
    replica = start()
    replica.wait_until_ready()
    replica.post("/v1/recommend", BODY)
    replica.process.kill()
    replica.process.wait()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", replica.port))


def test_more_requests_than_may_wait_are_sent_away_and_the_others_served(start: Start) -> None:
    replica = start(SLIPWAY_SERVE=json.dumps({"max_queue": 2, "max_batch": 1}))
    replica.wait_until_ready()
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", replica.port), timeout=10) for _ in range(60)]
    for client in clients:
        client.sendall(head.encode() + BODY)
    statuses = []
    for client in clients:
        with client:
            statuses.append(client.recv(65_536).split()[1])
    assert set(statuses) == {b"200", b"429"}
    assert replica.metric('slipway_requests_total{code="429",endpoint="recommend"}') == statuses.count(b"429")
