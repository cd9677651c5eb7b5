"""The Open Inference Protocol (V2): its messages, read into samples and written from results.

Without `outputs` a client gets what the workload's own endpoint reads; an output it names, it gets. Data may be flat or
nested. By the binary extension, which Triton and its clients speak, tensors follow the JSON as they lie in memory,
little-endian and in the order in which the JSON names them; a header tells where the JSON ends.
"""

# B batch
from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from slipway.errors import RequestError
from slipway.package import TensorSpec
from slipway.workloads.base import Array, Tensors, parse

DATATYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
"""Datatype of the protocol by NumPy's name."""


EXTENSIONS = ("binary_tensor_data",)
JSON_LENGTH = b"inference-header-content-length"


class Tensor(msgspec.Struct):
    """An input or output of the model; -1 stands for any size."""

    name: str
    datatype: str
    shape: Sequence[int]


class Metadata(msgspec.Struct):
    """What the protocol tells of a model."""

    name: str
    versions: Sequence[str]
    platform: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


class _OfInput(msgspec.Struct, frozen=True):
    binary_data_size: int | None = None


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: _OfInput = _OfInput()


class _OfOutput(msgspec.Struct, frozen=True):
    binary_data: bool | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _OfOutput = _OfOutput()


class _OfRequest(msgspec.Struct, frozen=True):
    binary_data_output: bool = False


