"""How training on several nodes begins, fails and ends together: the launchers of all nodes keep in touch.

The stage is started once on each node, with the variables that torchrun takes:

    NNODES       number of nodes; without it, or 1: this machine alone
    NODE_RANK    number of this node, from 0; the first writes the model and the report, the others only their logs
    MASTER_ADDR  address or name of the first node, on the network that the nodes talk over
    MASTER_PORT  a free port of it

or the same with PET_ before them, as Kubeflow sets them. The first node's launcher listens on that address alone until
all are there. Their connections last as long as one attempt, and the end of a connection is the death of a launcher, or
of its machine. What one node tells, an error or its end, reaches all through the first: so all start anew together, or
end alike. Whoever can reach the port can take part, as with torch's own processes: it belongs on a network of friends.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from slipway import errors
from slipway.errors import SlipwayError, TransientError

WAIT_S = 600.0  # for a node that is not there yet: a machine may have to be found for it; torchrun waits as long
RETRY_S, HELLO_S = 0.5, 5  # between two knocks at the first node's door; for a caller to say who it is
LOST_S = 20  # at most, until the kernel tells that a machine on the other end is gone
CALLERS = 64  # that are listened to at once, before they are known
LONGEST, HELLO_BYTES = 1 << 20, 512  # of a message, and of a caller's first
SIOCGIFADDR = 0x8915  # of ioctl: the address of an interface

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """Where a launcher stands; by default alone."""

    rank: int = 0
    count: int = 1
    address: str = ""
    """Of the first node."""
    port: int = 0

    def ranks(self, world_size: int) -> range:
        """Tell which of all processes run on this node.

        Raises:
            SlipwayError: they cannot be divided evenly.
        """
        each, rest = divmod(world_size, self.count)
        if rest or not each:
            raise SlipwayError(
                f"params.yaml: train.world_size: {world_size} processes cannot be divided evenly among {self.count} "
                f"nodes (NNODES); it counts those of all nodes: set a multiple of {self.count}"
            )
        return range(self.rank * each, (self.rank + 1) * each)


ALONE = Node()


def here(environment: Mapping[str, str] = os.environ) -> Node:
    """Read NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        SlipwayError: one is missing or wrong, or torchrun is the caller.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        raise SlipwayError(
            "environment: started by torchrun, but this command starts the processes of its node by itself; start it "
            "once on each node, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in its environment"
        )

    def read(name: str) -> str:
        return environment.get(name) or environment.get(f"PET_{name}", "")

    if read("NNODES") in {"", "1"}:
        return ALONE
    names = ("NNODES", "NODE_RANK", "MASTER_PORT")
    wrong = [f"{name}={read(name)}" for name in names if not read(name).isdecimal()]
    wrong += [] if read("MASTER_ADDR") else ["MASTER_ADDR="]
    if wrong:
        raise SlipwayError(f"environment: training on several nodes needs numbers and an address ({', '.join(wrong)})")
    count, rank, port = (int(read(name)) for name in names)
    if not rank < count:
        raise SlipwayError(f"environment: NODE_RANK={rank}, but of NNODES={count} the last is {count - 1}")
    if not 0 < port < 65536:
        raise SlipwayError(f"environment: MASTER_PORT={port}, but ports are 1 to 65535")
    return Node(rank, count, read("MASTER_ADDR"), port)


class Link(Connection):
    """The connection to another launcher; messages are JSON objects."""

    def __init__(self, node: int, end: socket.socket) -> None:
        self.node, self.address = node, str(end.getsockname()[0])
        end.settimeout(None)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, LOST_S // 4),
            (socket.TCP_KEEPINTVL, LOST_S // 4),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, 1000 * LOST_S),
        ):
            end.setsockopt(socket.IPPROTO_TCP, option, value)
        super().__init__(end.detach())

    def tell(self, **message: Any) -> None:
        """Send a message; that the other is gone shows when it is listened to."""
        with suppress(OSError):
            self.send_bytes(json.dumps(message).encode())

    def hear(self) -> dict[str, Any]:
        """Wait for a message; that the other is gone, or is no launcher, is one, too."""
        try:
            message = json.loads(self.recv_bytes(LONGEST))
        except (EOFError, OSError, ValueError):
            message = None
        gone = TransientError(f"training: the launcher of node {self.node} is gone")
        return message if isinstance(message, dict) else {**_packed(gone), "gone": True}


