"""A kept answer, its key, and how it lies in Redis: sealed, so that whatever else lies there is a miss."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
import zstandard

from slipway.workloads.base import Query

MAX_BYTES: Final = 262_144
"""A larger answer is not kept."""
COMPRESS_BYTES: Final = 1024
"""From this size on a value is compressed: under it, zstd costs more than it saves."""
MAGIC: Final = b"slc1"
SUM_BYTES: Final = 8
HEAD: Final = struct.Struct("<4s?")

# Made once: their tables cost more than a value.
_compress = zstandard.ZstdCompressor(level=1).compress
_decompress = zstandard.ZstdDecompressor().decompress
_ENCODER = msgspec.msgpack.Encoder()
_ASKED = msgspec.json.Encoder(order="deterministic")


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One answer."""

    body: bytes
    """The workload's own part of the answer: a JSON object."""
    shown: Sequence[str]
    """What of it feedback may name."""
    fresh_until: float = 0.0
    """Unix time; after it the answer is given only where there is no better one."""
    tenth: int = -1
    """Which tenth of the sealed model's scores its own falls into (0..9); -1: not known."""


_DECODER = msgspec.msgpack.Decoder(Entry)


def key_of(prefix: bytes, query: Query) -> bytes:
    """Name a query: equal ones get equal names, others do not (blake2b, 128 bits).

    Args:
        prefix: what else tells answers apart: the model and its version.
        query: its inputs by name, type and shape, and what it asks.
    """
    key = hashlib.blake2b(prefix, digest_size=16)
    for name, array in sorted(query.inputs.items()):
        key.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        key.update(array.tobytes())
    key.update(_ASKED.encode(query.asked))
    return key.digest()


def seal(key: bytes, entry: Entry) -> bytes | None:
    """Write an entry for Redis; None: it is too large."""
    payload = _ENCODER.encode(entry)
    if len(payload) > MAX_BYTES:
        return None
    large = len(payload) >= COMPRESS_BYTES
    if large:
        payload = _compress(payload)
    return HEAD.pack(MAGIC, large) + _sum(key, payload) + payload


def unseal(key: bytes, value: object) -> Entry | None:
    """Read an entry back; None: it is not what was written under this key."""
    start = HEAD.size + SUM_BYTES
    if not isinstance(value, bytes) or not start < len(value) <= start + 2 * MAX_BYTES or value[:4] != MAGIC:
        return None
    payload = value[start:]
    if value[HEAD.size : start] != _sum(key, payload):
        return None
    try:
        if value[4]:
            if not 0 < zstandard.frame_content_size(payload) <= MAX_BYTES:
                return None
            payload = _decompress(payload)
        return _DECODER.decode(payload)
    except (zstandard.ZstdError, msgspec.MsgspecError):
        return None


def _sum(key: bytes, payload: bytes) -> bytes:
    """Bind a payload to its key: an answer to another question is rubbish, too."""
    return hashlib.blake2b(payload, key=key, digest_size=SUM_BYTES).digest()
