"""Warm-up: real requests over the replica's own socket, before the gateway's first.

They take the way of a request through the gateway, golden inputs of the package in batches of every size that the
engine prepares for: memory is laid out, kernels are chosen, and the batcher learns what a run takes.
"""

# B batch
from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np

from slipway.errors import ModelError
from slipway.serving import protocol
from slipway.serving.model import Model
from slipway.workloads.base import Tensors

LONGEST_S = 1.0
"""No further batch is tried after that: a slow model would be late for its users."""


async def warm_up(host: str, port: int, model: Model, max_batch: int, max_body_bytes: int) -> None:
    """Ask for batches of 1, 2, 4 ... samples.

    Raises:
        ModelError: one of them was not answered; says how.
    """
    golden, _ = model.package.golden()
    reader, writer = await asyncio.open_connection(host, port)
    began, size = time.monotonic(), 1
    try:
        while time.monotonic() - began < LONGEST_S:
            head, body = _request(model.name, golden, size)
            if len(body) > max_body_bytes:
                return
            writer.write(head + body)
            status, answer = await _response(reader)
            if status != 200:
                raise ModelError(
                    f"{model.package.folder}: a batch of {size} got {status} in the warm-up: {answer!r:.300}"
                )
            if size == max_batch:
                return
            size = min(2 * size, max_batch)
    finally:
        writer.close()


def _request(name_of_model: str, golden: Tensors, size: int) -> tuple[bytes, bytes]:
    inputs, raw = [], []
    for name, array in golden.items():
        batch_B = np.resize(array, (size, *array.shape[1:]))  # repeats the rows
        raw.append(batch_B.tobytes())
        told = {"name": name, "datatype": protocol.DATATYPES[array.dtype.name], "shape": list(batch_B.shape)}
        inputs.append({**told, "parameters": {"binary_data_size": len(raw[-1])}})
    text = msgspec.json.encode({"inputs": inputs, "parameters": {"binary_data_output": True}})
    body = b"".join([text, *raw])
    lines = [
        f"POST /v2/models/{name_of_model}/infer HTTP/1.1",
        "Host: replica",
        "X-Request-Class: batch",  # no deadline
        f"Inference-Header-Content-Length: {len(text)}",
        f"Content-Length: {len(body)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode(), body


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)
