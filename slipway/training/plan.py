"""The memory plan: what each ZeRO stage, with and without offload, needs of a device, and the cheapest one that fits.

Follows the byte layout of DeepSpeed with torch's AdamW as it is measured at run time, an element of a parameter being
w = 4 bytes in fp32 and w = 2 in bf16 and fp16:

    parameters   w
    gradients    w, and 4 more for the fp32 copy that AdamW reads (16-bit, and stage 3)
    optimizer    12: fp32 master and two moments; 8 where the parameters are their own masters (fp32 at stage 0)

Stage 1 and 2 divide gradients and optimizer state by the number of devices (a step is one micro-batch, so stage 1 keeps
no more gradients than stage 2), stage 3 parameters as well (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rich.table import Table

from slipway.errors import ParamsError

BUCKET = 2**26  # most elements of a gradient bucket: 256 MB in fp32
LEAST_BUCKET = 2**20
KEPT_WHOLE = 10_000  # parameters with fewer elements than this, such as norms, are not worth a gather
USABLE = 0.9  # share of a memory that tensors can have: the rest is fragments, kernels, and the interpreter

# From the cheapest: each later one moves more over the network (stage 3: half as much again), then over the bus (the
# host updates the optimizer's share), then to and from the disk.
SETTINGS = tuple(
    (stage, offload) for offload in ("none", "cpu", "disk") for stage in range(4) if stage or offload == "none"
)


@dataclass(frozen=True)
class Bytes:
    """Bytes of one process in one place."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    """fp32 masters and AdamW's two moments."""
    buffers: int = 0
    """Buckets that gradients travel in, and layers that are gathered for their turn."""
    activations: int = 0

    @property
    def state(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.buffers + self.activations


@dataclass(frozen=True)
class Places:
    """Bytes of one process by where they lie."""

    device: Bytes
    host: Bytes = Bytes()
    disk: Bytes = Bytes()


@dataclass(frozen=True)
class Model:
    """What the plan has to know of a model."""

    parameters: int
    """Elements."""
    largest: int
    """Elements of the largest layer: what stage 3 has to gather at once."""
    activations: int | None
    """Bytes that one micro-batch's forward keeps for its backward; None: not known."""
    sizes: tuple[int, ...] = ()
    """Elements of each parameter, in the model's order; empty: not known."""


@dataclass(frozen=True)
class Machine:
    """What there is; memory that is not known is not judged."""

    devices: int
    device: int | None = None
    """Bytes of one device."""
    host: int | None = None
    """Bytes of the host, for all its devices."""
    disk: int | None = None
    """Bytes free on the disk, for all devices."""
    shared: bool = False
    """The devices are the host's own CPUs: their memory is the host's."""


@dataclass(frozen=True)
class Row:
    """One setting."""

    stage: int
    offload: str
    places: Places
    """Of each device."""
    fits: bool | None
    """None: the memory is not known."""


def bucket(elements: int, stage: int) -> int:
    """Elements of a gradient bucket, even: as few as pay from stage 2 on, because they are memory that stays."""
    most = min(BUCKET, elements if stage < 2 else max(LEAST_BUCKET, elements // 8), elements)
    return most + most % 2


def live(elements: int, stage: int) -> int:
    """Elements that stage 3 may gather ahead of their use, beside the layer in use."""
    return bucket(elements, stage) // 4


def places(model: Model, precision: str, devices: int, stage: int, offload: str) -> Places:
    """Bytes of one device under one setting, and of its share of host and disk.

    Args:
        model: its size.
        precision: fp32, bf16 or fp16.
        devices: number of processes.
        stage: 0..3.
        offload: none, cpu or disk; other than none from stage 1 on.
    """
    width = 4 if precision == "fp32" else 2
    elements, share = model.parameters, -(-model.parameters // devices)
    whole, activations = width * elements, model.activations or 0
    copy = 4 if width == 2 or stage == 3 else 0
    if stage == 0:
        optimizer = (8 if width == 4 else 12) * elements
        return Places(Bytes(whole, (width + copy) * elements, optimizer, 0, activations))
    moving = width * bucket(elements, stage)
    if stage == 3:
        moving += width * min(elements, model.largest + live(elements, stage))
        parameters, gradients = width * share, (width + copy) * share
    else:
        parameters, gradients = whole, (width + copy) * share
        gradients += width * (_touched(model.sizes, devices) - share if model.sizes else 0)
    if offload == "none":
        return Places(Bytes(parameters, gradients, 12 * share, moving, activations))
    kept = Bytes(parameters if stage < 3 else 0, 0, 0, moving, activations)
    if stage == 3:
        host, apart = Bytes(parameters, gradients, 12 * share), Bytes(parameters, 0, 12 * share)
    else:  # the host sums in fp32, and keeps the updated parameters on their way back
        host, apart = Bytes(0, 4 * share, 12 * share, width * share), Bytes(0, 0, 12 * share)
    if offload == "cpu":
        return Places(kept, host)
    return Places(kept, Bytes(0, host.gradients, 0, host.buffers), apart)


def _touched(sizes: Sequence[int], devices: int) -> int:
    """Most elements of the parameters that one device's share lies in: a gradient is kept whole for a part of it."""
    ends = list(accumulate(sizes))
    share = -(-ends[-1] // devices)
    shares = [(rank * share, min((rank + 1) * share, ends[-1])) for rank in range(devices)]
    return max(
        sum(size for size, end in zip(sizes, ends, strict=True) if end > first and end - size < last)
        for first, last in shares
    )


def rows(model: Model, precision: str, machine: Machine) -> list[Row]:
    """Every setting, the cheapest first."""
    found = []
    for stage, offload in SETTINGS:
        planned = places(model, precision, machine.devices, stage, offload)
        found.append(Row(stage, offload, planned, _fits(planned, machine)))
    return found


def cheapest(planned: Iterable[Row]) -> Row | None:
    """The first setting that fits."""
    return next((row for row in planned if row.fits), None)


def _fits(planned: Places, machine: Machine) -> bool | None:
    on_host = planned.host.total + (planned.device.total if machine.shared else 0)
    asked = [
        (planned.device.total, machine.device),
        (on_host * machine.devices, machine.host),
        (planned.disk.total * machine.devices, machine.disk),
    ]
    if machine.device is None:
        return None
    return all(there is None or needed <= USABLE * there for needed, there in asked)


def refuse(planned: Sequence[Row], machine: Machine) -> ParamsError:
    """The error to raise when nothing fits: says what comes nearest, and what to change."""
    least = min(planned, key=lambda row: row.places.device.total)
    return ParamsError(
        f"params.yaml: train.zero: no setting fits {told(machine.device or 0)} a device (of which "
        f"{USABLE:.0%} can be used): the smallest, zero: {least.stage} with offload: {least.offload}, needs "
        f"{told(least.places.device.total)} on a device, {told(least.places.host.total * machine.devices)} on the host "
        f"and {told(least.places.disk.total * machine.devices)} on disk; take more devices (train.world_size), a "
        "smaller train.batch_size, train.precision: bf16, or a smaller model"
    )


def table(planned: Sequence[Row], model: Model, precision: str, machine: Machine) -> Table:
    """The plan for people; the setting that `auto` takes is marked."""
    chosen, each = cheapest(planned), "a device" if machine.devices > 1 else "the device"
    title = f"{model.parameters:,} parameters, {precision}, {machine.devices} device(s)"
    title += f" of {told(machine.device)}" if machine.device else ""
    found = Table(title=f"Memory plan: {title}")
    for name in ("zero", "offload", "parameters", "gradients", "optimizer", "buffers", "activations"):
        found.add_column(name, justify="left" if name == "offload" else "right")
    for name in (each, "host", "disk", "fits"):
        found.add_column(name, justify="right")
    for row in planned:
        device, mark = row.places.device, " <" if row is chosen else ""
        columns = [told(v) for v in (device.parameters, device.gradients, device.optimizer, device.buffers)]
        columns.append("?" if model.activations is None else told(device.activations))
        away = [told(there.total * machine.devices) for there in (row.places.host, row.places.disk)]
        fits = {None: "?", True: "yes", False: "no"}[row.fits] + mark
        style = "bold" if row is chosen else None
        found.add_row(str(row.stage), row.offload, *columns, told(device.total), *away, fits, style=style)
    return found


def notes(model: Model, precision: str, machine: Machine) -> list[str]:
    """What stands under the table: how to read it."""
    lines = [
        "buffers: gradient buckets, and at zero 3 the layers gathered for their turn; host and disk: of all devices"
    ]
    if model.activations is None:
        lines.append("activations are not known, and come on top")
    if machine.shared:
        lines.append("the devices are this host's CPUs, so offload to cpu frees nothing")
    if machine.device is None:
        lines.append("nothing is judged without the memory of a device: --memory GB, or train.device_memory_gb")
    if precision != "fp32":
        whole = 16 * model.parameters
        lines.append(
            f"between two steps 16 bytes a parameter are held, {told(whole)}, of which a device has "
            f"{told(whole // machine.devices)} when all is partitioned; the fp32 gradient that the step reads adds 4"
        )
    return lines


def told(size: int) -> str:
    """A size for people, in powers of ten."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B" if size else "0"
