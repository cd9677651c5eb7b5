"""How gradients are averaged among the processes: as little as possible goes over the slow link, between the nodes.

    flat                    each process with all others: DeepSpeed's own reduction
    hierarchical            averaged inside each node, then among the nodes' first processes, then handed out inside
    powersgd                compressed, among all processes
    hierarchical_powersgd   averaged inside each node, then compressed among the first processes, then handed out
    auto                    hierarchical, and compressed where a trial in the first steps shows that it pays

All but flat work at ZeRO 0, where the engine leaves whole gradients; from ZeRO 1 on its optimizer reduces them itself.
Which process is on which node is read from the variables of torchrun. The compression is in powersgd.py.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipway.config import CommunicationParams, TrainParams
from slipway.errors import SlipwayError
from slipway.training import precision, watch
from slipway.training.powersgd import Layout, PowerSGD, auto_rank, decode, layout, pack, unpack

TRIALS = 5  # steps in which `auto` times both ways, after a first one that opens the connections
PAYS = 1.1  # compression loses something, so it has to make a step this much faster

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """One process as its launcher names it."""

    rank: int
    node: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True)
class Nodes:
    """Which process is where."""

    ranks: tuple[tuple[int, ...], ...]
    """Ranks of each node in the order of their local ranks, as many on each; the first leads."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return len(self.ranks) * len(self.ranks[0])

    def of(self, rank: int) -> tuple[int, ...]:
        """Ranks of the node that `rank` is on."""
        return next(ranks for ranks in self.ranks if rank in ranks)


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read RANK, GROUP_RANK, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun and the local launcher set them.

    Raises:
        SlipwayError: one is missing or no number.
    """
    names = ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    wrong = [f"{name}={environment.get(name, '')}" for name in names if not environment.get(name, "").isdecimal()]
    if wrong:
        raise SlipwayError(
            f"training: the launcher's environment does not tell the nodes ({', '.join(wrong)}); start with torchrun, "
            "or set these variables as it does, or use train.communication.method: flat"
        )
    return Place(*(int(environment[name]) for name in names))


def nodes(places: Sequence[Place]) -> Nodes:
    """Make the map of the nodes from what every process was told, in the order of ranks.

    Raises:
        SlipwayError: the places contradict one another, or the nodes are of unequal size.
    """
    for rank, each in enumerate(places):
        if each.rank != rank:
            raise SlipwayError(f"training: the process of rank {rank} was told RANK={each.rank}; set it right")
    found: dict[int, list[Place]] = {}
    for each in sorted(places, key=lambda each: (each.node, each.local_rank)):
        found.setdefault(each.node, []).append(each)
    for node, here in found.items():
        told = {each.local_world_size for each in here}
        if told != {len(here)} or [each.local_rank for each in here] != list(range(len(here))):
            raise SlipwayError(
                f"training: node {node} (GROUP_RANK) has the ranks {[each.rank for each in here]} with LOCAL_RANK "
                f"{[each.local_rank for each in here]} and LOCAL_WORLD_SIZE {sorted(told)}, which contradict one "
                "another; start with torchrun, or set these variables as it does"
            )
    if len({len(here) for here in found.values()}) > 1:
        sizes = {node: len(here) for node, here in found.items()}
        raise SlipwayError(
            f"training: the nodes run unequal numbers of processes ({sizes}); start as many on each, or use "
            "train.communication.method: flat"
        )
    return Nodes(tuple(tuple(each.rank for each in here) for here in found.values()))


def discover(device: torch.device | str) -> Nodes:
    """Gather the places of all processes; each of them calls this.

    Raises:
        SlipwayError: the map is incomplete, contradictory or uneven.
    """
    here = place()
    mine = torch.tensor([here.rank, here.node, here.local_rank, here.local_world_size], device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return nodes([Place(*each.tolist()) for each in gathered])


class Links:
    """The process groups of a map of nodes, and a count of what goes between the nodes."""

    def __init__(self, where: Nodes, rank: int) -> None:
        self.where, self.rank, self.mine = where, rank, where.of(rank)
        self.leads = rank == self.mine[0]
        self.leaders = tuple(ranks[0] for ranks in where.ranks)
        self.between = dist.new_group(list(self.leaders))
        groups = {ranks: dist.new_group(list(ranks)) for ranks in where.ranks if len(ranks) > 1}
        self.inside = groups.get(self.mine)
        self.sent_bytes = self.sent_all_bytes = 0.0

    def mean(self, buffer: Tensor) -> None:
        """Average a buffer among all processes."""
        dist.all_reduce(buffer.div_(self.where.world_size))

    def lead_mean(self, buffer: Tensor) -> None:
        """Average a buffer among the leaders, who alone call this."""
        dist.all_reduce(buffer.div_(len(self.leaders)), group=self.between)

    def gather(self, buffer: Tensor) -> None:
        """Average a buffer inside the node; the leader has it, on the others it is used up."""
        buffer.div_(len(self.mine))
        if self.inside is not None:
            dist.reduce(buffer, self.mine[0], group=self.inside)

    def hand_out(self, buffer: Tensor) -> None:
        """Give the leader's buffer to its node."""
        if self.inside is not None:
            dist.broadcast(buffer, self.mine[0], group=self.inside)

    def count(self, size_bytes: float, ring: Sequence[int]) -> None:
        """Count an all-reduce in a ring, as gloo and NCCL do it: each sends 2 (k - 1) / k of it to the next of k."""
        following = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
        crossing = [a for a, b in following.items() if self.where.of(a) != self.where.of(b)]
        each = 2 * (len(ring) - 1) / len(ring) * size_bytes
        mine = each if self.rank in crossing else 0.0
        watch.sent(mine)
        self.sent_bytes += mine
        self.sent_all_bytes += each * len(crossing)


