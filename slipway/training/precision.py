"""Arithmetic of training: fp32, or bf16 and fp16 with fp32 master weights; fp16 with dynamic loss scaling.

DeepSpeed casts the model and keeps the masters. Its own loss scaler knows one factor for growth and back-off and grows
before the gradients of the step are unscaled, which halves that one step; so the scale is steered from here, after each
step, by Micikevicius et al. 2018, "Mixed precision training" (arXiv:1710.03740), section 3.2. The state lies in
DeepSpeed's own objects and travels with its checkpoints.
"""

from __future__ import annotations

import os
from typing import Any

from slipway.errors import ParamsError, SlipwayError
from slipway.params import LossScaleParams, TrainParams

FLOOR = 1.0  # least scale: gradients that overflow without any scaling do not come from scaling
EMULATE = "SLIPWAY_EMULATE_FP16"  # set to 1: fp16 also where the hardware has none; right and slow, to try things out


def check(train: TrainParams) -> None:
    """Refuse a precision that this machine's accelerator does not have.

    Raises:
        ParamsError: names the alternative.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if train.precision == "fp16" and not accelerator.is_fp16_supported():
        if os.environ.get(EMULATE) != "1":
            raise ParamsError(
                f"params.yaml: train.precision: fp16 is not supported by this machine's {accelerator.device_name()}; "
                "use bf16, which needs no loss scaling, or fp32"
            )
        accelerator.is_fp16_supported = lambda: True
    if train.precision == "bf16" and not accelerator.is_bf16_supported():
        raise ParamsError(
            f"params.yaml: train.precision: bf16 is not supported by this machine's {accelerator.device_name()}; "
            "use fp16 or fp32"
        )


def configuration(train: TrainParams) -> dict[str, Any]:
    """DeepSpeed's sections for the precision that was asked for."""
    return {"bf16": {"enabled": train.precision == "bf16"}, "fp16": {"enabled": train.precision == "fp16"}}


def steer(optimizer: Any, params: LossScaleParams) -> None:
    """Take over the loss scale of DeepSpeed's fp16 `optimizer`: update it after each step by `params`."""
    inner = optimizer.step
    _held(optimizer).cur_scale = params.initial

    def step(*arguments: Any, **named: Any) -> Any:
        answer = inner(*arguments, **named)
        update(_held(optimizer), bool(optimizer.overflow), params)
        return answer

    optimizer.step = step
    optimizer._update_scale = lambda *_: None


def update(held: Any, overflow: bool, params: LossScaleParams) -> None:
    """Back off after an overflow, grow after a window of steps without one.

    Args:
        held: has `cur_scale`, `cur_iter` (steps seen) and `last_overflow_iter` (-1: none yet).
        overflow: whether a gradient of this step was not finite.
        params: factors and window.

    Raises:
        SlipwayError: gradients overflow although the scale is at its least.
    """
    if overflow and held.cur_scale <= FLOOR:
        raise SlipwayError(
            f"training: gradients overflow at step {held.cur_iter} although the loss scale is down to "
            f"{held.cur_scale:g}; lower train.learning_rate, or use train.precision: bf16"
        )
    if overflow:
        held.cur_scale = max(FLOOR, held.cur_scale * params.backoff)
        held.last_overflow_iter = held.cur_iter
    elif (held.cur_iter - held.last_overflow_iter) % params.window == 0:
        held.cur_scale *= params.growth
    held.cur_iter += 1


def loss_scale(engine: Any) -> float | None:
    """Factor that the next loss is scaled by; None where nothing is scaled (fp32, bf16)."""
    return float(_held(engine.optimizer).cur_scale) if engine.fp16_enabled() else None


def overflowed(engine: Any) -> bool:
    """Whether the last step was skipped because a gradient overflowed under loss scaling (fp16 alone)."""
    return bool(engine.fp16_enabled() and engine.optimizer.overflow)


def _held(optimizer: Any) -> Any:
    # ZeRO's optimizers replace their scaler when a checkpoint is loaded, so it is looked up each time.
    return getattr(optimizer, "loss_scaler", None) or optimizer.loss_scale_config
