"""DeepSpeed's own collectives under the watch: their time is that of communication, and their bytes are counted.

Bytes are those that each process sends when a collective runs as a ring (Patarasuk and Yuan 2009): (N-1)/N of the whole
tensor, twice for an all-reduce. Gloo and NCCL may choose another algorithm; none sends less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed import ProcessGroup

from slipway.training import watch

ROUNDS = {
    "all_reduce": 2,
    "all_reduce_coalesced": 2,
    "reduce": 1,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_coalesced": 1,
    "all_to_all": 1,
    "all_to_all_single": 1,
    "broadcast": 1,
}
"""How often the ring carries the whole tensor."""


def observe() -> None:
    """Watch the collectives of DeepSpeed, which calls them through one object, from now on."""
    import deepspeed.comm.comm as backends  # engine.py imports DeepSpeed first, in its own way

    if not isinstance(backends.cdb, _Observed):
        backends.cdb = _Observed(backends.cdb)


class _Observed:
    """DeepSpeed's backend, with a look at each collective."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name in ROUNDS:
            found = partial(_collective, found, ROUNDS[name])
            setattr(self, name, found)
        return found


class _Work:
    """A collective that runs behind the caller; waiting for it is communication."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *arguments: Any) -> Any:
        with watch.part("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _collective(call: Callable[..., Any], rounds: int, *arguments: Any, **named: Any) -> Any:
    values = (*arguments, *named.values())
    ranks = torch.distributed.get_world_size(next((v for v in values if isinstance(v, ProcessGroup)), None))
    whole = max(map(_size, values), default=0)
    watch.sent(rounds * whole * (ranks - 1) / ranks)
    with watch.part("communication"):
        answer = call(*arguments, **named)
    return answer if answer is None or isinstance(answer, torch.Tensor) else _Work(answer)


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