@dataclass
class Team:
    """The launchers of one attempt, as one of them sees the others; of a single node there are none."""

    node: Node = ALONE
    links: list[Link] = field(default_factory=list)
    """On the first node to all others, on another to the first."""
    store: socket.socket | None = None
    """On the first node: where its rank 0 listens for the other ranks."""
    meeting: str = ""
    """URL of that place for `torch.distributed`; empty if this node is alone."""
    interface: str | None = "lo"
    """What the nodes talk over; None: torch finds out."""
    concluded: bool = False

    def agree(self, decide: Callable[[], Any]) -> Any:
        """Give every node what the first decides: a value that JSON can hold.

        Raises:
            SlipwayError: as it was raised there.
        """
        if self.node.rank == 0:
            value = decide()
            for link in self.links:
                link.tell(value=value)
            return value
        message = self.links[0].hear()
        if "value" in message:
            return message["value"]
        self.concluded = True
        raise _unpacked(message) or TransientError("training: node 0 ended before it began")

    def hear(self, link: Link) -> Exception | None:
        """Listen to how a node fared, or on another than the first, how all did; None: well."""
        self.concluded = self.concluded or self.node.rank > 0
        return _unpacked(link.hear())

    def conclude(self, error: Exception | None = None) -> Exception | None:
        """Tell the others how this node fared; gives how all did, by the word of the first node."""
        if self.concluded:
            return error
        for link in self.links:
            link.tell(**_packed(error))
        self.concluded = self.node.rank == 0
        return error if self.concluded else self.hear(self.links[0])


@contextmanager
def meet(node: Node, world_size: int, wait_s: float = WAIT_S) -> Iterator[Team]:
    """Wait until the launchers of all nodes are there, and keep in touch with them; what is raised here, they are told.

    Args:
        node: this one.
        world_size: number of processes of all nodes.
        wait_s: longest wait.

    Raises:
        TransientError: a node did not come in that time.
        SlipwayError: the nodes were not told the same, or the first one's address is not to be had.
    """
    node.ranks(world_size)
    if node.count == 1:
        yield Team(node)
        return
    deadline = time.monotonic() + wait_s
    team = _gathered(node, world_size, deadline) if node.rank == 0 else _joined(node, world_size, deadline)
    try:
        yield team
    except (Exception, KeyboardInterrupt) as error:
        team.conclude(_plain(error, node))
        raise
    finally:
        _close(team)


def _plain(error: Exception | KeyboardInterrupt, node: Node) -> Exception:
    """What the others are told of it: who was interrupted will not be there if they start again."""
    if not isinstance(error, KeyboardInterrupt):
        return error
    return SlipwayError(
        f"training: node {node.rank} was interrupted; start the stage on all nodes again: it goes on from the last "
        "checkpoint"
    )


def _close(team: Team) -> None:
    for end in (*team.links, team.store):
        if end is not None:
            end.close()


def _gathered(node: Node, world_size: int, deadline: float) -> Team:
    """Be the first node: wait for all others."""
    links: dict[int, Link] = {}
    began = time.monotonic()
    with _listening(node, node.port, deadline) as listener, closing(_calls(listener, deadline)) as calls:
        address = listener.getsockname()[0]
        log.info("waiting for %d more node(s) at %s:%d", node.count - 1, address, node.port)
        try:
            while missing := sorted({*range(1, node.count)} - links.keys()):
                if (call := next(calls, None)) is None:
                    raise TransientError(
                        f"training: node {', '.join(map(str, missing))} of {node.count} did not come to "
                        f"{address}:{node.port} in {time.monotonic() - began:.0f} s; start the stage on it with "
                        f"NODE_RANK={missing[0]} and the variables of the others, or see its log"
                    )
                _welcome(*call, node, world_size, links)
            team = Team(node, list(links.values()), _listening(node, 0, deadline), interface=interface(address))
        except (Exception, KeyboardInterrupt) as error:
            for link in links.values():
                link.tell(**_packed(_plain(error, node)))
                link.close()
            raise
    assert team.store is not None
    port = team.store.getsockname()[1]
    team.meeting = _url(node.address, port)
    for link in team.links:
        link.tell(store=port)
    return team


def _calls(listener: socket.socket, deadline: float) -> Generator[tuple[socket.socket, bytes]]:
    """Give every caller with what it says of itself, until the deadline.

    All are listened to at once, so that a slow one keeps no other waiting. Who has not said it in HELLO_S is left
    standing, and where CALLERS speak at once, the one who called first.
    """
    callers: list[_Caller] = []
    try:
        while (now := time.monotonic()) < deadline:
            for late in [caller for caller in callers if caller.until <= now]:
                callers.remove(late)
                late.end.close()
            ends = [listener, *(caller.end for caller in callers)]
            ready = wait(ends, min([deadline, *(caller.until for caller in callers)]) - now)
            for caller in [caller for caller in callers if caller.end in ready]:
                if (said := caller.hear()) is not None:
                    callers.remove(caller)
                    yield caller.end, said
            if listener in ready:
                if len(callers) == CALLERS:
                    callers.pop(0).end.close()
                callers.append(_Caller(listener.accept()[0]))
    finally:
        for caller in callers:
            caller.end.close()


