"""The Open Inference Protocol as a client of others speaks it: tensors in JSON, and as they lie in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slipway.errors import RequestError
from slipway.package import TensorSpec
from slipway.serving import model as models
from slipway.serving import protocol
from tests.serving.conftest import Replica
from tests.serving.packages import ITEMS

http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
HISTORY = np.array([[0, 3, 9], [4, 5, 6]])


def ask(url: str, binary_in: bool, binary_out: Sequence[bool] | None) -> Any:
    """Ask for logits and items as Triton's own client does."""
    client = http.InferenceServerClient(url)
    try:
        given_input = http.InferInput("history", list(HISTORY.shape), "INT64")
        given_input.set_data_from_numpy(HISTORY, binary_data=binary_in)
        names = ("items", "scores")
        outputs = binary_out and [
            http.InferRequestedOutput(name, binary_data=binary) for name, binary in zip(names, binary_out, strict=True)
        ]
        assert client.is_server_live()
        assert client.is_model_ready("ranker")
        assert client.get_model_metadata("ranker")["inputs"][0]["datatype"] == "INT64"
        return client.infer("ranker", [given_input], outputs=outputs, request_id="a")
    finally:
        client.close()


@pytest.mark.parametrize("binary_in", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("binary_out", [(False, False), (True, False), (False, True), (True, True), None])
def test_tritons_client_gets_what_the_engine_gives(
    replica: Replica, package: Path, binary_in: bool, binary_out: Sequence[bool] | None
) -> None:
    result = ask(f"127.0.0.1:{replica.port}", binary_in, binary_out)
    items, scores = models.load(package, "7", 1).engine.run({"history": HISTORY}, ["items", "scores"])
    assert np.array_equal(result.as_numpy("items"), items)
    assert result.as_numpy("scores") == pytest.approx(scores)
    assert (result.get_response()["id"], result.get_response()["model_version"]) == ("a", "7")
    told = [bool(output.get("parameters")) for output in result.get_response()["outputs"]]
    assert told == list(binary_out or (True, True))


def body(size: object, raw: bytes, **changes: Any) -> tuple[bytes, int]:
    tensor = {"name": "history", "shape": [1, 2], "datatype": "INT64", "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [{**tensor, **changes}]}).encode()
    return text + raw, len(text)


EIGHT = b"\1\0\0\0\0\0\0\0"
WRONG = {
    "a length beyond the body": (body(16, EIGHT * 2)[0], "9999", "Inference-Header-Content-Length: expected 0..127"),
    "a length that is none": (body(16, EIGHT * 2)[0], "-1", "Inference-Header-Content-Length"),
    "too few bytes": (*body(16, EIGHT), "binary_data_size: 8 bytes are left, got 16"),
    "bytes left over": (*body(16, EIGHT * 3), "8 bytes follow that no binary_data_size tells of"),
    "another size than the shape's": (*body(8, EIGHT), "expected 16 bytes for shape [1, 2]"),
    "a negative size": (*body(-1, b""), "binary_data_size"),
    "a size that is none": (*body("16", EIGHT * 2), "Expected `int | null`"),
    "both kinds of data": (*body(16, EIGHT * 2, data=[1, 2]), "and no data"),
    "neither": (*body(None, b""), "missing required field `data`"),
    "an id out of range": (*body(16, EIGHT + b"\xff" * 8), f"expected ids in 0..{ITEMS}"),
}


@pytest.mark.parametrize(("data", "length", "message"), WRONG.values(), ids=WRONG)
def test_torn_binary_tensors_are_refused_by_name(replica: Replica, data: bytes, length: object, message: str) -> None:
    header = {"Inference-Header-Content-Length": str(length)}
    reply = replica.call("POST", "/v2/models/ranker/infer", data, headers=header)
    assert reply.status == 400
    assert message in reply.json["error"]


dtypes = st.sampled_from([name for name in protocol.DATATYPES if not name.startswith("float16")])
tensors = dtypes.flatmap(lambda name: arrays.arrays(name, st.tuples(st.integers(1, 4), st.integers(1, 4))))


@given(array=tensors)
@settings(max_examples=80, deadline=None)
def test_a_tensor_comes_back_as_it_went_in(array: np.ndarray[Any, Any]) -> None:
    spec = TensorSpec("x", array.dtype.name, (None, None))
    raw = array.tobytes()
    told = {"name": "x", "shape": list(array.shape), "datatype": protocol.DATATYPES[array.dtype.name]}
    request = {
        "inputs": [{**told, "parameters": {"binary_data_size": len(raw)}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(request).encode()
    message = protocol.parted(text + raw, str(len(text)).encode())
    inference = protocol.read_infer(message, [spec], [spec], ["x"], 8)
    answer, (back,) = protocol.write_infer("m", "1", inference, inference.samples, [spec])
    assert back == raw
    assert answer["outputs"] == [{**told, "parameters": {"binary_data_size": len(raw)}}]


@given(body=st.binary(max_size=200), length=st.binary(max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_body_does_more_than_be_refused(body: bytes, length: bytes) -> None:
    spec = TensorSpec("x", "int64", (None, None))
    with pytest.raises(RequestError):
        protocol.read_infer(protocol.parted(body, length), [spec], [spec], ["x"], 8)
