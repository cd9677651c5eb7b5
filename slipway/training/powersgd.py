"""PowerSGD: a gradient matrix travels as two thin factors, and what they miss is added to the next gradient.

Vogels, Karimireddy and Jaggi 2019, arXiv:1905.13727: one step of power iteration (algorithm 1), started from the
factor of the step before, with error feedback (algorithm 2). Matrices of like shape are multiplied in one batch, and
all that travels goes in three collectives: the left factors, the tensors that are too small to compress, the right
factors. No process group is known here: how a buffer is averaged among the peers is an argument.

Peers compute the left factors from equal bits, each for itself, so they have to be alike in hardware and software.
"""

# G matrices of like shape, N rows, M columns, R rank
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Mean = Callable[[Tensor], None]
"""Replaces a flat buffer, bfloat16 or float32, by its mean over all peers."""

WORTH = 2  # a matrix is compressed if its factors are less than half of it
SHARE = 16  # rank auto: at most a sixteenth of what flat all-reduce sends between nodes travels, as published
WIRE = torch.bfloat16  # what factors travel in: twice the rank for the bytes of float32; feedback mends what it rounds


@dataclass(frozen=True)
class Group:
    """Matrices of like shape, from one tensor or many."""

    members: tuple[int, ...]
    """Places in the list of tensors."""
    counts: tuple[int, ...]
    """Matrices in each of them; G in all."""
    rows: int
    columns: int
    rank: int

    @property
    def left(self) -> Shape:
        """[G, N, R]"""
        return sum(self.counts), self.rows, self.rank

    @property
    def right(self) -> Shape:
        """[G, M, R]"""
        return sum(self.counts), self.columns, self.rank


@dataclass(frozen=True)
class Layout:
    """Which tensors are compressed, and what travels."""

    shapes: tuple[Shape, ...]
    rank: int
    groups: tuple[Group, ...]
    rest: tuple[int, ...]
    """Places of the tensors that travel as they are: vectors, and matrices too small to gain."""

    @property
    def parts(self) -> tuple[list[Shape], list[Shape], list[Shape]]:
        """Shapes of what travels: left factors, the rest, right factors."""
        groups = self.groups
        return [group.left for group in groups], [self.shapes[i] for i in self.rest], [group.right for group in groups]

    @property
    def elements(self) -> int:
        """Numbers that travel."""
        return sum(map(_numbers, self.parts))

    @property
    def size_bytes(self) -> int:
        """What travels, by one all-reduce each: factors in bfloat16, the rest in float32."""
        left, rest, right = map(_numbers, self.parts)
        return WIRE.itemsize * (left + right) + torch.float32.itemsize * rest


