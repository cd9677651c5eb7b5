"""PowerSGD's core without processes: peers are lists, and a mean is a mean of their buffers."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipway.training.powersgd import Group, Layout, PowerSGD, auto_rank, decode, layout, orthonormal

SHAPES = ((40, 24), (7,), (40, 24), (24, 40), (3, 2), (4, 20, 30), (), (8, 4, 3, 3))


ROUNDED = 0.01  # of a norm: what bfloat16 (8 bits, 0.4 %) may round off, some times over


def near(ours: Tensor, wanted: Tensor) -> bool:
    return float((ours - wanted).norm()) <= ROUNDED * float(wanted.norm())


class Peers:
    """Compressors that run side by side, each in a thread, and average through a barrier."""

    def __init__(self, count: int, rank: int) -> None:
        self.layout = layout(SHAPES, rank)
        self.each = [PowerSGD(self.layout, "cpu") for _ in range(count)]
        self.barrier, self.buffers = threading.Barrier(count), list[Tensor]()

    def step(self, tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        messages: list[Tensor] = [torch.empty(0)] * len(self.each)

        def work(peer: int) -> None:
            messages[peer] = self.each[peer].encode(tensors[peer], lambda buffer: self._mean(peer, buffer))

        threads = [threading.Thread(target=work, args=(peer,)) for peer in range(len(self.each))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(message, messages[0]) or not message.isfinite().all() for message in messages)
        assert messages[0].numel() == self.layout.elements
        return decode(self.layout, messages[0])

    def _mean(self, peer: int, buffer: Tensor) -> None:
        if self.barrier.wait() == 0:
            self.buffers = [torch.empty(0)] * len(self.each)
        self.barrier.wait()
        self.buffers[peer] = buffer.clone()
        self.barrier.wait()
        buffer.copy_(torch.stack(self.buffers).mean(0))
        self.barrier.wait()


def gradients(peers: int, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(peers)]


def mean(tensors: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(column).mean(0) for column in zip(*tensors, strict=True)]


def residual(peers: Peers) -> dict[int, Tensor]:
    """What the peers still owe, on average, by place of the tensor."""
    out: dict[int, Tensor] = {}
    for g, group in enumerate(peers.layout.groups):
        parts = torch.stack([peer.errors[g] for peer in peers.each]).mean(0)
        each = torch.split(parts, list(group.counts))
        out |= {i: part.reshape(SHAPES[i]) for i, part in zip(group.members, each, strict=True)}
    return out


@settings(max_examples=20)
@given(peers=st.integers(1, 3), rank=st.integers(1, 4), seed=st.integers(0, 10_000), steps=st.integers(1, 4))
def test_what_was_applied_is_the_sum_of_all_gradients_less_what_is_still_owed(
    peers: int, rank: int, seed: int, steps: int
) -> None:
    ours, applied, given_ = Peers(peers, rank), [torch.zeros(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    for step in range(steps):
        tensors = gradients(peers, seed + step)
        applied = [a + b for a, b in zip(applied, ours.step(tensors), strict=True)]
        given_ = [a + b for a, b in zip(given_, mean(tensors), strict=True)]
    owed = residual(ours)
    assert len(owed) >= 4, "most of the matrices are large enough to be compressed at this rank"
    for i, (a, b) in enumerate(zip(applied, given_, strict=True)):
        assert near(a + owed.get(i, torch.zeros(())), b), i
    assert any(float(left.norm()) > 0.1 for left in owed.values()), "nothing was compressed"


def test_a_gradient_of_low_rank_arrives_whole() -> None:
    generator = torch.Generator().manual_seed(3)

    def thin(shape: tuple[int, ...]) -> Tensor:
        rows = shape[:1] if len(shape) == 4 else shape[:-1]  # as `layout` sees a kernel, and a stack
        columns = shape[len(rows) :]
        left = torch.randn([*rows, *[1] * len(columns)], generator=generator)
        return left * torch.randn([*[1] * len(rows), *columns], generator=generator)

    base = [thin(shape) for shape in SHAPES]
    tensors = [[(peer + 1) * tensor for tensor in base] for peer in range(2)]  # the mean has rank 1 as well
    ours = Peers(2, 2)
    assert len(residual(ours)) == 5
    for a, b in zip(ours.step(tensors), mean(tensors), strict=True):
        assert near(a, b)


@pytest.mark.parametrize("rows", [24, 40])
def test_full_rank_is_the_mean(rows: int) -> None:
    shape = (rows, 24)
    full = Layout((shape,), 24, (Group((0,), (1,), *shape, 24),), ())
    one, tensor = PowerSGD(full, "cpu"), torch.randn(shape)
    (whole,) = decode(full, one.encode([tensor], lambda buffer: None))
    assert near(whole, tensor)
    torch.testing.assert_close(whole + one.errors[0][0], tensor)  # what bfloat16 rounded off is owed, too
    tensors = gradients(2, 5)
    for a, b in zip(Peers(2, 100).step(tensors), mean(tensors), strict=True):
        assert torch.equal(a, b), "at a rank that saves nothing the gradient travels as it is"


def test_the_residual_stays_bounded_when_peers_differ() -> None:
    ours = Peers(2, 2)
    sizes = []
    for step in range(60):
        ours.step(gradients(2, step))
        sizes.append(max(float(peer.errors[0].norm()) for peer in ours.each))
    assert max(sizes[40:]) < 1.5 * max(sizes[20:40]), sizes


def test_a_warm_start_comes_nearer_to_a_gradient_that_stays() -> None:
    tensor = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    best = float(torch.linalg.svdvals(tensor)[4:].square().sum().sqrt())
    one = PowerSGD(layout([(64, 48)], 4), "cpu")
    missed = []
    for _ in range(60):
        one.errors = [torch.zeros(1, 64, 48)]  # without feedback: power iteration alone
        one.encode([tensor], lambda buffer: None)
        missed.append(float(one.errors[0].norm()))
    assert missed[-1] < missed[0]
    assert missed[-1] == pytest.approx(best, rel=0.01), "the best approximation of this rank"


@pytest.mark.parametrize("rows", [5, 300])
def test_a_basis_is_orthonormal_and_keeps_zero_rows(rows: int) -> None:
    left = torch.randn(2, rows, 4)
    left[:, 0] = 0
    left[:, -1] = 0
    basis = orthonormal(left)
    if rows > 5:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(2, 4, 4), atol=1e-5, rtol=0)
    assert not basis[:, [0, -1]].any()
    torch.testing.assert_close(basis @ (basis.mT @ left), left, atol=1e-4, rtol=1e-4)


def test_a_matrix_that_was_zero_is_compressed_well_once_it_is_not() -> None:
    one = PowerSGD(layout([(64, 64)], 2), "cpu")
    one.encode([torch.zeros(64, 64)], lambda buffer: None)
    tensor = torch.zeros(64, 64)
    tensor[10:50] = torch.randn(40, 1) @ torch.randn(1, 64)
    one.encode([tensor], lambda buffer: None)
    assert float(one.errors[0].norm()) < ROUNDED * float(tensor.norm())


def test_a_gradient_that_is_not_finite_is_told_and_leaves_the_memory_alone() -> None:
    ours = Peers(2, 2)
    ours.step(gradients(2, 1))
    errors, queries = [e.clone() for e in ours.each[0].errors], [q.clone() for q in ours.each[0].queries]
    for place in range(len(SHAPES)):
        tensors = gradients(2, 2)
        tensors[1][place].view(-1)[-1] = math.inf
        assert all(not tensor.isfinite().any() for tensor in ours.step(tensors))
    assert all(torch.equal(a, b) for a, b in zip(errors, ours.each[0].errors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(queries, ours.each[0].queries, strict=True))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 300)), min_size=1, max_size=6),
    dtype_bytes=st.sampled_from([2, 4]),
)
def test_the_automatic_rank_sends_at_most_a_sixteenth_and_no_larger_one_does(
    shapes: list[tuple[int, int]], dtype_bytes: int
) -> None:
    size = dtype_bytes * sum(map(math.prod, shapes))
    rank = auto_rank(shapes, size / 16)
    larger = layout(shapes, rank + 1)
    assert rank == 1 or layout(shapes, rank).size_bytes <= size / 16
    assert not larger.groups or larger.size_bytes > size / 16
