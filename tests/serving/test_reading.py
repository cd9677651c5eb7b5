"""What takes long to read holds nobody else up."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from slipway.errors import OverloadError, RequestError
from slipway.serving import reading
from slipway.serving.reading import Reader
from slipway.workloads.base import Query
from slipway.workloads.classifier.schema import ClassifierEndpoint
from slipway.workloads.ranker.schema import RankerEndpoint
from tests.serving.test_fuzz import classifier, llm, ranker


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    return json.dumps({"image": base64.b64encode(file.getvalue()).decode()}).encode()


class Held(ClassifierEndpoint):
    """Goes on when the event loop lets it; on the loop itself it would stand for ever."""

    go = threading.Event()

    def decode(self, body: bytes) -> Query:
        assert self.go.wait(60), "the event loop stood still"
        return super().decode(body)


def test_the_loop_runs_while_a_picture_is_read_and_so_many_wait_and_no_more(tmp_path: Path) -> None:
    classifier(tmp_path)
    body = picture()
    assert len(body) < reading.QUICK_BYTES, "a small file may be a large picture"

    async def ask() -> None:
        reader = Reader(Held(tmp_path), max_waiting=3)
        asks = [asyncio.create_task(reader.read(body)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadError, match="3 requests are being read already"):
            await reader.read(body)
        asks[2].cancel()  # hung up before a thread came to it
        Held.go.set()
        for query in await asyncio.gather(*asks[:2]):
            assert query.inputs["image"].shape == (16, 16, 3)
        await reader.read(body)
        with pytest.raises(RequestError, match="image: not valid base64"):
            await reader.read(b'{"image": "?"}')
        reader.close()

    asyncio.run(ask())


def test_a_small_body_is_read_at_once_and_a_large_one_in_a_thread(tmp_path: Path) -> None:
    ranker(tmp_path)
    names: list[str] = []

    class Telling(RankerEndpoint):
        def decode(self, body: bytes) -> Query:
            names.append(threading.current_thread().name)
            return super().decode(body)

    async def ask() -> None:
        reader = Reader(Telling(tmp_path), max_waiting=1)
        for count in (3, 3000):
            await reader.read(json.dumps({"history": ["item1"] * count}).encode())
        reader.close()

    asyncio.run(ask())
    assert (names[0], names[1].partition("_")[0]) == ("MainThread", "reader")
    assert not llm(tmp_path).slow
