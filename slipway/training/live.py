"""The figures of a run in MLflow while it trains, as live/KEY by step, in the run that `slipway.record` fills later.

They are sent by a thread of their own over MLflow's REST interface. Training never waits for it: without a server
nothing is sent, a slow one gets more at once, and what does not fit into the queue is dropped; the figures are in
reports/train.json anyway, and from there `record` adds what is missing. With a store that is a file there is no page to
look at, so it is left to `record`. Training outside of a pipeline run, which nobody records until its model is
registered, ends the run itself (`ended`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slipway import commands, store
from slipway.errors import TransientError

if TYPE_CHECKING:
    from slipway.training.meter import Sample

EVERY_S, AGAIN_S = 2.0, 20.0  # between two sends; until a server that did not answer is asked again
TIMEOUT_S, END_S = 10.0, 5.0  # of one call; how long the end of training waits for the last figures
QUEUE, BATCH = 2000, 40  # points that wait for a server; points of one call, of 25 figures at most (MLflow takes 1000)

Point = list[dict[str, Any]]
"""The figures of one step, as MLflow takes them."""

log = logging.getLogger(__name__)


@contextmanager
def ended(run: str) -> Iterator[None]:
    """End the MLflow run of `run`, if a server has it, with the block: FINISHED, FAILED or, if it was ended, KILLED."""
    status = "FAILED"
    try:
        with commands.interruptible():
            yield
        status = "FINISHED"
    except (KeyboardInterrupt, TransientError):
        status = "KILLED"
        raise
    finally:
        try:
            if (place := store.locate()).server:
                store.end(run, status, store.Rest(place.uri, TIMEOUT_S))
        except Exception as error:  # noqa: BLE001  # training has ended as it did, whatever ails the server
            log.warning("MLflow does not know that the run has ended, %s: %s", status, error)


class Live:
    """Sends figures to the MLflow run of the pipeline run `run`, which is made if there is none."""

    def __init__(self, run: str) -> None:
        """Begin, unless `run` is empty."""
        self._run, self._waiting = run, deque[Point](maxlen=QUEUE)
        self._sending: list[Point] = []
        self._ended = threading.Event()
        self._target: tuple[store.Rest, str] | None = None
        self._thread = threading.Thread(target=self._work, name="live", daemon=True)
        if run:
            self._thread.start()

    def tell(self, sample: Sample) -> None:
        """Hand over a sample of the meter; returns at once."""
        self.put("live", sample.step, sample.at_ms, {"seconds": sample.seconds, **sample.figures})

    def put(self, group: str, step: int, at_ms: int, figures: Mapping[str, float]) -> None:
        """Hand over figures, which become GROUP/KEY, of a step; returns at once."""
        self._waiting.append(
            [{"key": f"{group}/{k}", "value": v, "timestamp": at_ms, "step": step} for k, v in figures.items()]
        )

    def close(self) -> None:
        """Send what waits, for at most 5 s."""
        self._ended.set()
        if self._run:
            self._thread.join(END_S)

    def _work(self) -> None:
        told = False
        while True:
            last = self._ended.wait(EVERY_S if self._target or not told else AGAIN_S)
            try:
                self._send()
            except Exception as error:  # noqa: BLE001  # whatever ails the server, training goes on
                self._target = None
                log.log(logging.DEBUG if told else logging.WARNING, "MLflow does not get live figures: %s", error)
            told = told or self._target is None
            if last:
                return

    def _send(self) -> None:
        if self._target is None:
            place = store.locate()
            if not place.server:
                return
            rest = store.Rest(place.uri, TIMEOUT_S)
            mlflow_run = store.start(self._run, {}, rest)
            rest.update_run(mlflow_run, "RUNNING")  # it may have ended before: training goes on after it was killed
            self._target = rest, mlflow_run
            log.info("live figures: %s", store.address(self._target[1]))
        rest, mlflow_run = self._target
        while self._sending or self._waiting:
            while self._waiting and len(self._sending) < BATCH:
                self._sending.append(self._waiting.popleft())
            rows = [row for point in self._sending for row in point]
            try:
                rest.call("POST", "runs/log-batch", run_id=mlflow_run, metrics=rows)
            except store.StoreError:
                self._sending = []  # it would be refused again, and hold up all that come after
                raise
            self._sending = []