@dataclass
class Trial:
    """What `auto` measured so far."""

    seconds: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each step: without its reduction, the reduction as it is, and compressed."""
    ended: float | None = None
    """When the last one ended."""


class Reducer:
    """Averages gradients in place.

    Its memory and counts are what `state_dict` gives; a run that goes on from there does as if it had never stopped.
    With `auto`, what is chosen depends on time, but once chosen it stays so when the run is killed and goes on.
    """

    def __init__(self, links: Links, told: CommunicationParams, device: torch.device) -> None:
        self.links, self.rank, self.warmup, self.device = links, told.rank, told.warmup_steps, device
        self.hierarchical = told.method not in ("flat", "powersgd")
        self.compresses: bool | None = None if told.method == "auto" else told.method.endswith("powersgd")
        """None: not decided yet."""
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """What the gradients are multiplied by (fp16); the memory is kept free of it."""
        self.steps = 0
        self.trial = Trial()
        self._set(None)

    def reduce(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes, who call this with their parameters in one order.

        A parameter without a gradient counts as zero, and gets one. If a gradient of any process is not finite, some
        of the mean is not, on every process.
        """
        grads = _gradients(parameters)
        self.steps += 1
        if self.compresses is None:
            self._try(grads)
        elif self.compresses and self.steps > self.warmup:
            self._compressed(grads)
        else:
            self._plain(grads)

    def forget(self) -> None:
        """Drop the memory: the parameters mean something else from now on, such as newly selected rows."""
        self._set(None)

    def figures(self) -> dict[str, float]:
        """What went between the nodes so far: payload sent by this process, and by all (counted, as in a ring)."""
        return {"sent_bytes": self.links.sent_bytes, "sent_all_bytes": self.links.sent_all_bytes}

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of this process: tensors and plain values."""
        sent = [self.links.sent_bytes, self.links.sent_all_bytes]
        state: dict[str, Any] = {"steps": self.steps, "compresses": self.compresses, "sent": sent}
        if self.layout is not None:
            state |= {"shapes": [list(shape) for shape in self.layout.shapes], "rank": self.layout.rank}
        if self.memory is not None:
            state |= {"errors": self.memory.errors, "queries": self.memory.queries}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.steps, self.compresses = state["steps"], state["compresses"]
        self.links.sent_bytes, self.links.sent_all_bytes = state["sent"]
        known = "shapes" in state
        self._set(layout([tuple(shape) for shape in state["shapes"]], state["rank"]) if known else None)
        if self.memory is not None:
            self.memory.errors = [error.to(self.device) for error in state["errors"]]
            self.memory.queries = [query.to(self.device) for query in state["queries"]]

    def _set(self, found: Layout | None) -> None:
        self.layout = found
        compresses = found is not None and (self.links.leads or not self.hierarchical)
        self.memory = PowerSGD(found, self.device) if found is not None and compresses else None

    def _plain(self, grads: Sequence[Tensor]) -> None:
        links, buffer = self.links, pack(grads)
        if self.hierarchical:
            links.gather(buffer)
            if links.leads:
                links.lead_mean(buffer)
            links.hand_out(buffer)
        else:
            links.mean(buffer)
        links.count(buffer.nbytes, self._ring)
        _write(unpack(buffer, [grad.shape for grad in grads]), grads)

    def _compressed(self, grads: Sequence[Tensor]) -> None:
        shape, links, scale = self._layout(grads), self.links, self.loss_scale()
        buffer = pack(grads).float().div_(scale)
        if self.hierarchical:
            links.gather(buffer)
        if self.memory is not None:
            *tensors, _ = unpack(buffer, shape.shapes)
            message = self.memory.encode(tensors, links.lead_mean if self.hierarchical else links.mean)
        else:
            message = buffer.new_empty(shape.elements)
        if self.hierarchical:
            links.hand_out(message)
        links.count(shape.size_bytes, self._ring)
        _write(decode(shape, message.mul_(scale)), grads)

    def _layout(self, grads: Sequence[Tensor]) -> Layout:
        shapes = tuple(tuple(grad.shape) for grad in grads)
        if self.layout is None or self.layout.shapes != shapes:
            size = sum(grad.nbytes for grad in grads)
            rank = auto_rank(shapes, size) if self.rank == "auto" else self.rank
            found = layout(shapes, rank)
            ratio = size / found.size_bytes
            log.info("gradients compressed: rank=%d sent=1/%.1f of %.2f MB", rank, ratio, size / 1e6)
            self._set(found)
        assert self.layout is not None
        return self.layout

    @property
    def _ring(self) -> Sequence[int]:
        return self.links.leaders if self.hierarchical else range(self.links.where.world_size)

    def _try(self, grads: Sequence[Tensor]) -> None:
        """Reduce as it is, and once more compressed, for the time that it takes; what comes out of that is dropped."""
        copies, trial = [grad.clone() for grad in grads], self.trial
        began = time.perf_counter()
        plain = self._timed(lambda: self._plain(grads))
        compressed = self._timed(lambda: self._compressed(copies))
        if trial.ended is not None:
            trial.seconds.append((began - trial.ended, plain, compressed))
        trial.ended = time.perf_counter()
        if len(trial.seconds) == TRIALS:
            self._decide()

    def _timed(self, work: Callable[[], None]) -> float:
        dist.barrier()  # nobody's waiting for a slower process is taken for the link's
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _decide(self) -> None:
        medians = torch.tensor([median(column) for column in zip(*self.trial.seconds, strict=True)], device=self.device)
        dist.all_reduce(medians, dist.ReduceOp.MAX)  # one decision for all
        rest, plain, compressed = medians.tolist()
        gain = (rest + plain) / (rest + compressed)
        self.compresses = gain >= PAYS
        self.forget()
        log.info(
            "communication: compression %s: a step takes %.1f ms with it, %.1f without (%.2f times as fast; it has to "
            "be %.2f); reduction alone %.1f and %.1f ms",
            "on" if self.compresses else "left off",
            1e3 * (rest + compressed),
            1e3 * (rest + plain),
            gain,
            PAYS,
            1e3 * compressed,
            1e3 * plain,
        )


class Own:
    """Stands in a `Reducer`'s place where the engine reduces by itself."""

    def reduce(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Do nothing: the gradients are the mean already."""

    def forget(self) -> None:
        """Nothing is kept."""

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


def attach(engine: Any, train: TrainParams) -> Reducer | Own:
    """Make what averages the engine's gradients, to be called between its `backward` and its `step`.

    Raises:
        SlipwayError: the launcher's map of the nodes is incomplete, contradictory or uneven.
    """
    method = train.communication.method
    if method == "flat":
        return Own()
    if train.zero != 0:  # auto: params allow no other method here
        log.info(
            "communication: auto stays flat: ZeRO %s reduces in its optimizer; train.zero: 0 lets it try", train.zero
        )
        return Own()
    where = discover(engine.device)
    if method == "auto" and len(where.ranks) == 1:
        log.info("communication: auto stays flat: there is one node, and no slow link")
        return Own()
    engine.enable_backward_allreduce = False
    reducer = make(train, engine.module.parameters(), where)
    reducer.loss_scale = lambda: precision.loss_scale(engine) or 1.0
    log.info("communication: %s, %d nodes of %d processes", method, len(where.ranks), len(where.ranks[0]))
    return reducer


def make(train: TrainParams, parameters: Iterable[torch.nn.Parameter], where: Nodes) -> Reducer:
    """Make the reducer of `train.communication`, flat too; every process calls this.

    Args:
        train: how gradients are to be averaged.
        parameters: whose gradients they are, all on one device.
        where: map of the nodes.
    """
    return Reducer(Links(where, dist.get_rank()), train.communication, next(iter(parameters)).device)


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    grads = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    return grads


def _write(means: Iterable[Tensor], grads: Sequence[Tensor]) -> None:
    for mean, grad in zip(means, grads, strict=False):  # `unpack` gives what is left too: nothing
        grad.copy_(mean)
