"""When a run has gone wrong so far that going on would waste time, and what to say then.

A step is bad when its loss or the norm of its gradient is no finite number; that stops at once. The loss explodes when
for 20 steps on end it stands over 4 times the median of the last good 101 and over half of the first step's loss: noise
does neither for so long, and the loss of a model that has learnt little is no explosion. A step that fp16's loss
scaling skipped is no fault: the model did not change.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from slipway.errors import DivergedError
from slipway.params import TrainParams

FACTOR, START_SHARE, STEPS, WINDOW, FEW = 4.0, 0.5, 20, 101, 10


class Guard:
    """Looks at every step of one process; travels with the checkpoints."""

    def __init__(self, train: TrainParams) -> None:
        self._train = train
        self._first: float | None = None
        self._good: list[float] = []
        self._high = 0

    @property
    def calm(self) -> bool:
        """Whether nothing is suspicious, so that a checkpoint may be written."""
        return self._high == 0

    def check(self, step: int, loss: float, norm: float | None, skipped: bool) -> None:
        """Look at one step of this process.

        Args:
            step: its number, from 0.
            loss: this process's loss.
            norm: norm of the gradient of all processes, before it is clipped; None where it is not known.
            skipped: fp16's loss scaling left the model as it was.

        Raises:
            DivergedError: training has to stop; names the step and what to try.
        """
        if skipped:
            return
        if not math.isfinite(loss):
            raise self._stop(step - self._high, f"the loss is {loss} at step {step:,}")
        if norm is not None and not math.isfinite(norm):
            raise self._stop(
                step - self._high, f"the norm of the gradient is {norm} at step {step:,}, with a loss of {loss:.4g}"
            )
        if self._first is None:
            self._first = loss
        usual = statistics.median(self._good) if len(self._good) >= FEW else self._first
        if usual > 0 and loss > FACTOR * usual and loss > START_SHARE * self._first:
            self._high += 1
            if self._high >= STEPS:
                first = step - STEPS + 1
                raise self._stop(
                    first,
                    f"the loss explodes: at step {step:,} it is {loss:.4g}, and over {FACTOR:g} times the usual "
                    f"{usual:.4g} for {STEPS} steps, since step {first:,}",
                )
            return
        self._high = 0
        self._good = [*self._good[1 - WINDOW :], loss]

    def _stop(self, first: int, what: str) -> DivergedError:
        train, tries = self._train, [f"lower train.learning_rate (now {self._train.learning_rate:g})"]
        if train.precision != "fp32":
            tries.append(f"train.precision: fp32 (now {train.precision})")
        if train.sparse.share < 1 or "powersgd" in train.communication.method:
            tries.append("train.sparse.share: 1 and train.communication.method: flat")
        return DivergedError(
            f"training: {what}; try to {', or '.join(tries)}, and look for wild values in the data", first
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return {"first": self._first, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; a checkpoint is only written while all is calm."""
        self._first, self._good = state["first"], list(state["good"])
