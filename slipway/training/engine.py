"""The DeepSpeed engine, made so that nothing is compiled: on a machine without a compiler, or on its first run."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._dynamo  # DeepSpeed would import it in every process

from slipway.params import TrainParams
from slipway.training import collectives, precision, zero
from slipway.training.precision import loss_scale as loss_scale  # the engine's questions, in one place
from slipway.training.precision import overflowed as overflowed
from slipway.training.zero import evaluating as evaluating
from slipway.training.zero import state_bytes as state_bytes
from slipway.training.zero import weights as weights

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
_blocked = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
import deepspeed  # noqa: E402  # its auto-tuner imports MLflow, 6 s of it, for a feature that is not used: hence above
from deepspeed.runtime.utils import clip_grad_norm_  # noqa: E402

if _blocked:
    del sys.modules["mlflow"]

T = TypeVar("T")

CLIP = 1.0  # largest norm of the gradient


def join(rank: int, world_size: int, meeting: str) -> None:
    """Join the process group, with this process's share of the node's cores.

    Args:
        rank: this process.
        world_size: number of processes.
        meeting: URL through which the processes find one another.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's own calls
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Without this DeepSpeed compiles an all-reduce over shared memory (90 s) that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        auto_mpi_discovery=False, init_method=meeting, rank=rank, world_size=world_size, verbose=False
    )
    collectives.observe()


def exchange() -> Callable[[T], list[T]]:
    """Make a function that gives each process what all of them gave it, for a thread beside the training."""
    group = torch.distributed.new_group(backend="gloo")  # of its own: the training's is busy

    def gathered(mine: T) -> list[T]:
        told: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, mine, group)
        return told

    return gathered


def make(model: torch.nn.Module, train: TrainParams, disk: Path, universal: bool = False) -> Any:
    """Wrap `model` in a DeepSpeed engine with ZeRO and the precision that were asked for; `join` comes before.

    Args:
        model: the module, whose forward gives the loss.
        train: precision, ZeRO stage, weight decay, batch size.
        disk: folder that offload to disk makes its files in.
        universal: whether the checkpoint that it will load is in DeepSpeed's universal form.

    Raises:
        ParamsError: the accelerator does not have the precision.
    """
    precision.check(train)
    # torch's own AdamW: DeepSpeed's would be compiled at its first use (194 s).
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=(0.9, 0.98), weight_decay=train.weight_decay
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": train.batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "zero_optimization": zero.configuration(train, sum(p.numel() for p in model.parameters())),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its CPUAdam would be compiled, too
            **precision.configuration(train),
            "checkpoint": {"load_universal": universal},
            "steps_per_print": sys.maxsize,
        },
    )
    engine.clip_fp32_gradients = partial(_clip, engine)
    if train.precision == "fp16":
        precision.steer(engine.optimizer, train.loss_scale)
    settle(engine, train, disk)
    return engine


def _clip(engine: Any) -> None:
    """Clip as DeepSpeed does at ZeRO 0 in fp32, and keep the norm as it does everywhere else."""
    engine._global_grad_norm = clip_grad_norm_(parameters=engine.module.parameters(), max_norm=CLIP)


def gradient_norm(engine: Any) -> float | None:
    """Norm of the gradient of the last step, before it was clipped; None where DeepSpeed was told not to compute it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def settle(engine: Any, train: TrainParams, disk: Path) -> None:
    """Put the engine's tensors where they belong; also after a checkpoint was loaded, which makes new ones."""
    if train.offload == "disk":
        zero.move_to_disk(engine, disk)
