"""How many floating-point operations training takes, and how many the device could do: the two sides of MFU.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the operations that the model needs
over those that the device could have done meanwhile. What could be done is measured, not read from a data sheet: a
matrix product in the arithmetic of training, on the threads that training has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from slipway.workloads.base import Tensors

MEASURED_S, LEAST = 0.2, 5  # time, and products: all of fewer could have met a machine that stood still
SIZE, SIZE_ACCELERATOR = 384, 8192  # sides of the matrices: large enough for the peak, small enough for the time
SHAPES = 64  # shapes of batches that are counted; a step under the counter takes about three times as long
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peak(precision: str, device: torch.device) -> float:
    """Measure the operations a second of a matrix product: the best of five or more, as fit into 0.2 s."""
    size = SIZE if device.type == "cpu" else SIZE_ACCELERATOR
    # Even values, not random ones: torch's generator is training's.
    values = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(DTYPES[precision])
    torch.mm(values, values)  # the first one prepares its kernel
    best, taken, began = math.inf, 0, time.perf_counter()
    while taken < LEAST or time.perf_counter() - began < MEASURED_S:
        start = time.perf_counter()
        torch.mm(values, values)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best, taken = min(best, time.perf_counter() - start), taken + 1
    return 2 * size**3 / best


class Counter:
    """Counts the operations of forward and backward, by torch's own formulas for each kind of operation.

    The first batch of a shape runs under the counter, which looks on and changes no result; further ones are known by
    their shape. What a technique leaves out (rows that are not trained) or does twice (activations computed anew)
    counts as it was in that first batch.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._known: dict[tuple[tuple[int, ...], ...], int] = {}

    @contextmanager
    def counting(self, batch: Tensors) -> Iterator[None]:
        """Add the operations of forward and backward, which run inside, on `batch`."""
        shapes = tuple(value.shape for value in batch.values())
        if shapes in self._known or len(self._known) >= SHAPES:
            yield
        else:
            with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as mode:
                yield
            self._known[shapes] = mode.get_total_flops()
        self.total += self._known.get(shapes) or self._estimate(shapes)

    def _estimate(self, shapes: tuple[tuple[int, ...], ...]) -> float:
        return _elements(shapes) * sum(self._known.values()) / max(1, sum(map(_elements, self._known)))


def _elements(shapes: tuple[tuple[int, ...], ...]) -> int:
    return sum(map(math.prod, shapes))


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch has no types for it


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


_ON_CPU = {  # torch 2.13 knows the fused attention of accelerators alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
