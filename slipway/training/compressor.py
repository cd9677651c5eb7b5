"""What travels of a step's gradients when they are compressed: of matrices two thin factors, of tables the few rows.

The choice is made once, from the rows that were touched before (a `Plan`), and is the same on all processes. The peers,
who send, have a `Compressor` with its memory; everybody makes the mean from the message, which is equal on all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from slipway.training import powersgd, rows
from slipway.training.powersgd import Layout, Mean, PowerSGD, Shape, auto_rank
from slipway.training.rows import Gather, Rows


@dataclass(frozen=True)
class Plan:
    """How each gradient travels."""

    shapes: tuple[Shape, ...]
    tables: tuple[int, ...]
    """Places of those that travel by rows."""
    rank: int
    """Of the factors of the others."""

    @cached_property
    def layout(self) -> Layout:
        """Of those that do not travel by rows, and of a number that tells whether the rows are finite."""
        return powersgd.layout(_others(self.shapes, self.tables), self.rank)

    @cached_property
    def table_shapes(self) -> tuple[Shape, ...]:
        """Of those that travel by rows."""
        return tuple(self.shapes[i] for i in self.tables)

    def traffic_bytes(self, touched: Sequence[int], peers: int) -> float:
        """Size of an all-reduce that sends as much as a step does, if so many rows of each gradient are touched."""
        return self.layout.size_bytes + sum(rows.traffic_bytes(self.shapes[i], touched[i], peers) for i in self.tables)


def plan(
    shapes: Sequence[Shape],
    sizes: Sequence[int],
    touched: Sequence[int],
    peers: int,
    share: float,
    rank: int | Literal["auto"],
) -> Plan:
    """Choose how each gradient travels.

    Args:
        shapes: of all gradients.
        sizes: bytes of each.
        touched: most rows of each that a peer touched in a step.
        peers: how many exchange what is compressed.
        share: how many times less than the gradients has to travel.
        rank: of PowerSGD's factors; auto: the largest that fits beside the tables' rows.
    """
    tables = rows.tables(shapes, touched, sizes, peers, share)
    taken = sum(rows.traffic_bytes(shapes[i], touched[i], peers) for i in tables)
    if rank == "auto":
        rank = auto_rank(_others(shapes, tables), sum(sizes) / share - taken)
    return Plan(tuple(shapes), tuple(tables), rank)


@dataclass
class Message:
    """What the peers agreed on, and a node is handed."""

    factors: Tensor
    """Of PowerSGD: flat float32, [layout.elements]; not finite if any gradient is not."""
    counts: Tensor
    """Rows of each peer and table: [K, T] int64."""
    rows: Tensor
    """Of all peers: [K, B] uint8."""

    def handed(self, hand_out: Callable[[Tensor], None]) -> Message:
        """Hand it out; the others call `awaited`."""
        for part in (self.factors, self.counts, self.rows):
            hand_out(part)
        return self


def awaited(told: Plan, peers: int, device: torch.device | str, hand_out: Callable[[Tensor], None]) -> Message:
    """Receive what a peer hands out."""
    factors = torch.empty(told.layout.elements, device=device)
    counts = torch.empty(peers, len(told.tables), dtype=torch.int64, device=device)
    hand_out(factors)
    hand_out(counts)
    message = torch.empty(peers, rows.length(told.table_shapes, counts), dtype=torch.uint8, device=device)
    hand_out(message)
    return Message(factors, counts, message)


class Compressor:
    """The compressors of one peer."""

    def __init__(self, told: Plan, device: torch.device | str) -> None:
        self.plan, self.power, self.rows = told, PowerSGD(told.layout, device), Rows(told.table_shapes, device)

    def encode(self, tensors: Sequence[Tensor], mean: Mean, gather: Gather) -> Message:
        """Average this peer's tensors with the others', compressed.

        If any peer's tensors are not finite, neither are the message's factors, and the memory stays as it was.

        Args:
            tensors: float32, of the plan's shapes.
            mean: averages a flat buffer among the peers.
            gather: gives the buffers of all peers.
        """
        tables = [tensors[i] for i in self.plan.tables]
        others = [tensor for i, tensor in enumerate(tensors) if i not in self.plan.tables]
        flags = [torch.stack([table.sum() for table in tables]).sum() * 0] if tables else []  # NaN: one is not finite
        factors = self.power.encode([*others, *flags], mean)
        if not factors.isfinite().all():  # the same for all
            tables = [torch.zeros_like(table) for table in tables]  # no row travels
        return Message(factors, *self.rows.exchange(tables, gather))

    def state_dict(self) -> dict[str, Any]:
        """Give the memory."""
        return {"errors": self.power.errors, "queries": self.power.queries, "rows": self.rows.errors}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Take back what `state_dict` gave."""
        self.power.errors, self.power.queries, self.rows.errors = (
            [tensor.to(device) for tensor in state[name]] for name in ("errors", "queries", "rows")
        )


def decode(told: Plan, message: Message) -> list[Tensor]:
    """Make the mean from its message: float32 tensors of the plan's shapes."""
    others = iter(powersgd.decode(told.layout, message.factors))
    tables = iter(rows.decode(told.table_shapes, message.counts, message.rows))
    return [next(tables if i in told.tables else others) for i in range(len(told.shapes))]


def _others(shapes: Sequence[Shape], tables: Sequence[int]) -> list[Shape]:
    return [shape for i, shape in enumerate(shapes) if i not in tables] + [()] * bool(tables)
