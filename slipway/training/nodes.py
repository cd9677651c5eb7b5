"""Which process is on which node, and the collectives inside nodes and between them, whose bytes are counted.

Read from the variables of torchrun. The first process of each node leads it: between nodes, leaders alone may speak.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from slipway.errors import SlipwayError
from slipway.training import watch


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

    @property
    def saves(self) -> float:
        """How many times less crosses between nodes if leaders alone all-reduce, in rings that enter a node once."""
        count, each = len(self.ranks), len(self.ranks[0])
        return (count * each - 1) / (each * (count - 1)) if count > 1 else 1.0

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

    def everyones(self, buffer: Tensor) -> Tensor:
        """Give every process the buffers of all, in the order of ranks: [world size, *]; they are of one shape."""
        return _everyones(buffer, self.where.world_size, None)

    def leaders_own(self, buffer: Tensor) -> Tensor:
        """Give every leader the buffers of all leaders: [nodes, *]; they alone call this."""
        return _everyones(buffer, len(self.leaders), self.between)

    def gather(self, buffer: Tensor) -> None:
        """Average a buffer inside the node; the leader has it, on the others it is used up."""
        buffer.div_(len(self.mine))
        if self.inside is not None:
            dist.reduce(buffer, self.mine[0], group=self.inside)

    def hand_out(self, buffer: Tensor) -> None:
        """Give the leader's buffer to its node."""
        if self.inside is not None and buffer.numel():
            dist.broadcast(buffer, self.mine[0], group=self.inside)

    def count(self, size_bytes: float, ring: Sequence[int]) -> None:
        """Count an all-reduce in a ring, as gloo and NCCL do it: each sends 2 (k - 1) / k of it to the next of k."""
        self._crossing(2 * (len(ring) - 1) / len(ring) * size_bytes, ring)

    def count_gathered(self, size_bytes: float, ring: Sequence[int]) -> None:
        """Count an all-gather in a ring: each sends its own, and hands on those of all but the next: k - 1 buffers."""
        self._crossing((len(ring) - 1) * size_bytes, ring)

    def _crossing(self, each: float, ring: Sequence[int]) -> None:
        following = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
        crossing = [a for a, b in following.items() if self.where.of(a) != self.where.of(b)]
        mine = each if self.rank in crossing else 0.0
        watch.sent(mine)
        self.sent_bytes += mine
        self.sent_all_bytes += each * len(crossing)


def _everyones(buffer: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    out = buffer.new_empty(count, *buffer.shape)
    if buffer.numel():
        dist.all_gather(list(out.unbind(0)), buffer, group=group)
    return out
