"""A trace of a few steps that Perfetto (ui.perfetto.dev) and chrome://tracing open: what ran when, in every thread.

Written with `train.profile: true` to reports/train.trace.json.gz. It is no output of the DVC stage: it shows how a
machine did the work, not what came of it, so a stage that DVC restores has none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from slipway import artifacts
from slipway.training import watch

SKIPPED, WARMUP, RECORDED = 5, 2, 5  # steps: caches and allocators fill first, and the profiler's own start is slow

log = logging.getLogger(__name__)


@contextmanager
def recording(path: Path | None) -> Iterator[Callable[[], None]]:
    """Give what is to be called after every step; the trace is in `path` once 12 steps are done, or training ends.

    Args:
        path: ending in .json.gz; None: nothing is recorded.
    """
    if path is None:
        yield lambda: None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines say nothing of the training
    watch.mark(torch.profiler.record_function)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=SKIPPED, warmup=WARMUP, active=RECORDED, repeat=1),
        on_trace_ready=lambda profiler: _write(profiler, path),
        record_shapes=True,
    ) as profiler:
        yield profiler.step
    watch.mark(None)


def _write(profiler: torch.profiler.profile, path: Path) -> None:
    with artifacts.writing(path) as beside:
        packed = beside.with_name(f"{beside.name}.gz")  # the ending makes torch pack it
        profiler.export_chrome_trace(str(packed))
        packed.replace(beside)
    watch.mark(None)
    log.info("trace of %d steps: %s; open it at https://ui.perfetto.dev", RECORDED, path)
