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
SHAPES = 16  # batches that are counted at most; a step under the counter takes about three times as long
NEAR = 1.1  # a batch of a size within this factor of a counted one is not counted itself
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Shapes = tuple[tuple[int, ...], ...]  # of the tensors of a batch


def peak(precision: str, device: torch.device, measured_s: float = MEASURED_S) -> float:
    """Measure the operations a second of a matrix product: the best of five or more, as fit into the time.

    On a machine that is busy with something else all of them may be slow at one moment: the best of several moments is
    near what the device can do.
    """
    size = SIZE if device.type == "cpu" else SIZE_ACCELERATOR
    # Even values, not random ones: torch's generator is training's.
    values = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(DTYPES[precision])
    torch.mm(values, values)  # the first one prepares its kernel
    best, taken, began = math.inf, 0, time.perf_counter()
    while taken < LEAST or time.perf_counter() - began < measured_s:
        start = time.perf_counter()
        torch.mm(values, values)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best, taken = min(best, time.perf_counter() - start), taken + 1
    return 2 * size**3 / best


class Counter:
    """Counts the operations of forward and backward, by torch's own formulas for each kind of operation.

    A batch of a new size runs under the counter, which looks on and changes no result; others are known by the counted
    one that is nearest in size, in proportion, which is exact for the same shape. What a technique leaves out (rows
    that are not trained) or does twice (activations computed anew) counts as it was in that first batch.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.looked = False
        """Whether the last batch ran under the counter, so that the time of its step says nothing."""
        self._known: dict[Shapes, int] = {}

    @contextmanager
    def counting(self, batch: Tensors) -> Iterator[None]:
        """Add the operations of forward and backward, which run inside, on `batch`."""
        shapes = tuple(value.shape for value in batch.values())
        self.looked = not self._covers(shapes)
        if not self.looked:
            yield
        else:
            with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as mode:
                yield
            self._known[shapes] = mode.get_total_flops()
        self.total += self._operations(shapes)

    def _covers(self, shapes: Shapes) -> bool:
        if shapes in self._known or len(self._known) >= SHAPES:
            return True
        return any(1 / NEAR < _elements(shapes) / _elements(known) < NEAR for known in self._known)

    def _operations(self, shapes: Shapes) -> float:
        if shapes in self._known:
            return self._known[shapes]
        size = _elements(shapes)
        nearest = min(self._known, key=lambda known: abs(math.log(_elements(known) / size)))
        return self._known[nearest] * size / _elements(nearest)


def _elements(shapes: Shapes) -> int:
    return max(1, sum(map(math.prod, shapes)))


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch has no types for it


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


_ON_CPU = {  # torch 2.13 knows the fused attention of accelerators alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
