"""The engine's state as a copy in memory that a checkpoint is written from, and back, for any number of processes.

DeepSpeed hands each file that it would write to its checkpoint engine; ours copies the tensors instead, which is all
that training waits for. A checkpoint of ZeRO holds each process's share; for another number of processes it is first
converted to DeepSpeed's universal form, a file for each parameter (Lian et al. 2024, arXiv:2406.18820).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import slipway.training.engine  # noqa: F401  # first: it imports DeepSpeed with care

# isort: split
from deepspeed.checkpoint import UNIVERSAL_CHECKPOINT_INFO, ds_to_universal
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from slipway.errors import CheckpointError
from slipway.training.checkpoints import Files

TAG = "engine"  # DeepSpeed's name for a checkpoint: the folder of its files


class _Memory(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Keeps what DeepSpeed saves."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[Path, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Touch no disk."""

    def save(self, state_dict: Any, path: str) -> None:
        self.held[Path(path)] = copied(state_dict)


def take(engine: Any, folder: Path) -> Files:
    """Copy the state of this process's part of the engine; every process calls this.

    Args:
        engine: of DeepSpeed.
        folder: where the checkpoint will be written. Only optimizer state that is offloaded to disk is copied there at
            once, by DeepSpeed.
    """
    memory = engine.checkpoint_engine = _Memory()
    engine._copy_recovery_script = lambda _: None  # a script of DeepSpeed's that it would write beside
    engine.save_checkpoint(str(folder), TAG, client_state={UNIVERSAL_CHECKPOINT_INFO: {}}, save_latest=False)
    return {str(path.relative_to(folder)): partial(torch.save, state) for path, state in memory.held.items()}


def copied(item: Any) -> Any:
    """Copy a state to the host's memory: its containers, and its tensors without what they are views of."""
    if isinstance(item, torch.Tensor):
        return item.detach().to("cpu", copy=True)
    if type(item) in {dict, OrderedDict}:
        return type(item)((key, copied(value)) for key, value in item.items())
    if type(item) in {list, tuple}:
        return type(item)(copied(value) for value in item)
    return copy.deepcopy(item)


def restore(engine: Any, folder: Path) -> None:
    """Give the engine the state that `take` copied, or that `convert` made of it; every process calls this.

    Raises:
        CheckpointError: it belongs to another model.
    """
    try:
        engine.load_checkpoint(str(folder), TAG)
        if engine.load_universal_checkpoint():
            _restore_buffers(engine.module, folder / TAG)
    except (RuntimeError, KeyError, ValueError, AssertionError, OSError) as error:
        raise CheckpointError(f"{folder}: does not fit this model ({error}); remove it to start again") from error


def _restore_buffers(module: torch.nn.Module, folder: Path) -> None:
    """DeepSpeed leaves the buffers of a model, such as running means, out of the universal form: the same on all."""
    state = torch.load(min(folder.glob("*model_states.pt")), map_location="cpu", weights_only=False)
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name in state["buffer_names"]:
            buffers[name].copy_(state["module"][name])


def partitioned(folder: Path) -> bool:
    """Whether a checkpoint holds each process's share, so that only as many processes can load it."""
    return any((folder / TAG).glob("*_optim_states.pt"))


def convert(folder: Path, out: Path) -> None:
    """Convert a checkpoint to the universal form.

    Raises:
        CheckpointError: it has a form that DeepSpeed cannot convert.
    """
    options = argparse.Namespace(
        input_folder=str(folder / TAG),
        output_folder=str(out / TAG),
        num_extract_workers=1,  # more would be processes that import DeepSpeed first, which takes longer
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    said = io.StringIO()  # it prints, and shows bars
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(options)
    except Exception as error:
        logging.getLogger(__name__).warning("%s", said.getvalue())
        raise CheckpointError(
            f"{folder}: DeepSpeed cannot convert it for another number of processes ({type(error).__name__}: {error}); "
            "set train.world_size as it was, or remove the checkpoint to start again"
        ) from error
