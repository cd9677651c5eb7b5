"""ZeRO, the memory plan and precision: what is held where, what it costs, and that the losses stay what they were.

    python -m benchmarks.zero [--json FILE] [--worlds 1 2 4]

Trains the ranker's first steps at every ZeRO stage, with and without offload, on the same data and seed; counts the
bytes of the tensors themselves (between backward and step, and as AdamW steps); then trains two runs in fp16, one with
an overflow. On CPU processes here: offload frees no memory of theirs, but everything else is as on a GPU. fp16 is
emulated where the hardware has none. Takes about 2 minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ranker
from benchmarks.claims import Claim, tell
from slipway.params import TrainParams
from slipway.training import loop, plan, precision, processes, survey, trainer
from slipway.training.plan import Places
from slipway.workloads.base import part
from slipway.workloads.ranker.params import RankerParams

RESULT = Path(__file__).parent / "results" / "zero.json"
MODEL = RankerParams(width=256, blocks=4, max_length=32, dropout=0.1, negatives=128)
TINY = RankerParams(width=16, blocks=1, max_length=8, dropout=0.2, negatives=16)
STEPS, BATCH = 4, 32
GB, GIB = 1e9, 2**30
LARGE, DEVICES = 13_000_000_000, 8

Setting = tuple[int, str, str]
STAGES: list[Setting] = [(stage, "none", "fp32") for stage in range(4)]
OFFLOADED: list[Setting] = [(1, "cpu", "fp32"), (2, "cpu", "fp32"), (3, "cpu", "fp32"), (2, "disk", "fp32")]
OFFLOADED += [(3, "disk", "fp32")]
HALVES: list[Setting] = [(0, "none", "bf16"), (0, "none", "fp16"), (3, "none", "bf16"), (3, "cpu", "bf16")]


@dataclass(frozen=True)
class Found:
    """What one setting did."""

    losses: list[float]
    """Mean over the processes."""
    between: Places
    """Between backward and step, on the rank that holds most."""
    updating: Places
    """As AdamW steps."""
    activations: int
    step_ms: float
    """Median; the settings of a world take turns step by step."""
    sizes: list[int]
    """Elements of each parameter."""


def write(folder: Path, users: int, items: int, events: int) -> Path:
    """Ingest histories in which every item is followed by the next, mostly."""
    rng, rows = np.random.default_rng(0), []
    for user in range(users):
        item = int(rng.integers(items))
        for _ in range(events):
            item = int(rng.integers(items)) if rng.random() < 0.1 else (item + 1) % items
            rows.append(f"{user} {item}")
    text = folder / "events.txt"
    folder.mkdir(parents=True)
    text.write_text("\n".join(rows))
    ranker.ingest(text, folder / "data")
    return folder / "data"


def _train(rank: int, world_size: int, meeting: str, folder: Path, settings: Sequence[Setting]) -> dict[Setting, Found]:
    """Take the first steps under every setting, in turns."""
    import torch

    from slipway.training import engine

    os.environ[precision.EMULATE] = "1"
    engine.join(rank, world_size, meeting)
    found: dict[Setting, Any] = {}
    for setting in settings:
        train = TrainParams.model_validate(
            dict(zip(("zero", "offload", "precision"), setting, strict=True))
            | {"world_size": world_size, "batch_size": BATCH}
        )
        torch.manual_seed(1)
        task = part("ranker", "training").TASK(folder, train, MODEL)
        model, seen = task.model(), list[Places]()
        sizes = [parameter.numel() for parameter in model.parameters()]
        made = engine.make(model, train, folder.parent / "disk")
        inner = getattr(made.optimizer, "optimizer", made.optimizer)
        inner.register_step_pre_hook(lambda *_, made=made, seen=seen: seen.append(engine.state_bytes(made)))
        found[setting] = {
            "engine": made,
            "updating": seen,
            "batches": task.epoch(0, world_size),
            "sizes": sizes,
            "losses": [],
            "ms": [],
        }
    for step in range(STEPS):
        for each in found.values():
            made = each["engine"]
            batch = {n: torch.from_numpy(v) for n, v in each["batches"][rank].items()}
            torch.manual_seed(step)
            with survey.Kept([*made.module.parameters(), *batch.values()]) as kept:
                began = time.perf_counter()
                loss = made(**batch)
            made.backward(loss)
            spent = time.perf_counter() - began
            each["between"], each["activations"] = engine.state_bytes(made), kept.size
            began = time.perf_counter()
            made.step()
            each["ms"].append((spent + time.perf_counter() - began) * 1e3)
            torch.distributed.all_reduce(loss := loss.detach().clone())
            each["losses"].append(float(loss) / world_size)
    return {
        setting: Found(
            each["losses"],
            _most(each["between"], world_size),
            _most(each["updating"][-1], world_size),
            each["activations"],
            statistics.median(each["ms"][1:]),
            each["sizes"],
        )
        for setting, each in found.items()
    }


def _most(places: Places, world_size: int) -> Places:
    """Of all ranks the one that holds most."""
    import torch

    found = [places] * world_size
    torch.distributed.all_gather_object(found, places)
    return max(found, key=lambda each: each.device.state + each.host.state + each.disk.state)


def _scaled(rank: int, world_size: int, meeting: str, job: loop.Job) -> loop.State:
    os.environ[precision.EMULATE] = "1"
    return trainer.Trainer(rank, world_size, meeting, job).run()


def overflow(folder: Path) -> dict[str, loop.State]:
    """Train in fp16 undisturbed, and with a scale that is raised 2^16-fold after 12 steps."""
    ingested, states = write(folder, 400, 30, 10), {}
    for name, scale in {
        "undisturbed": {"initial": 2.0**12, "window": 10_000},
        "overflow": {"initial": 2.0**12, "growth": 2.0**16, "window": 12},
    }.items():
        train = TrainParams.model_validate(
            {"precision": "fp16", "zero": 2, "world_size": 1, "batch_size": 16, "epochs": 2, "learning_rate": 0.01}
            | {"loss_scale": scale, "checkpoint_every_s": 1e6}
        )
        job = loop.Job("ranker", ingested, train, TINY, folder / name / "checkpoints", folder / name / "out")
        states[name] = processes.run(1, _scaled, job)
    return states


def claims(found: dict[int, dict[Setting, Found]], states: dict[str, loop.State]) -> list[Claim]:
    """Make the rows of the table.

    Args:
        found: what each setting did, by world size; the largest has them all.
        states: of the runs in fp16.
    """
    return [
        _share(found),
        _losses(found),
        _offload(found),
        _planned(found),
        _large(),
        *_precision(found),
        _rise(states),
    ]


def _share(found: dict[int, dict[Setting, Found]]) -> Claim:
    held = {n: each[3, "none", "fp32"].updating.device.state for n, each in found.items()}
    alone, most = held[min(held)], max(held)
    worst = max(abs(held[n] * n / (alone * min(held)) - 1) for n in held)
    return Claim(
        "ZeRO 3: model state a rank falls as 1/N",
        "1/N within 5 %",
        f"{plan.told(alone)} at N = {min(held)}",
        ", ".join(f"{plan.told(size)} at {n}" for n, size in held.items()) + f"; off by {worst:.1%} at most",
        alone / held[most],
        worst <= 0.05,
    )


def _losses(found: dict[int, dict[Setting, Found]]) -> Claim:
    worst, count = 0.0, 0
    for each in found.values():
        plain = each[0, "none", "fp32"].losses
        for (_, _, kind), other in each.items():
            if kind == "fp32":
                worst = max(worst, *(abs(a / b - 1) for a, b in zip(other.losses, plain, strict=True)))
                count += 1
    return Claim(
        "losses equal plain data parallel, every stage and offload (fp32)",
        "equal",
        "stage 0",
        f"{count} runs; largest relative difference {worst:.1e}, while the loss went from "
        f"{plain[0]:.3f} to {plain[-1]:.3f}",
        1.0,
        worst < 1e-5 and plain[-1] < plain[0],
    )


def _offload(found: dict[int, dict[Setting, Found]]) -> Claim:
    each = found[max(found)]
    plain, cpu, disk = (each[3, place, "fp32"] for place in ("none", "cpu", "disk"))
    off, filed = cpu.updating, disk.updating
    return Claim(
        f"offload at ZeRO 3, N = {max(found)}: state on the device, and its cost in step time",
        "state off the device",
        f"{plan.told(plain.updating.device.state)}, {plain.step_ms:.0f} ms",
        f"cpu {plan.told(off.device.state)} (host {plan.told(off.host.state)}), {cpu.step_ms:.0f} ms; disk "
        f"{plan.told(filed.device.state)} (disk {plan.told(filed.disk.state)}), {disk.step_ms:.0f} ms",
        plain.step_ms / cpu.step_ms,
        cpu.updating.device.state == 0 and disk.updating.device.state == 0,
    )


def _planned(found: dict[int, dict[Setting, Found]]) -> Claim:
    """Largest difference of planned and measured state, in all places, and of activations."""
    worst, count = 0.0, 0
    for n, each in found.items():
        sizes = tuple(each[0, "none", "fp32"].sizes)
        for (stage, offload, kind), one in each.items():
            planned = plan.places(plan.Model(sum(sizes), 0, None, sizes), kind, n, stage, offload)
            for place in ("device", "host", "disk"):
                held, wanted = getattr(one.updating, place), getattr(planned, place)
                before, state = getattr(one.between, place).gradients, held.state
                if stage in (1, 2):  # gradients are freed or, in 16 bits, dropped for their fp32 copy just before
                    state += before if kind != "fp32" else max(0, before - held.gradients)
                if wanted.state:
                    worst = max(worst, abs(state / wanted.state - 1))
                    count += 1
    return Claim(
        "the plan against tensor bytes at run time",
        "within 5 %",
        "planned",
        f"{count} sizes of {sum(map(len, found.values()))} runs; largest difference {worst:.1%}",
        1.0,
        worst <= 0.05,
    )


def _large() -> Claim:
    model = plan.Model(LARGE, 0, None)
    planned = {
        (row.stage, row.offload): row.places.device.state for row in plan.rows(model, "bf16", plan.Machine(DEVICES))
    }
    plain, parted, away = planned[0, "none"], planned[3, "none"], planned[2, "cpu"]
    reading = f"{4 * LARGE / GIB:.1f} GiB is 4 bytes a parameter, {LARGE / GIB:.1f} GiB that over 4 devices"
    return Claim(
        "plan: 13 billion parameters on 8 devices, mixed precision",
        f"48 -> 12 GB, 4.0 times less (setting not published; {reading})",
        f"ZeRO 0: {plain / GB:.0f} GB a device (208 between steps)",
        f"ZeRO 3: {parted / GB:.1f} GB (26 between steps); ZeRO 2 with the optimizer on the host {away / GB:.0f} GB; "
        "ZeRO 3 with offload: buffers alone",
        plain / parted,
        plain / parted >= 4,
    )


def _precision(found: dict[int, dict[Setting, Found]]) -> list[Claim]:
    each, rows = found[max(found)], []

    def held(one: Found) -> tuple[int, int]:
        moving = one.between.device.parameters + one.between.device.gradients + one.activations
        return moving, moving + one.between.device.optimizer

    plain, all_plain = held(each[0, "none", "fp32"])
    for kind in ("bf16", "fp16"):
        half, all_half = held(each[0, "none", kind])
        rows.append(
            Claim(
                f"{kind}: memory of parameters, gradients and activations",
                "-50 %",
                f"fp32 {plan.told(plain)} ({plan.told(all_plain)} with the optimizer)",
                f"{plan.told(half)} ({plan.told(all_half)} with masters): {half / plain - 1:+.0%}",
                plain / half,
                half / plain <= 0.505,
            )
        )
    return rows


def _rise(states: dict[str, loop.State]) -> Claim:
    calm, disturbed = states["undisturbed"], states["overflow"]
    skipped = [change for change in disturbed.loss_scale if change.overflow]
    scales = [change.scale for change in disturbed.loss_scale]
    halved = all(
        after.scale == before.scale / 2
        for before, after in zip(disturbed.loss_scale, disturbed.loss_scale[1:], strict=False)
        if after.overflow
    )
    return Claim(
        "fp16 (emulated): overflows skip their step and halve the scale; training recovers",
        "recovers",
        f"undisturbed: NDCG@10 {calm.best.metric:.3f}",
        f"{len(skipped)} steps skipped, scale 2^{np.log2(max(scales)):.0f} down to 2^{np.log2(skipped[-1].scale):.0f}; "
        f"NDCG@10 {disturbed.best.metric:.3f}",
        disturbed.best.metric / calm.best.metric,
        halved and len(skipped) > 0 and disturbed.best.metric >= 0.9 * calm.best.metric,
    )


def measure(folder: Path, worlds: Sequence[int]) -> tuple[dict[int, dict[Setting, Found]], dict[str, loop.State]]:
    """Train everything."""
    ingested, found = write(folder / "large", 400, 4000, 40), {}
    for n in worlds:
        settings = STAGES + OFFLOADED + (HALVES if n == max(worlds) else [])
        found[n] = processes.run(n, _train, ingested, settings)
    return found, overflow(folder / "small")


def main() -> None:
    """Measure, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, states = measure(Path(folder), options.worlds)
    for n, each in found.items():
        for (stage, offload, kind), one in each.items():
            device, away = one.updating.device, one.updating
            print(
                f"N={n} zero={stage} offload={offload:4} {kind}: device {plan.told(device.state):>8}, host "
                f"{plan.told(away.host.state):>8}, disk {plan.told(away.disk.state):>8}, {one.step_ms:5.0f} ms a step"
            )
    tell("ZeRO, plan, precision", "python -m benchmarks.zero", claims(found, states), options.json)
    saved = json.loads(options.json.read_text())
    saved["runs"] = [
        {"world_size": n, "zero": stage, "offload": offload, "precision": kind, **asdict(one)}
        for n, each in found.items()
        for (stage, offload, kind), one in each.items()
    ]
    options.json.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    main()
