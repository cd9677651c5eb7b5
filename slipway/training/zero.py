"""ZeRO: parameters, gradients and optimizer state partitioned among the processes, and kept off the device.

Stages 0 to 3 are DeepSpeed's (Rajbhandari et al. 2020, arXiv:1910.02054), offload to the host too (Ren et al. 2021,
arXiv:2101.06840). DeepSpeed's own offload to disk needs an extension that is compiled against libaio; here the buffers
that it keeps on the host are moved into memory-mapped files, which the kernel pages in and out as they are used. The
files have no name: their space is free again when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipway.errors import SlipwayError
from slipway.params import TrainParams
from slipway.training import plan, sparse
from slipway.training.plan import Bytes, Places

Weights = dict[str, np.ndarray[Any, Any]]


def configuration(train: TrainParams, elements: int) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`.

    Args:
        train: stage and offload.
        elements: of all parameters; buckets are no larger.
    """
    assert train.zero != "auto"  # resolved before training begins
    bucket, live = plan.bucket(elements, train.zero), plan.live(elements, train.zero)
    section: dict[str, Any] = {
        "stage": train.zero,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_param_persistence_threshold": plan.KEPT_WHOLE,
        "stage3_prefetch_bucket_size": live // 2,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live // 2,
    }
    if train.offload != "none":
        # Mapped files cannot be pinned, and pinning is of use only to a device with memory of its own.
        place = {"device": "cpu", "pin_memory": train.offload == "cpu" and torch.cuda.is_available()}
        section["offload_optimizer"] = place
        if train.zero == 3:
            section["offload_param"] = place
    return section


def move_to_disk(engine: Any, folder: Path) -> None:
    """Move what DeepSpeed keeps on the host into memory-mapped files: optimizer state, and at stage 3 parameters.

    To be called again after a checkpoint was loaded, which replaces tensors; those already in files stay.

    Args:
        engine: with offload to the host.
        folder: on the disk that is to be used.

    Raises:
        SlipwayError: the disk is full.
    """
    optimizer = engine.optimizer
    for master in _masters(optimizer):
        _map(master, folder)
        state = optimizer.optimizer.state[master]
        if not state:  # AdamW's own first step would make it in memory
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (_mapped(master.shape, master.dtype, folder) for _ in range(2))
        _map(state["exp_avg"], folder)
        _map(state["exp_avg_sq"], folder)
    if engine.zero_optimization_stage() == 3:
        for index, flat in enumerate(optimizer.fp16_partitioned_groups_flat):
            _map(flat, folder)
            optimizer._unflatten_partitioned_parameters(index)  # the parameters' shards are views of it
        optimizer.param_groups_fp16_flat_cpu_memory.clear()


def _mapped(shape: Iterable[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Make a tensor of zeros in a file without a name."""
    shape = tuple(shape)
    size = max(1, int(np.prod(shape)) * dtype.itemsize)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a hole that cannot be filled later would be a SIGBUS
        except OSError as error:
            raise SlipwayError(
                f"{folder}: no room for {size / 1e9:.2f} GB of training state ({error.strerror}); free some space, or "
                "set train.offload to cpu"
            ) from error
        storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size)
    empty: Tensor = torch.empty(0, dtype=dtype)
    return empty.set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]  # the stub knows no storages


def _map(tensor: Tensor, folder: Path) -> None:
    if not on_disk(tensor):
        mapped = _mapped(tensor.shape, tensor.dtype, folder)
        mapped.copy_(tensor.detach())
        tensor.data = mapped


def on_disk(tensor: Tensor) -> bool:
    """Whether the tensor lies in a memory-mapped file."""
    return tensor.untyped_storage().filename is not None


def _masters(optimizer: Any) -> list[Tensor]:
    """The fp32 masters of this process."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [master for group in getattr(optimizer, "fp32_groups", []) for master in group]


def weights(engine: Any) -> Weights:
    """The whole model as float32 arrays by name, on rank 0, nothing on the others; every process calls this.

    At stage 3 one parameter at a time is gathered.
    """
    import deepspeed

    lead = engine.global_rank == 0
    found: Weights = {}
    for name, value in sparse.without_rows(engine.module):
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            if lead:
                found[name] = value.detach().float().cpu().numpy().copy()
    return found


@contextmanager
def evaluating(engine: Any) -> Iterator[torch.nn.Module]:
    """The module for validation: no gradients, no dropout; at stage 3 its parameters are gathered as they are read.

    DeepSpeed gathers a parameter that a module reads outside its own forward (a tied embedding) only in the engine's
    forward; a workload's validation calls other methods as well.
    """
    module: torch.nn.Module = engine.module
    module.eval()
    try:
        with torch.no_grad(), _gathering(engine) if engine.zero_optimization_stage() == 3 else nullcontext():
            yield module
    finally:
        module.train()


@contextmanager
def _gathering(engine: Any) -> Iterator[None]:
    from deepspeed.runtime.zero import parameter_offload

    def told(reading: bool) -> None:
        for module in engine.module.modules():
            parameter_offload.ensure_zero_ordered_dict(module)
            module._parameters._in_forward = reading

    told(True)
    parameter_offload.FWD_MODULE_STACK.append(engine.module)
    try:
        yield
    finally:
        told(False)
        parameter_offload.FWD_MODULE_STACK.pop()
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        coordinator.release_and_reset_all(engine.module)
        coordinator.reset_step()


def state_bytes(engine: Any) -> Places:
    """Bytes of this process's model state, from the tensors themselves; best between backward and step.

    A storage counts once, as what it was met as first. Offloaded state counts as host or disk also where the device is
    a CPU, whose memory is the host's.
    """
    optimizer, seen = engine.optimizer, set[int]()
    away = getattr(optimizer, "offload_optimizer", getattr(optimizer, "cpu_offload", False))
    sizes = {place: dict.fromkeys((field.name for field in fields(Bytes)), 0) for place in ("device", "host", "disk")}

    def add(kind: str, tensors: Iterable[Any], offloaded: bool) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                place = "disk" if on_disk(tensor) else "host" if offloaded else "device"
                sizes[place][kind] += storage.nbytes()

    module, inner = engine.module, getattr(optimizer, "optimizer", optimizer)
    masters = _masters(optimizer)
    add("gradients", [p.grad for p in module.parameters()], False)
    add("gradients", _gradients(optimizer), away)
    add("gradients", [master.grad for master in masters], away)
    add("buffers", _buckets(optimizer), False)
    partitioned = [p for p in module.parameters() if hasattr(p, "ds_tensor")]
    add("parameters", [p.ds_tensor for p in partitioned], getattr(optimizer, "offload_param", False))
    add("buffers", [p.data for p in partitioned], False)  # gathered at this moment
    add("parameters", [*module.parameters(), *module.buffers()], False)
    add("optimizer", masters, away)
    add("optimizer", [value for state in inner.state.values() for value in state.values()], away)
    add("buffers", getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", []), away)
    return Places(*(Bytes(**sizes[place]) for place in ("device", "host", "disk")))


def _gradients(optimizer: Any) -> Iterator[Any]:
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)
    averaged = getattr(optimizer, "averaged_gradients", {})
    for group in averaged.values():
        yield from group or []
    yield from getattr(optimizer, "fp32_groups_gradients_flat", [])


def _buckets(optimizer: Any) -> Iterator[Any]:
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        yield from bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