class _Caller:
    """Who calls, until it has said who it is."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end, self.until, self.said = end, time.monotonic() + HELLO_S, b""

    def hear(self) -> bytes | None:
        """Read on, and not beyond a message as `Link` sends it: its size and JSON. None: it is not whole yet."""
        size = 4 + (struct.unpack("!i", self.said[:4])[0] if len(self.said) >= 4 else 0)
        try:
            part = self.end.recv(size - len(self.said))
        except OSError:
            part = b""
        self.said += part
        if part and len(self.said) == 4:
            size += struct.unpack("!i", self.said)[0]
            part = part if 4 < size <= HELLO_BYTES else b""
        return self.said[4:] if len(self.said) == size or not part else None


def _welcome(end: socket.socket, said: bytes, node: Node, world_size: int, links: dict[int, Link]) -> None:
    """Take in a node that calls; whoever else calls is left standing."""
    link = Link(-1, end)
    try:
        hello = json.loads(said)
        link.node = int(hello["node"])
        told = {name: int(hello[name]) for name in ("NNODES", "train.world_size")}
    except (KeyError, TypeError, ValueError, OverflowError):
        told = {}
    if not 0 < link.node < told.get("NNODES", 0):
        link.close()
        return
    before = links.get(link.node)
    links[link.node] = link  # whatever is wrong, it is told, too
    for name, mine in (("NNODES", node.count), ("train.world_size", world_size)):
        if told[name] != mine:
            raise SlipwayError(
                f"training: node {link.node} was started with {name}={told[name]}, node 0 with {name}={mine}; "
                "start all with the same"
            )
    if before is not None and not wait([before], 0):  # what is to be heard now is only its end
        before.tell(**_packed(error := SlipwayError(f"training: two nodes were started with NODE_RANK={link.node}")))
        raise error
    log.info("node %d of %d is there", link.node, node.count)


def _joined(node: Node, world_size: int, deadline: float) -> Team:
    """Be another node: knock until the first one opens, and wait until it has all."""
    log.info("node %d of %d, knocking at %s:%d", node.rank, node.count, node.address, node.port)
    while True:
        try:
            link = Link(0, socket.create_connection((node.address, node.port), timeout=HELLO_S))
            link.tell(node=node.rank, **{"NNODES": node.count, "train.world_size": world_size})
            # It speaks when all are there or its own wait is over, which may have begun a little later.
            if wait([link], max(0.0, deadline + LOST_S - time.monotonic())):
                message = link.hear()
                if "gone" not in message:
                    break
                why = str(message["message"])  # it was killed meanwhile, and may be started again
            else:
                why = "who listens there says nothing"
            link.close()
        except OSError as error:
            why = str(error)
        if time.monotonic() > deadline:
            raise TransientError(
                f"training: node 0 does not answer at {node.address}:{node.port} ({why}); start the stage on it with "
                "NODE_RANK=0 and the variables of the others, or see its log"
            )
        time.sleep(RETRY_S)
    if "store" not in message:
        link.close()
        raise _unpacked(message) or TransientError("training: node 0 ended before it began")
    return Team(node, [link], meeting=_url(node.address, int(message["store"])), interface=interface(link.address))


def _listening(node: Node, port: int, deadline: float) -> socket.socket:
    """Listen on the first node's address, and on no other."""
    while True:
        try:
            family, *_, where = socket.getaddrinfo(node.address, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(where[:2], family=family)
        except socket.gaierror as error:  # a name can be known later than its machine
            if time.monotonic() > deadline:
                raise TransientError(f"environment: MASTER_ADDR={node.address}: {error}") from error
            time.sleep(RETRY_S)
        except OSError as error:
            raise SlipwayError(
                f"environment: MASTER_ADDR={node.address}, MASTER_PORT={port}: {error.strerror}; the node with "
                "NODE_RANK=0 listens there: name an address of it and a port that is free"
            ) from error


def interface(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address as its first; None: none has."""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def _url(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _packed(error: Exception | None) -> dict[str, Any]:
    """What is sent of an error: never a pickle, which could do anything where it is opened."""
    if error is None:
        return {}
    plain = {name: value for name, value in vars(error).items() if isinstance(value, int | str)}
    return {"error": type(error).__name__, "message": str(error), "more": plain}


def _unpacked(message: Mapping[str, Any]) -> Exception | None:
    if "error" not in message:
        return None
    kind = getattr(errors, str(message["error"]), None)
    if not isinstance(kind, type) or not issubclass(kind, SlipwayError):
        kind = RuntimeError
    error: Exception = kind.__new__(kind, message.get("message", ""))
    vars(error).update(message.get("more", {}))
    return error
