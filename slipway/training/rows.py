"""Row-sparse gradients: of a table of which a step touches few rows, those rows travel, in 4 bits a number.

An item table's gradient is zero but for the items of the batch, and the rows of those have little in common: its rank
is high, and PowerSGD's few factors lose most of it. So each peer sends the rows that it touched (which they are, a
scale and half a byte a number), gets those of all others, and makes the mean of them. What 4 bits round off is kept by
row and added when the row travels the next time: error feedback (Karimireddy et al. 2019, arXiv:1901.09847), so nothing
is lost. Which rows a peer sends is told by a bit for each of the table or, if that is less, by their indices.

Which tables these are is not told but counted, in the steps before compression begins. No process group is known here.
"""

# K peers, T tables, N rows, D width, M rows that travel, B bytes of a message
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Shape = tuple[int, ...]
Gather = Callable[[Tensor], Tensor]
"""Gives the buffers of all peers, [K, *], for this peer's; they have one shape."""

LARGEST = 7  # of 4 bits, on both sides of zero
SCALE = torch.bfloat16  # of a row: float32's range in half of its bytes; feedback mends what it rounds
INDEX = torch.int32


def touched(tensors: Sequence[Tensor]) -> list[int]:
    """Count the rows of each tensor that are not all zero; one that is no matrix counts as touched throughout."""
    return [int(_peaks(x).count_nonzero()) if x.dim() == 2 else x.numel() for x in tensors]


def message_bytes(shape: Shape, rows: int) -> int:
    """Size of `rows` rows of a table in a message: which they are, and their scales and numbers."""
    return sum(_part_bytes(shape, rows))


def _part_bytes(shape: Shape, rows: int) -> tuple[int, int, int]:
    return min(_bytes(shape[0], 8), INDEX.itemsize * rows), SCALE.itemsize * rows, _bytes(shape[1], 2) * rows


