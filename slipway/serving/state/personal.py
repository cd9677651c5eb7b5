"""The personal endpoints: users' events come in, and answers rest on them; for a workload whose endpoint is `Personal`.

    POST   /v1/events                what users did: one event, or up to `MAX_EVENTS`
    GET    /v1/recommend?user=U      the workload's endpoint, from the user's own history, without what it holds
    DELETE /v1/users/U               remove a user

A replica owns nothing of it. An event is accepted when it is in the replica's journal, from where it reaches the log
whatever becomes of the replica: killed, it loses nothing; a power cut costs the last second. Its history has it at once
too, unless Redis is away: then the event is still accepted (202), as the log has it, and enters the history when Redis
is back. Only a journal that cannot be written gets 503.

A recommendation never fails for want of a history: a user would rather see what is popular than nothing. `events` says
how many of his events it rests on: 0 for a newcomer, null while Redis is away.

To remove a user takes his history, and his events from every file of the log, with a mark that refuses what of him is
under way. Nothing else bears a user: what was shown is kept by the answer's id, for an hour, and cached answers by what
they were made from. Data and models that were made from the log before are the next release's affair.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import parse_qs

import msgspec
from msgspec import Meta

from slipway import eventlog
from slipway.errors import RequestError, TransientError
from slipway.eventlog import Event, Journal
from slipway.params import ServeParams
from slipway.serving.edge import Request, Response
from slipway.serving.metrics import Metrics
from slipway.serving.openapi import Route, Schema
from slipway.serving.state.histories import Histories
from slipway.workloads.base import Personal, Query, parse

logger = logging.getLogger(__name__)

MAX_EVENTS, MAX_KEY, MAX_ID = 1000, 512, 128
SYNC_S, LOOK_S = 1.0, 5.0
"""A journal outlives a power cut after so long; closed journals are looked for so often."""
USERS = "/v1/users/"
ONE_USER = f"{USERS}{{user}}"

SWEEPS = importlib.util.find_spec("pyarrow") is not None
"""Whether journals become Parquet here; else where it is installed: `python -m slipway.eventlog`, `ingest` itself."""

Key = Annotated[str, Meta(min_length=1, max_length=MAX_KEY)] | int
Answer = Callable[[Request, Query, Mapping[str, Any]], Awaitable[Response]]
"""Answers a query of the workload's endpoint, and tells some more beside."""
Write = Callable[[object, int], Response]
"""Makes the response of a value and a status."""
LABELS = ("events", "users")


class UserEvent(msgspec.Struct, forbid_unknown_fields=True):
    """Somebody took an item."""

    user: Key
    item: Key
    time: Annotated[float, Meta(ge=0, le=4_102_444_800)] | None = None
    """When (s since 1970, UTC); absent: now."""
    id: Annotated[str, Meta(min_length=1, max_length=MAX_ID)] | None = None
    """Names the event among the user's: sent again within a day, it is one event still."""


Events = UserEvent | Annotated[list[UserEvent], Meta(min_length=1, max_length=MAX_EVENTS)]

BODY = cast("type", Events)  # msgspec takes a union where a type is asked for


class AcceptedEvents(msgspec.Struct):
    """They are in the log for good."""

    accepted: int
    """Events taken; those that came before, by their id, are among them."""


class Forgotten(msgspec.Struct):
    """What was removed of a user; all zero if nothing was there."""

    history: int
    """Events of the history."""
    log: int
    """Events of the log."""


def routes(state: State, endpoint: Personal, answer: type, ask: Answer, write: Write) -> dict[str, dict[str, Route]]:
    """Give the personal endpoints of a workload, for answers of the type `answer` that `ask` makes."""

    async def events(request: Request) -> Response:
        return write(await state.events(request), 202)

    async def recommend(request: Request) -> Response:
        return await state.recommend(endpoint, request, ask)

    async def forget(request: Request) -> Response:
        return write(await state.forget(request), 200)

    own, user = endpoint.path.rpartition("/")[2], {"type": "string", "minLength": 1, "maxLength": MAX_KEY}
    in_query = (
        _parameter("user", "query", user),
        _parameter("k", "query", {"type": "integer", "minimum": 1, "maximum": endpoint.max_k, "default": 10}),
    )
    in_path = (_parameter("user", "path", user),)
    return {
        "/v1/events": {"POST": Route("events", events, "Say what users did", AcceptedEvents, BODY, 202)},
        endpoint.path: {
            "GET": Route(own, recommend, "Ask from a user's own history", answer, parameters=in_query),
        },
        ONE_USER: {"DELETE": Route("users", forget, "Remove a user", Forgotten, parameters=in_path)},
    }


def _parameter(name: str, place: str, schema: Schema) -> Schema:
    return {"name": name, "in": place, "required": "default" not in schema, "schema": schema}


def template(path: str) -> str:
    """Name the route of a path that bears a user; another path is none's."""
    return ONE_USER if path.startswith(USERS) else ""