class _Infer(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    outputs: list[_Output] | None = None
    parameters: _OfRequest = _OfRequest()


_DECODER = msgspec.json.Decoder(_Infer)


@dataclass(frozen=True)
class Inference:
    """One infer request: its samples, without a batch dimension, and what is wanted of them."""

    samples: Sequence[Tensors]
    outputs: tuple[str, ...]
    id: str | None
    binary: frozenset[str] = frozenset()
    """Outputs that are given as they lie in memory."""


class Message(NamedTuple):
    """A body in its two parts."""

    json: bytes
    raw: bytes
    """Tensors, one behind another."""


def parted(body: bytes, json_length: bytes | None) -> Message:
    """Part a body where its header says that the JSON ends.

    Raises:
        RequestError: the header is no such place.
    """
    if json_length is None:
        return Message(body, b"")
    if not json_length.isdigit() or len(json_length) > 18 or int(json_length) > len(body):
        raise RequestError(f"Inference-Header-Content-Length: expected 0..{len(body)}, the length of the JSON")
    end = int(json_length)
    return Message(body[:end], body[end:])


def read_infer(
    message: Message,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    default: Sequence[str],
    max_batch: int,
) -> Inference:
    """Parse and check an infer request against the model's signature.

    Args:
        message: the request.
        inputs: what the model takes.
        outputs: what it gives.
        default: names of the outputs for a request that names none.
        max_batch: most samples.

    Raises:
        RequestError: says which tensor or field is wrong and what is allowed.
    """
    request = parse(_DECODER, message.json)
    given = {tensor.name: tensor for tensor in request.inputs}
    if set(given) != {spec.name for spec in inputs} or len(given) != len(request.inputs):
        raise RequestError(f"inputs: expected {', '.join(s.name for s in inputs)} once each, got {sorted(given)}")
    known = {spec.name for spec in outputs}
    wanted = tuple(dict.fromkeys(o.name for o in request.outputs)) if request.outputs else tuple(default)
    if not known.issuperset(wanted):
        raise RequestError(f"outputs: expected some of {', '.join(sorted(known))}, got {list(wanted)}")
    raw = _parts(request.inputs, message.raw)
    arrays = {spec.name: _array(given[spec.name], raw.get(spec.name), spec, max_batch) for spec in inputs}
    batch = {len(array) for array in arrays.values()}
    if len(batch) != 1:
        raise RequestError(f"inputs: the first dimensions must be equal, got {sorted(batch)}")
    samples = [{name: array[row] for name, array in arrays.items()} for row in range(batch.pop())]
    return Inference(samples, wanted, request.id, _binary(request, wanted))


def _binary(request: _Infer, wanted: Sequence[str]) -> frozenset[str]:
    """Which outputs are asked for as they lie in memory."""
    asked = {output.name: output.parameters.binary_data for output in request.outputs or ()}
    every = request.parameters.binary_data_output
    return frozenset(name for name in wanted if (every if asked.get(name) is None else asked[name]))


def _parts(inputs: Sequence[_Input], raw: bytes) -> Mapping[str, bytes]:
    """Cut the raw tensors apart, by the sizes that the inputs tell."""
    parts: dict[str, bytes] = {}
    at = 0
    for tensor in inputs:
        size = tensor.parameters.binary_data_size
        if size is None:
            continue
        if not 0 <= size <= len(raw) - at:
            raise RequestError(f"{tensor.name}.parameters.binary_data_size: {len(raw) - at} bytes are left, got {size}")
        parts[tensor.name] = raw[at : at + size]
        at += size
    if at != len(raw):
        raise RequestError(f"inputs: {len(raw) - at} bytes follow that no binary_data_size tells of")
    return parts


def _array(tensor: _Input, raw: bytes | None, spec: TensorSpec, max_batch: int) -> Array:
    """Read one tensor: [B, ...]."""
    name, shape = spec.name, tensor.shape
    if tensor.datatype != DATATYPES.get(spec.dtype):
        raise RequestError(f"{name}.datatype: expected {DATATYPES.get(spec.dtype)}, got {tensor.datatype[:20]}")
    fits = len(shape) == len(spec.shape) and all(w in (None, g) for w, g in zip(spec.shape, shape, strict=True))
    if not fits or not shape or min(shape) < 1:
        raise RequestError(f"{name}.shape: expected {_shape(spec)} with -1 for any from 1 up, got {shape[:8]}")
    if shape[0] > max_batch:
        raise RequestError(f"{name}.shape: expected at most {max_batch} samples, got {shape[0]}")
    return _from_json(tensor, spec.dtype) if raw is None else _from_memory(tensor, raw, spec.dtype)


def _from_memory(tensor: _Input, raw: bytes, dtype: str) -> Array:
    kind = np.dtype(dtype).newbyteorder("<")
    size = math.prod(tensor.shape) * kind.itemsize
    if len(raw) != size or bytes(tensor.data):
        raise RequestError(f"{tensor.name}: expected {size} bytes for shape {tensor.shape} and no data, got {len(raw)}")
    if kind.kind == "b":
        return np.asarray(np.frombuffer(raw, dtype=np.uint8) != 0).reshape(tensor.shape)
    return np.frombuffer(raw, dtype=kind).reshape(tensor.shape)


def _from_json(tensor: _Input, dtype: str) -> Array:
    name, shape, text = tensor.name, tensor.shape, bytes(tensor.data)
    if not text:
        raise RequestError(f"{name}: object missing required field `data`")
    nested = text[1:].lstrip()[:1] == b"["
    try:
        data = parse(_decoder(dtype, len(shape) if nested else 1), text)
        array = np.array(data, dtype=dtype)
    except RequestError as error:
        raise RequestError(f"{name}.data: {error}") from error
    except (ValueError, OverflowError) as error:
        raise RequestError(f"{name}.data: not a {tensor.datatype} tensor of shape {shape} ({error})") from error
    if array.size != math.prod(shape) or (nested and array.shape != tuple(shape)):
        raise RequestError(f"{name}.data: expected shape {shape}, got {list(array.shape)}")
    return array.reshape(shape)


@functools.lru_cache(maxsize=64)
def _decoder(dtype: str, depth: int) -> msgspec.json.Decoder[Any]:
    """Decode lists of plain numbers, `depth` deep: NumPy alone would take "1" and 1.5 for integers."""
    kind: Any = {"b": bool, "f": float}.get(np.dtype(dtype).kind, int)
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def write_infer(
    model: str, version: str, inference: Inference, results: Sequence[Tensors], outputs: Sequence[TensorSpec]
) -> tuple[Mapping[str, Any], list[bytes]]:
    """Make the answer of an infer request from the results of its samples: what is JSON of it, and raw tensors."""
    dtypes = {spec.name: DATATYPES[spec.dtype] for spec in outputs}
    tensors: list[dict[str, Any]] = []
    raw = []
    for name in inference.outputs:
        array = np.stack([result[name] for result in results])
        tensors.append({"name": name, "datatype": dtypes[name], "shape": list(array.shape)})
        if name in inference.binary:
            raw.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            tensors[-1]["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensors[-1]["data"] = array.ravel().tolist()
    answer = {"model_name": model, "model_version": version, "outputs": tensors}
    return (answer if inference.id is None else {**answer, "id": inference.id}), raw


def metadata(model: str, version: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Metadata:
    """What the protocol tells of a model."""
    told = [[Tensor(s.name, DATATYPES.get(s.dtype, s.dtype), _shape(s)) for s in specs] for specs in (inputs, outputs)]
    return Metadata(model, [version], "onnx_onnxruntime", *told)


def schemas(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_batch: int
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """JSON Schemas of an infer request and its answer for the model's signature."""
    name, extra = {"type": "string"}, {"parameters": {"type": "object"}}
    wanted = {"properties": {"name": {"enum": [s.name for s in outputs]}, **extra}, **_object("name")}
    given = [_tensor(spec, max_batch) for spec in inputs]
    exactly = {"minItems": len(inputs), "maxItems": len(inputs)}
    asked = {"id": name, "inputs": _array_of(_one_of(given), **exactly), "outputs": _array_of(wanted), **extra}
    answer = {
        "model_name": name,
        "model_version": name,
        "id": name,
        "outputs": _array_of(_one_of([_tensor(spec) for spec in outputs])),
    }
    return (
        {"properties": asked, **_object("inputs")},
        {"properties": answer, **_object("model_name", "model_version", "outputs")},
    )


def _tensor(spec: TensorSpec, max_batch: int | None = None) -> Mapping[str, Any]:
    sizes: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 1} if size is None else {"const": size} for size in spec.shape
    ]
    if max_batch is not None:
        sizes[0] = {"type": "integer", "minimum": 1, "maximum": max_batch}
    properties = {
        "name": {"const": spec.name},
        "datatype": {"const": DATATYPES.get(spec.dtype, spec.dtype)},
        "shape": {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)},
        "data": {"type": "array"},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
    }
    return {"properties": properties, **_object("name", "datatype", "shape")}


def _object(*required: str) -> dict[str, Any]:
    return {"type": "object", "required": list(required)}


def _array_of(items: Mapping[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


def _one_of(kinds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return kinds[0] if len(kinds) == 1 else {"oneOf": list(kinds)}


def _shape(spec: TensorSpec) -> list[int]:
    return [-1 if size is None else size for size in spec.shape]
