"""The exchange of rows without processes: peers are threads, and all of them get what each sent."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipway.training import compressor, rows
from slipway.training.compressor import Compressor, Plan, plan
from slipway.training.rows import Rows, decode, length, tables, touched

T = TypeVar("T")
SHAPES = ((60, 16), (40, 7))  # the second one's rows end between two multiples of four bytes


class Meeting:
    """Runs a function of each peer side by side; they average and gather through a barrier."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.buffers = count, threading.Barrier(count), [torch.empty(0)] * count

    def run(self, work: Callable[[int], T]) -> list[T]:
        answers: dict[int, T] = {}

        def call(peer: int) -> None:
            answers[peer] = work(peer)

        threads = [threading.Thread(target=call, args=(peer,)) for peer in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [answers[peer] for peer in range(self.count)]

    def gather(self, peer: int) -> Callable[[Tensor], Tensor]:
        def all_of(buffer: Tensor) -> Tensor:
            self.buffers[peer] = buffer.clone()
            self.barrier.wait()
            found = torch.stack(self.buffers)
            self.barrier.wait()
            return found

        return all_of

    def mean(self, peer: int) -> Callable[[Tensor], None]:
        def mean_of(buffer: Tensor) -> None:
            buffer.copy_(self.gather(peer)(buffer).mean(0))

        return mean_of


class Peers:
    """Exchanges that run side by side."""

    def __init__(self, count: int) -> None:
        self.meeting, self.each = Meeting(count), [Rows(SHAPES, "cpu") for _ in range(count)]

    def step(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        meeting = self.meeting
        sent = meeting.run(lambda peer: self.each[peer].exchange(gradients[peer], meeting.gather(peer)))
        assert all(torch.equal(a, b) for other in sent for a, b in zip(other, sent[0], strict=True))
        counts, messages = sent[0]
        assert counts.tolist() == [touched(gradient) for gradient in gradients]
        assert messages.shape == (len(gradients), length(SHAPES, counts))
        return decode(SHAPES, *sent[0])


def sparse(peers: int, seed: int) -> list[list[Tensor]]:
    """Gradients with few rows, of very different sizes; perhaps none."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(peers):
        chosen = [torch.rand(shape[0], 1, generator=generator) < 0.2 for shape in SHAPES]
        sizes = [10 ** torch.randn(shape[0], 1, generator=generator) for shape in SHAPES]
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        out.append([a * b * c for a, b, c in zip(chosen, sizes, values, strict=True)])
    return out


def mean(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(column).mean(0) for column in zip(*gradients, strict=True)]


@settings(max_examples=20)
@given(peers=st.integers(1, 4), seed=st.integers(0, 10_000), steps=st.integers(1, 5))
def test_what_was_applied_is_the_sum_of_all_gradients_less_what_is_still_owed(
    peers: int, seed: int, steps: int
) -> None:
    ours, applied, wanted = Peers(peers), [torch.zeros(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    for step in range(steps):
        gradients = sparse(peers, seed + step)
        applied = [a + b for a, b in zip(applied, ours.step(gradients), strict=True)]
        wanted = [a + b for a, b in zip(wanted, mean(gradients), strict=True)]
    owed = mean([peer.errors for peer in ours.each])
    for a, b, c in zip(applied, owed, wanted, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-4)


@settings(max_examples=20)
@given(peers=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_a_row_arrives_within_the_rounding_of_4_bits_and_an_untouched_one_stays_zero(peers: int, seed: int) -> None:
    gradients = sparse(peers, seed)
    steps = mean([[x.abs().amax(1, keepdim=True) / 7 for x in each] for each in gradients])
    for ours, wanted, step in zip(Peers(peers).step(gradients), mean(gradients), steps, strict=True):
        assert ((ours - wanted).abs() <= 0.52 * step + 1e-6 * wanted.abs()).all()
        assert not ours[(step == 0).squeeze(1)].any()


@given(seed=st.integers(0, 10_000))
def test_without_rounding_the_mean_is_exact_and_nothing_is_owed(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [[torch.randint(-6, 8, s, generator=generator).float() for s in SHAPES] for _ in range(2)]
    for gradient in gradients:
        for table in gradient:
            table[:, 0] = 7
            table[::3] = 0
    ours = Peers(2)
    for a, b in zip(ours.step(gradients), mean(gradients), strict=True):
        assert torch.equal(a, b)
    assert not any(error.any() for peer in ours.each for error in peer.errors)


def test_a_row_that_what_was_owed_cancels_is_sent_as_zero() -> None:
    one = Rows(SHAPES, "cpu")
    gradients = [torch.zeros(shape) for shape in SHAPES]
    gradients[0][3] = 1.0
    one.errors[0][3] = -1.0
    sent = decode(SHAPES, *one.exchange(gradients, lambda buffer: buffer.unsqueeze(0)))
    assert not any(tensor.any() for tensor in (*sent, *one.errors))


def test_tables_are_those_whose_rows_are_a_sixteenth_of_the_gradient_at_most() -> None:
    shapes = [(1000, 64), (1000, 64), (1000, 64), (1000,), (10, 20, 30)]
    sizes = [4 * math.prod(shape) for shape in shapes]
    limit = (1000 * 64 * 4 // 16 - 125) // (32 + 2)  # 125 bytes: a bit for each of 1,000 rows
    assert tables(shapes, [limit, limit + 1, 0, 1, 1], sizes, 2, 16) == [0], "one that nobody touched is not known"
    assert tables(shapes, [limit, 5, 0, 1, 1], sizes, 4, 16) == [1], "four peers send twice as much in all"
    assert tables(shapes, [limit, 5, 0, 1, 1], [size // 2 for size in sizes], 2, 16) == [1], "half precision"


@given(rows=st.integers(1, 300), width=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_rows_are_told_by_a_bit_each_or_by_indices_whichever_is_less(
    rows: int, width: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.zeros(rows, width)
    gradient[torch.rand(rows, generator=generator) < share] = 7.0
    count = touched([gradient])[0]
    counts, message = Rows([(rows, width)], "cpu").exchange([gradient], lambda buffer: buffer.unsqueeze(0))
    assert message.shape[1] == min(4 * count, math.ceil(rows / 8)) + count * (2 + math.ceil(width / 2))
    assert torch.equal(decode([(rows, width)], counts, message)[0], gradient)


MIXED = ((60, 16), (48, 32), (300, 16), (5,))
TOLD = Plan(MIXED, (0, 2), 2)


def mixed(peers: int, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = [[torch.randn(shape, generator=generator) for shape in MIXED] for _ in range(peers)]
    for peer, tensors in enumerate(out):
        for table in (tensors[0], tensors[2]):
            table[torch.arange(len(table)) % 7 != peer] = 0
    return out


def encoded(each: Sequence[Compressor], tensors: Sequence[Sequence[Tensor]]) -> list[compressor.Message]:
    meeting = Meeting(len(each))
    return meeting.run(lambda peer: each[peer].encode(tensors[peer], meeting.mean(peer), meeting.gather(peer)))


def test_each_gradient_comes_back_in_its_place() -> None:
    tensors = mixed(2, 1)
    messages = encoded([Compressor(TOLD, "cpu") for _ in range(2)], tensors)
    ours, wanted = compressor.decode(TOLD, messages[0]), mean(tensors)
    assert [tuple(each.shape) for each in ours] == list(MIXED)
    for i in (0, 2, 3):
        torch.testing.assert_close(ours[i], wanted[i], atol=0.3, rtol=0)
    assert 0 < float((ours[1] - wanted[1]).norm()) < float(wanted[1].norm())


@pytest.mark.parametrize("place", range(len(MIXED)))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_told_and_leaves_all_memory_alone(place: int, value: float) -> None:
    each = [Compressor(TOLD, "cpu") for _ in range(2)]
    encoded(each, mixed(2, 1))
    before = [[tensor.clone() for kept in peer.state_dict().values() for tensor in kept] for peer in each]
    tensors = mixed(2, 2)
    tensors[1][place].view(-1)[0] = value
    for message in encoded(each, tensors):
        assert not all(tensor.isfinite().all() for tensor in compressor.decode(TOLD, message))
    after = [[tensor for kept in peer.state_dict().values() for tensor in kept] for peer in each]
    assert all(torch.equal(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))


@given(
    sizes=st.lists(st.tuples(st.integers(200, 3000), st.integers(8, 300)), min_size=1, max_size=5),
    share=st.floats(0.0, 0.2),
    peers=st.integers(2, 5),
)
def test_all_that_travels_is_a_sixteenth_at_most_and_what_tables_save_goes_into_the_rank(
    sizes: list[tuple[int, int]], share: float, peers: int
) -> None:
    shapes = [*sizes, (256, 256)]
    counts = [max(1, int(share * n)) for n, _ in sizes] + [256]
    each = [4 * math.prod(shape) for shape in shapes]
    told = plan(shapes, each, counts, peers, 16, "auto")
    assert told.rank == 1 or told.traffic_bytes(counts, peers) <= sum(each) / 16
    by_factors = plan(shapes, each, [shape[0] for shape in shapes], peers, 16, "auto")
    assert by_factors.tables == ()
    for i in told.tables:
        assert rows.traffic_bytes(shapes[i], counts[i], peers) <= each[i] / 16