def _numbers(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def layout(shapes: Sequence[Shape], rank: int) -> Layout:
    """Sort tensors into batches of like matrices.

    One of more than two dimensions is a matrix [first, all others], as a convolution's kernel, or a stack of matrices
    of the last two, as a layer's experts: whichever sends less.
    """
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    rest = []
    for i, shape in enumerate(shapes):
        seen = [(1, shape[0], math.prod(shape[1:])), (math.prod(shape[:-2]), *shape[-2:])] if len(shape) > 1 else []
        sent, best = min(((count * rank * (n + m), (count, n, m)) for count, n, m in seen), default=(0, (0, 0, 0)))
        if best[0] and WORTH * sent < math.prod(shape):
            alike.setdefault(best[1:], []).append((i, best[0]))
        else:
            rest.append(i)
    groups = tuple(
        Group(tuple(i for i, _ in members), tuple(count for _, count in members), rows, columns, rank)
        for (rows, columns), members in alike.items()
    )
    return Layout(tuple(shapes), rank, groups, tuple(rest))


def auto_rank(shapes: Sequence[Shape], budget_bytes: float) -> int:
    """Give the largest rank whose traffic is at most `budget_bytes`; at least 1."""
    rank = 1
    while (larger := layout(shapes, rank + 1)).groups and larger.size_bytes <= budget_bytes:
        rank += 1
    return rank


class PowerSGD:
    """The compressor of one peer, with its memory: residuals of error feedback and right factors for a warm start."""

    def __init__(self, shape: Layout, device: torch.device | str, seed: int = 0) -> None:
        self.layout = shape
        generator = torch.Generator().manual_seed(seed)  # every peer starts from the same right factors
        self.fresh = [torch.randn(group.right, generator=generator).to(device) for group in shape.groups]
        self.queries = self.fresh
        self.errors = [
            torch.zeros(sum(group.counts), group.rows, group.columns, device=device) for group in shape.groups
        ]

    def encode(self, tensors: Sequence[Tensor], mean: Mean) -> Tensor:
        """Average this peer's tensors with the others', compressed.

        Args:
            tensors: float32, of the layout's shapes; what a step before missed is added to them.
            mean: called three times by every peer, or twice if something is not finite.

        Returns:
            The message that `decode` below makes the mean from, equal on all peers: flat float32, [layout.elements].
            If any peer's tensors are not finite, neither is the message, and the memory stays as it was.
        """
        groups = self.layout.groups
        matrices = [
            torch.cat([tensors[i].reshape(-1, group.rows, group.columns) for i in group.members]).add_(error)
            for group, error in zip(groups, self.errors, strict=True)
        ]
        lefts = [_product(matrix, query) for matrix, query in zip(matrices, self.queries, strict=True)]
        first, rest = _sent(lefts), pack([tensors[i] for i in self.layout.rest])
        mean(first)
        mean(rest)
        if not (first.isfinite().all() and rest.isfinite().all()):  # the same for all: each sees the mean
            return torch.full([self.layout.elements], torch.nan, device=first.device)
        *lefts, _ = unpack(first.float(), [group.left for group in groups])
        bases = [orthonormal(left) for left in lefts]
        second = _sent([_product(matrix.mT, basis) for matrix, basis in zip(matrices, bases, strict=True)])
        *rights, _ = unpack(second.float(), [group.right for group in groups])
        for matrix, basis, right in zip(matrices, bases, rights, strict=True):
            matrix.baddbmm_(basis, right.mT, alpha=-1)  # what is sent is less by what bfloat16 rounds off
        self.errors = matrices
        mean(second)
        second = second.float()
        *rights, _ = unpack(second, [group.right for group in groups])
        # A column that found nothing, as of an expert that had no sample, would find nothing ever after.
        self.queries = [
            torch.where(right.any(1, keepdim=True), right, fresh)
            for right, fresh in zip(rights, self.fresh, strict=True)
        ]
        return pack([*bases, rest, second])


def _sent(factors: Sequence[Tensor]) -> Tensor:
    return pack(factors).to(WIRE)


def orthonormal(left: Tensor) -> Tensor:
    """Give an orthonormal basis [G, N, R] of the columns of `left`; a row of zeros stays one.

    Householder's QR was the fastest of those tried (Gram-Schmidt twice, Cholesky of the Gram matrix in float64), and
    its basis is orthonormal even where columns are dependent. The rounding that it leaves in a zero row, such as an
    item that no sample held, is taken away: Adam would make steps of it.
    """
    basis: Tensor = torch.linalg.qr(left).Q
    return basis * left.any(-1, keepdim=True)


def _product(matrix: Tensor, factor: Tensor) -> Tensor:
    """Give matrix @ factor, transposed throughout: three to six times as fast on a CPU where the factor is thin."""
    return (factor.mT @ matrix.mT).mT


def decode(shape: Layout, message: Tensor) -> list[Tensor]:
    """Make the mean from its message: float32 tensors of the layout's shapes."""
    parts = unpack(message, [each for part in shape.parts for each in part])
    count = len(shape.groups)
    lefts, rest, rights = parts[:count], parts[count : count + len(shape.rest)], parts[count + len(shape.rest) :]
    out = dict(zip(shape.rest, rest, strict=True))
    for group, left, right in zip(shape.groups, lefts, rights, strict=False):
        for i, matrices in zip(group.members, torch.split(left @ right.mT, list(group.counts)), strict=True):
            out[i] = matrices.reshape(shape.shapes[i])
    return [out[i] for i in range(len(shape.shapes))]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Copy tensors into one flat buffer."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)


def unpack(buffer: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Give views of a flat buffer in these shapes, and last what is left of it."""
    sizes = [math.prod(shape) for shape in shapes]
    *parts, left = torch.split(buffer, [*sizes, buffer.numel() - sum(sizes)])
    return [*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)), left]
