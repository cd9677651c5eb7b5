"""What the memory plan has to know of a model and of this machine, found out before training begins.

Parameters are counted on torch's meta device, which has shapes and no memory. Activations cannot be: which positions a
model computes can depend on the data. So one forward of a real batch, the largest of a sample, runs on the host in the
precision of the training, and what it keeps for the backward is added up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway import config
from slipway.errors import ParamsError
from slipway.params import Params, TrainParams
from slipway.training import plan, rendezvous
from slipway.workloads.base import Task, Tensors, part

SAMPLED = 64  # batches of which the largest is taken


@dataclass(frozen=True)
class Survey:
    """The plan of a run."""

    model: plan.Model
    machine: plan.Machine
    rows: Sequence[plan.Row]


def survey(params: Params, data: Path) -> Survey:
    """Plan the training of `params` on the ingested `data`.

    Raises:
        DataError: the data are missing or too few.
    """
    train = params.train.model_copy(update={"zero": 0, "offload": "none"})  # a task may not depend on them
    task: Task = part(params.workload, "training").TASK(data, train, params.model)
    there = machine(train)
    model = size(task, train, _memory())
    return Survey(model, there, plan.rows(model, train.precision, there))


def resolve(params: Params, data: Path) -> TrainParams:
    """The training's params with `zero: auto` replaced by the cheapest setting that fits, and offload by its own.

    Raises:
        ParamsError: nothing fits; says what to change.
    """
    if params.train.zero != "auto":
        return params.train
    found = survey(params, data)
    chosen = plan.cheapest(found.rows)
    if chosen is None:
        raise plan.refuse(found.rows, found.machine)
    return params.train.model_copy(update={"zero": chosen.stage, "offload": chosen.offload})


def machine(train: TrainParams) -> plan.Machine:
    """This machine, or as many like it as there are nodes, with the device memory that is there or that params say."""
    import torch

    host = rendezvous.here().count * _memory()
    shared = train.device_memory_gb is None and not torch.cuda.is_available()
    if train.device_memory_gb is not None:
        device = int(train.device_memory_gb * 1e9)
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0).total_memory
    else:
        device = host // train.world_size
    home = config.home()
    disk = shutil.disk_usage(home if home.exists() else home.parent).free
    return plan.Machine(train.world_size, device, host, disk, shared)


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def size(task: Task, train: TrainParams, host: int) -> plan.Model:
    """Count a task's parameters and measure its activations, if the model fits into `host` bytes at all."""
    import torch

    with torch.device("meta"):
        meta = task.model()
    sizes = tuple(parameter.numel() for parameter in meta.parameters())
    elements = sum(sizes)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in meta.modules())
    room = 4 * elements < host / 4
    measured = activations(task.model(), _largest(task, train), train) if room else None
    return plan.Model(elements, largest, measured, sizes)


def activations(model: Any, batch: Tensors, train: TrainParams) -> int:
    """Bytes that a forward of `model` keeps for its backward: each storage once, parameters and the batch left out.

    Args:
        model: gives the loss; on the host, in fp32.
        batch: arrays by the names of its forward.
        train: the precision that it is run in.
    """
    import torch

    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[train.precision])
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    with Kept([*model.parameters(), *model.buffers(), *inputs.values()]) as kept:
        model(**inputs)
    return kept.size


class Kept:
    """Adds up what autograd keeps for the backward while it is entered, leaving out the storages of `known`."""

    def __init__(self, known: Sequence[Any]) -> None:
        import torch

        self._storages: dict[int, int] = {}
        self._held: list[Any] = []  # a storage that is freed could have its address taken by another
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self._storages.values())

    def _note(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        # At ZeRO 3 a parameter lies elsewhere while it is gathered; it is a parameter all the same.
        if storage.data_ptr() not in self._known and not hasattr(tensor, "ds_id"):
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._held.append(storage)
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._held.clear()


def _largest(task: Task, train: TrainParams) -> Tensors:
    batches = task.epoch(0, train.world_size)
    sampled = [batches[i] for i in range(0, len(batches), max(1, len(batches) // SAMPLED))]
    return max(sampled, key=lambda batch: sum(array.size for array in batch.values()))


def asked(params: Params, options: Mapping[str, str]) -> Params:
    """Set what the options of `--plan` ask for: devices, precision, memory (texts, as from a command line).

    Raises:
        ParamsError: a text is not allowed.
    """
    turned: dict[str, Any] = {}
    if "devices" in options:
        turned["world_size"] = _number(options, "devices")
    if "precision" in options:
        turned["precision"] = options["precision"]
    if "memory" in options:
        turned["device_memory_gb"] = _number(options, "memory", float)
    raw = params.train.model_dump() | {"zero": "auto"} | turned
    train = config.check(TrainParams, raw, Path("--plan"))
    return params.model_copy(update={"train": train})


def hypothetical(elements: str, params: Params) -> Survey:
    """Plan for a model of which only the number of parameters is known, such as 13e9.

    Memory is judged only where `train.device_memory_gb` is given: the devices are others than this machine's.

    Raises:
        ParamsError: `elements` is no number.
    """
    memory, train = params.train.device_memory_gb, params.train
    there = plan.Machine(train.world_size, int(memory * 1e9) if memory is not None else None)
    model = plan.Model(_number({"parameters": elements}, "parameters"), 0, None)
    return Survey(model, there, plan.rows(model, train.precision, there))


def _number(options: Mapping[str, str], key: str, kind: type = int) -> Any:
    try:
        value = kind(float(options[key]))
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise ParamsError(f"--{key}: must be a number over 0, such as 8 or 13e9, got {options[key]}")
    return value