def _bytes(count: int, each: int) -> int:
    return -(-count // each)


def traffic_bytes(shape: Shape, rows: int, peers: int) -> float:
    """Size of an all-reduce that sends as much as exchanging `rows` rows of each peer does.

    In a ring, each of K peers sends 2 (K - 1) / K of what is reduced, and K - 1 times what is gathered.
    """
    return message_bytes(shape, rows) * peers / 2


def tables(shapes: Sequence[Shape], rows: Sequence[int], sizes: Sequence[int], peers: int, share: float) -> list[int]:
    """Choose what travels by rows: matrices for which that is at most 1 / `share` of the gradient.

    Args:
        shapes: of all gradients.
        rows: most rows of each that a peer touched in a step.
        sizes: bytes of each gradient.
        peers: how many exchange them.
        share: how many times less has to travel.

    Returns:
        Their places.
    """
    each = enumerate(zip(shapes, rows, sizes, strict=True))
    return [
        i for i, (shape, n, size) in each if n and len(shape) == 2 and share * traffic_bytes(shape, n, peers) <= size
    ]


class Rows:
    """One peer's side of the exchange, with its memory: what 4 bits rounded off, by row."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device | str) -> None:
        self.errors = [torch.zeros(shape, device=device) for shape in shapes]

    def exchange(self, gradients: Sequence[Tensor], gather: Gather) -> tuple[Tensor, Tensor]:
        """Send the rows that this peer touched.

        Args:
            gradients: float32 and finite, [N, D] each.
            gather: called by every peer, for the counts and then for messages as long as the longest.

        Returns:
            What `decode` makes the mean from, equal on all peers: rows of each peer and table, [K, T] int64, and
            the messages, [K, B] uint8.
        """
        device, shapes = gradients[0].device if gradients else "cpu", [tuple(error.shape) for error in self.errors]
        chosen = [_peaks(gradient) > 0 for gradient in gradients]
        counts = gather(torch.tensor([int(rows.sum()) for rows in chosen], dtype=torch.int64, device=device))
        parts = [
            part
            for gradient, error, rows in zip(gradients, self.errors, chosen, strict=True)
            for part in _encoded(gradient, error, rows)
        ]
        padding = length(shapes, counts) - sum(map(len, parts))
        return counts, gather(torch.cat([*parts, torch.zeros(padding, dtype=torch.uint8, device=device)]))


def length(shapes: Sequence[Shape], counts: Tensor) -> int:
    """Bytes B of each message, for the rows [K, T] in them: of the longest."""
    return max(sum(map(message_bytes, shapes, rows)) for rows in counts.tolist())


def decode(shapes: Sequence[Shape], counts: Tensor, messages: Tensor) -> list[Tensor]:
    """Make the mean of the peers' gradients from what `exchange` gave: float32, of these shapes."""
    means = [torch.zeros(shape, device=messages.device) for shape in shapes]
    for rows, message in zip(counts.tolist(), messages, strict=True):
        sizes = [size for shape, count in zip(shapes, rows, strict=True) for size in _part_bytes(shape, count)]
        parts = iter(torch.split(message, [*sizes, len(message) - sum(sizes)]))
        for mean, count in zip(means, rows, strict=True):
            index, values = _decoded(mean, count, next(parts), next(parts), next(parts))
            mean.index_add_(0, index, values, alpha=1 / len(counts))  # each row once in a message: no race on a GPU
    return means


def _encoded(gradient: Tensor, error: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the bytes of a table's chosen rows, as long as `_part_bytes` tells; what is rounded off goes to `error`."""
    index = chosen.nonzero().squeeze(1)
    values = gradient[index] + error[index]
    scale = (_peaks(values) / LARGEST).clamp_min(torch.finfo(SCALE).tiny).to(SCALE)
    step = scale.float().unsqueeze(1)
    codes = (values / step).round_().clamp_(-LARGEST, LARGEST)
    error[index] = values - codes * step
    places = index.to(INDEX).view(torch.uint8) if _by_index(len(gradient), len(index)) else _packed_bits(chosen)
    return places, scale.view(torch.uint8), _packed(codes)


def _decoded(mean: Tensor, count: int, places: Tensor, scale: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Read the indices [M] and values [M, D] of rows of a table like `mean`."""
    by_index = _by_index(len(mean), count)
    index = _copied(places, INDEX) if by_index else _unpacked_bits(places)[: len(mean)].nonzero().squeeze(1)
    return index, _unpacked(codes.view(count, _bytes(mean.shape[1], 2)), mean.shape[1]) * _copied(
        scale, SCALE
    ).float().unsqueeze(1)


def _peaks(matrix: Tensor) -> Tensor:
    """Largest magnitude in each row; NaN where there is one."""
    return matrix.abs().amax(1) if matrix.shape[1] else matrix.new_zeros(len(matrix))


def _by_index(rows: int, count: int) -> bool:
    return INDEX.itemsize * count < _bytes(rows, 8)


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _packed_bits(chosen: Tensor) -> Tensor:
    """Put eight bools into a byte, the first one lowest."""
    padded = pad(chosen.to(torch.uint8), (0, -len(chosen) % 8)).view(-1, 8)
    return (padded * _bits(chosen.device)).sum(1, dtype=torch.uint8)


def _unpacked_bits(packed: Tensor) -> Tensor:
    return (packed.unsqueeze(1) & _bits(packed.device)).bool().flatten()


def _packed(codes: Tensor) -> Tensor:
    """Put two numbers of a row into a byte, each plus 8; of an odd width the last byte is half empty."""
    halves = pad((codes + 8).to(torch.uint8), (0, codes.shape[1] % 2)).view(len(codes), _bytes(codes.shape[1], 2), 2)
    return (halves[..., 0] << 4 | halves[..., 1]).flatten()


def _unpacked(packed: Tensor, width: int) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)[:, :width].float() - 8


def _copied(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.clone().view(dtype)  # where it lies in the message it may not be aligned