class State:
    """Events, histories, and the way between; made and used on the event loop.

    Args:
        histories: None: nobody has one.
        folder: of the log.
        rotate_s: a journal is closed at that age.
        counted: called with the number of events accepted.
    """

    def __init__(
        self, histories: Histories | None, folder: Path, rotate_s: float, counted: Callable[[int], None]
    ) -> None:
        self._histories, self._folder, self._rotate_s, self._counted = histories, folder, rotate_s, counted
        self._journal = Journal(folder)
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Events)
        self._turn: list[Event] = []
        self._written: asyncio.Future[None] | None = None
        self._last = 0
        self._keeper = asyncio.create_task(self._keep())

    async def events(self, request: Request) -> AcceptedEvents:
        """Take events.

        Raises:
            RequestError: an event is not what it should be.  TransientError: the journal cannot be written.
        """
        told = parse(self._decoder, request.body)
        events = [self._event(each) for each in (told if isinstance(told, list) else [told])]
        try:
            await self._write(events)
        except OSError as error:
            raise TransientError("events cannot be taken now: their journal cannot be written") from error
        self._counted(len(events))
        if self._histories is not None:
            await self._histories.append(events)
        return AcceptedEvents(len(events))

    def _event(self, told: UserEvent) -> Event:
        # Each a little later than the one before, so that events without a time keep their order.
        self._last = at = max(self._last + 1, time.time_ns() // 1000)
        when = at if told.time is None else round(told.time * 1e6)
        return Event(str(told.user), str(told.item), when, told.id or f"{at:x}-{random.getrandbits(48):012x}", at)

    def _write(self, events: list[Event]) -> asyncio.Future[None]:
        """Write all events of one turn of the loop at its end, by one call."""
        self._turn += events
        if self._written is None:
            loop = asyncio.get_running_loop()
            self._written = loop.create_future()
            loop.call_soon(self._write_turn)
        return self._written

    def _write_turn(self) -> None:
        assert self._written is not None
        events, written = self._turn, self._written
        self._turn, self._written = [], None
        try:
            self._journal.write(events)
        except OSError as error:
            logger.error("the journal of events cannot be written: errno=%s", error.errno)
            if not written.cancelled():
                written.set_exception(error)
            return
        if not written.cancelled():
            written.set_result(None)

    async def recommend(self, endpoint: Personal, request: Request, answer: Answer) -> Response:
        """Answer from a user's history.

        Raises:
            RequestError: the query is not what it should be.
        """
        user, k = asked(request.query, endpoint.max_k)
        items: list[str] | None = None
        if self._histories is not None:
            with suppress(TransientError):
                items = await self._histories.of(user)
        query = endpoint.personal(items or [], k)
        return await answer(request, query, {"events": None if items is None else len(items)})

    async def forget(self, request: Request) -> Forgotten:
        """Remove a user.

        Raises:
            TransientError: some of it is done and some not; it has to be repeated.
        """
        user = request.path.removeprefix(USERS)
        if not 1 <= len(user) <= MAX_KEY:
            raise RequestError(f"user: expected 1..{MAX_KEY} characters, got {len(user)}")
        history = await self._histories.forget(user) if self._histories is not None else 0
        log = await self._sweep(stdin=json.dumps(user))
        return Forgotten(history, log["removed"])

    async def _sweep(self, *arguments: str, stdin: str = "") -> dict[str, int]:
        """Let a process of its own sweep the log: Parquet's library would double this one's memory."""
        if not SWEEPS:
            raise TransientError("this replica has no pyarrow to sweep the log with; ask where it is installed")
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "slipway.eventlog", str(self._folder), *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        try:
            out, _ = await process.communicate(stdin.encode())
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()  # at any step: the next one goes on
            raise
        if process.returncode:
            raise TransientError("the log of events cannot be swept now; try again later")
        found: dict[str, int] = json.loads(out)
        return found

    async def _keep(self) -> None:
        """Make the journal outlive a power cut, close it in time, and have closed ones turned to Parquet."""
        look = 0.0
        while True:
            await asyncio.sleep(SYNC_S)
            with suppress(OSError):  # whoever writes next is told
                await asyncio.to_thread(self._journal.sync)
                self._journal.close_if_older(self._rotate_s)
            if time.monotonic() >= look:
                look = time.monotonic() + LOOK_S * random.uniform(0.5, 1.5)
                if SWEEPS and eventlog.due(self._folder, self._rotate_s):
                    try:
                        await self._sweep(str(self._rotate_s))
                    except (OSError, TransientError) as error:
                        logger.warning("the log of events was not swept: error=%s", type(error).__name__)

    async def close(self) -> None:
        """End; the journal is left for the next sweep."""
        self._keeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._keeper
        with suppress(OSError):
            self._journal.close()
        if self._histories is not None:
            await self._histories.close()


def asked(query: bytes, max_k: int) -> tuple[str, int]:
    """Read user and k of a query string.

    Raises:
        RequestError: one is missing, repeated or unreadable, or there is something else.
    """
    try:
        found = parse_qs(query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError as error:
        raise RequestError("the query: expected user=ID and, if wanted, k=10, percent-encoded") from error
    if unknown := sorted(found.keys() - {"user", "k"}):
        raise RequestError(f"the query: user and k, not {unknown[0]!r:.40}")
    user, k = found.get("user", []), found.get("k", ["10"])
    if len(user) != 1 or not 1 <= len(user[0]) <= MAX_KEY:
        raise RequestError(f"user: expected one of 1..{MAX_KEY} characters")
    if len(k) != 1 or not (k[0].isascii() and k[0].isdigit() and len(k[0]) <= 9 and 1 <= int(k[0]) <= max_k):
        raise RequestError(f"k: expected one whole number, 1..{max_k}")
    return user[0], int(k[0])


def state_of(environment: Mapping[str, str], params: ServeParams, metrics: Metrics) -> State | None:
    """Make the state that the environment names: SLIPWAY_EVENTS, the log's folder, and SLIPWAY_STATE, Redis' socket."""
    folder, socket = environment.get("SLIPWAY_EVENTS"), environment.get("SLIPWAY_STATE")
    if not folder:
        return None
    histories = Histories(socket, params.history_events, metrics.events_lost.inc) if socket else None
    if histories is not None:
        metrics.watch_histories(histories.__len__)
    return State(histories, Path(folder).absolute(), params.rotate_s, metrics.events.inc)
