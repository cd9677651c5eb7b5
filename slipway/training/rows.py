"""Row-sparse gradients: of a table of which a step touches few rows, those rows travel, in int8.

An item table's gradient is zero but for the items of the batch, and the rows of those have little in common: its rank
is high, and PowerSGD's few factors lose most of it. So each peer sends the rows that it touched (an index, a scale and
a byte a number), gets those of all others, and makes the mean of them. What int8 rounds off is kept by row and added
when the row travels the next time: error feedback (Karimireddy et al. 2019, arXiv:1901.09847), so nothing is lost.

Which tables these are is not told but counted, in the steps before compression begins. No process group is known here.
"""

# K peers, T tables, N rows, D width, M rows that travel, B bytes of a message
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]
Gather = Callable[[Tensor], Tensor]
"""Gives the buffers of all peers, [K, *], for this peer's; they have one shape."""

HEAD = 8  # bytes of a row beside its numbers: the index in int32 and the scale in float32
LARGEST = 127  # of int8, on both sides of zero
ALIGNED = 4  # bytes that a message is a multiple of, so that its numbers may be read in place


def touched(tensors: Sequence[Tensor]) -> list[int]:
    """Count the rows of each tensor that are not all zero; one that is no matrix counts as touched throughout."""
    return [int(_peaks(x).count_nonzero()) if x.dim() == 2 else x.numel() for x in tensors]


def traffic_bytes(shape: Shape, rows: int, peers: int) -> float:
    """Size of an all-reduce that sends as much as exchanging `rows` rows of each peer does.

    In a ring, each of K peers sends 2 (K - 1) / K of what is reduced, and K - 1 times what is gathered.
    """
    return rows * (shape[1] + HEAD) * peers / 2


def tables(shapes: Sequence[Shape], rows: Sequence[int], sizes: Sequence[int], peers: int, share: int) -> list[int]:
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
    """One peer's side of the exchange, with its memory: what int8 rounded off, by row."""

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
        indices, scales, codes = [], [], []
        for gradient, error in zip(gradients, self.errors, strict=True):
            index = _peaks(gradient).nonzero().squeeze(1)
            values = gradient[index] + error[index]
            scale = (_peaks(values) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
            code = (values / scale).round_().to(torch.int8)
            error[index] = values - code * scale
            indices.append(index.to(torch.int32))
            scales.append(scale)
            codes.append(code)
        counts = gather(torch.tensor([len(index) for index in indices], dtype=torch.int64, device=device))
        parts = [part.reshape(-1).view(torch.uint8) for part in (*indices, *scales, *codes)]
        padding = length(shapes, counts) - sum(len(part) for part in parts)
        return counts, gather(torch.cat([*parts, torch.zeros(padding, dtype=torch.uint8, device=device)]))


def length(shapes: Sequence[Shape], counts: Tensor) -> int:
    """Bytes B of each message, for the rows [K, T] in them: of the longest, up to a multiple of four."""
    widths = torch.tensor([shape[1] + HEAD for shape in shapes], dtype=torch.int64, device=counts.device)
    return math.ceil(int((counts * widths).sum(1).max()) / ALIGNED) * ALIGNED


def decode(shapes: Sequence[Shape], counts: Tensor, messages: Tensor) -> list[Tensor]:
    """Make the mean of the peers' gradients from what `exchange` gave: float32, of these shapes."""
    means = [torch.zeros(shape, device=messages.device) for shape in shapes]
    if not messages.numel():
        return means
    for rows, message in zip(counts.tolist(), messages, strict=True):
        numbers = [n * shape[1] for n, shape in zip(rows, shapes, strict=True)]
        sizes = [4 * sum(rows), 4 * sum(rows), sum(numbers)]
        *parts, _ = torch.split(message, [*sizes, len(message) - sum(sizes)])
        indices, scales = torch.split(parts[0].view(torch.int32), rows), torch.split(parts[1].view(torch.float32), rows)
        codes = torch.split(parts[2].view(torch.int8), numbers)
        for mean, index, scale, code in zip(means, indices, scales, codes, strict=True):
            values = code.view(len(index), mean.shape[1]) * scale.unsqueeze(1)
            mean.index_add_(0, index, values, alpha=1 / len(counts))  # each row once in a message: no race on a GPU
    return means


def _peaks(matrix: Tensor) -> Tensor:
    """Largest magnitude in each row; NaN where there is one."""
    return matrix.abs().amax(1) if matrix.shape[1] else matrix.new_zeros(len(matrix))
