"""How gradients are averaged among the processes: as little as possible goes over the slow link, between the nodes.

    flat                    each process with all others: DeepSpeed's own reduction
    hierarchical            averaged inside each node, then among the nodes' first processes, then handed out inside
    powersgd                compressed, among all processes
    hierarchical_powersgd   averaged inside each node, then compressed among the first processes, then handed out
    auto                    hierarchical, and compressed where a trial in the first steps shows that it pays

All but flat work at ZeRO 0, where the engine leaves whole gradients; from ZeRO 1 on its optimizer reduces them itself.
Which process is on which node is in nodes.py; what is sent when it is compressed in compressor.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipway.params import CommunicationParams, TrainParams
from slipway.training import precision, rows
from slipway.training.compressor import Compressor, Message, Plan, awaited, decode, plan
from slipway.training.nodes import Links, Nodes, discover
from slipway.training.powersgd import SHARE, pack, unpack

TRIALS = 5  # steps in which `auto` times both ways, after a first one that opens the connections
PAYS = 1.1  # compression loses something, so it has to make a step this much faster

log = logging.getLogger(__name__)


@dataclass
class Trial:
    """What `auto` measured so far."""

    seconds: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each step: without its reduction, the reduction as it is, and compressed."""
    ended: float | None = None
    """When the last one ended."""


class Reducer:
    """Averages gradients in place.

    Its memory and counts are what `state_dict` gives; a run that goes on from there does as if it had never stopped.
    With `auto`, what is chosen depends on time, but once chosen it stays so when the run is killed and goes on.
    """

    def __init__(self, links: Links, told: CommunicationParams, device: torch.device) -> None:
        self.links, self.rank, self.warmup, self.device = links, told.rank, told.warmup_steps, device
        self.hierarchical = told.method not in ("flat", "powersgd")
        self.saves = links.where.saves if self.hierarchical else 1.0
        self.share = SHARE / self.saves  # of flat's traffic the leaders' own is less already
        self.compresses: bool | None = None if told.method == "auto" else told.method.endswith("powersgd")
        """None: not decided yet."""
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """What the gradients are multiplied by (fp16); the memory is kept free of it."""
        self.steps = 0
        self.trial = Trial()
        self.touched: list[int] = []
        """Most rows of each gradient that this peer, or any at the time of the last plan, touched in a step."""
        self._set(None)

    def reduce(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over all processes, who call this with their parameters in one order.

        A parameter without a gradient counts as zero, and gets one. If a gradient of any process is not finite, some
        of the mean is not, on every process.
        """
        grads = _gradients(parameters)
        self.steps += 1
        if self.compresses is None:
            self._try(grads)
        elif self.compresses and self.steps > self.warmup:
            self._compressed(grads)
        else:
            self._plain(grads)

    def forget(self) -> None:
        """Drop the memory: the parameters mean something else from now on, such as newly selected rows."""
        self.touched = []
        self._set(None)

    def figures(self) -> dict[str, float]:
        """What went between the nodes so far: payload sent by this process, and by all (counted, as in a ring)."""
        return {"sent_bytes": self.links.sent_bytes, "sent_all_bytes": self.links.sent_all_bytes}

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps of this process: tensors and plain values."""
        sent = [self.links.sent_bytes, self.links.sent_all_bytes]
        told = (
            None if self.plan is None else [list(map(list, self.plan.shapes)), list(self.plan.tables), self.plan.rank]
        )
        state = {"steps": self.steps, "compresses": self.compresses, "sent": sent, "touched": self.touched}
        return state | {"plan": told, "memory": None if self.memory is None else self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.steps, self.compresses, self.touched = state["steps"], state["compresses"], list(state["touched"])
        self.links.sent_bytes, self.links.sent_all_bytes = state["sent"]
        self._set(None)
        if state["plan"] is not None:
            shapes, tables, rank = state["plan"]
            self._set(Plan(tuple(map(tuple, shapes)), tuple(tables), rank))
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"], self.device)

    def _set(self, told: Plan | None) -> None:
        self.plan = told
        self.memory = Compressor(told, self.device) if told is not None and self._sends else None

    @property
    def _sends(self) -> bool:
        return self.links.leads or not self.hierarchical

    @property
    def _ring(self) -> Sequence[int]:
        return self.links.leaders if self.hierarchical else range(self.links.where.world_size)

    def _plain(self, grads: Sequence[Tensor]) -> None:
        links, buffer, shapes = self.links, pack(grads), [grad.shape for grad in grads]
        if self.hierarchical:
            links.gather(buffer)
        if self.compresses is not False and self._sends:
            self._count(unpack(buffer, shapes)[:-1])
        if not self.hierarchical:
            links.mean(buffer)
        else:
            if links.leads:
                links.lead_mean(buffer)
            links.hand_out(buffer)
        links.count(buffer.nbytes, self._ring)
        _write(unpack(buffer, shapes), grads)

    def _compressed(self, grads: Sequence[Tensor]) -> None:
        links, scale = self.links, self.loss_scale()
        buffer = pack(grads).float().div_(scale)
        if self.hierarchical:
            links.gather(buffer)
        *tensors, _ = unpack(buffer, [grad.shape for grad in grads])
        told = self._planned(grads, tensors)
        message = self._exchanged(told, tensors)
        links.count(told.layout.size_bytes, self._ring)
        links.count_gathered(message.counts[0].nbytes + message.rows[0].nbytes, self._ring)
        means = decode(told, message)
        _write(means if scale == 1 else [mean.mul_(scale) for mean in means], grads)
        self._reconsider(told, grads, message)

    def _exchanged(self, told: Plan, tensors: Sequence[Tensor]) -> Message:
        """Give every process what the peers make of their tensors."""
        links = self.links
        if self.memory is not None:
            mean, gather = (links.lead_mean, links.leaders_own) if self.hierarchical else (links.mean, links.everyones)
            message = self.memory.encode(tensors, mean, gather)
            return message.handed(links.hand_out) if self.hierarchical else message
        return awaited(told, len(self._ring), self.device, links.hand_out)

    def _planned(self, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> Plan:
        shapes = tuple(tuple(grad.shape) for grad in grads)
        if self.plan is not None and self.plan.shapes != shapes:
            self.forget()
        if self.plan is None:
            if self._sends:
                self._count(tensors)
            most = torch.tensor(self.touched or [0] * len(grads), device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)  # one plan for all
            self.touched = most.tolist()
            sizes = [grad.nbytes for grad in grads]
            self._set(found := plan(shapes, sizes, self.touched, len(self._ring), self.share, self.rank))
            ratio = self.saves * sum(sizes) / found.traffic_bytes(self.touched, len(self._ring))
            log.info(
                "gradients compressed: %d of %d by rows, others in rank %d; sent=1/%.1f of flat for %.2f MB",
                len(found.tables),
                len(sizes),
                found.rank,
                ratio,
                sum(sizes) / 1e6,
            )
        assert self.plan is not None
        return self.plan

    def _count(self, tensors: Sequence[Tensor]) -> None:
        if all(tensor.isfinite().all() for tensor in tensors):  # what overflowed (fp16) may have done so everywhere
            now = rows.touched(tensors)
            self.touched = [max(pair) for pair in zip(self.touched or now, now, strict=True)]

    def _reconsider(self, told: Plan, grads: Sequence[Tensor], message: Message) -> None:
        """Plan anew, the same on all processes, if a table has become too dense to travel by rows."""
        if not told.tables:
            return
        now = message.counts.amax(0).tolist()
        for i, count in zip(told.tables, now, strict=True):
            self.touched[i] = max(self.touched[i], count)
        chosen = rows.tables(told.shapes, self.touched, [grad.nbytes for grad in grads], len(self._ring), self.share)
        if chosen != list(told.tables):
            log.warning("communication: more rows of a table are touched than before; what travels is chosen anew")
            self._set(None)

    def _try(self, grads: Sequence[Tensor]) -> None:
        """Reduce as it is, and once more compressed, for the time that it takes; what comes out of that is dropped."""
        copies, trial = [grad.clone() for grad in grads], self.trial
        began = time.perf_counter()
        plain = self._timed(lambda: self._plain(grads))
        compressed = self._timed(lambda: self._compressed(copies))
        if trial.ended is not None:
            trial.seconds.append((began - trial.ended, plain, compressed))
        trial.ended = time.perf_counter()
        if len(trial.seconds) == TRIALS:
            self._decide()

    def _timed(self, work: Callable[[], None]) -> float:
        dist.barrier()  # nobody's waiting for a slower process is taken for the link's
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _decide(self) -> None:
        medians = torch.tensor([median(column) for column in zip(*self.trial.seconds, strict=True)], device=self.device)
        dist.all_reduce(medians, dist.ReduceOp.MAX)  # one decision for all
        rest, plain, compressed = medians.tolist()
        gain = (rest + plain) / (rest + compressed)
        self.compresses = gain >= PAYS
        self._set(None)
        log.info(
            "communication: compression %s: a step takes %.1f ms with it, %.1f without (%.2f times as fast; it has to "
            "be %.2f); reduction alone %.1f and %.1f ms",
            "on" if self.compresses else "left off",
            1e3 * (rest + compressed),
            1e3 * (rest + plain),
            gain,
            PAYS,
            1e3 * compressed,
            1e3 * plain,
        )


class Own:
    """Stands in a `Reducer`'s place where the engine reduces by itself."""

    def reduce(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Do nothing: the gradients are the mean already."""

    def forget(self) -> None:
        """Nothing is kept."""

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


def attach(engine: Any, train: TrainParams) -> Reducer | Own:
    """Make what averages the engine's gradients, to be called between its `backward` and its `step`.

    Raises:
        SlipwayError: the launcher's map of the nodes is incomplete, contradictory or uneven.
    """
    method = train.communication.method
    if method == "flat":
        return Own()
    if train.zero != 0:  # auto: params allow no other method here
        log.info(
            "communication: auto stays flat: ZeRO %s reduces in its optimizer; train.zero: 0 lets it try", train.zero
        )
        return Own()
    where = discover(engine.device)
    if method == "auto" and len(where.ranks) == 1:
        log.info("communication: auto stays flat: there is one node, and no slow link")
        return Own()
    engine.enable_backward_allreduce = False
    reducer = make(train, engine.module.parameters(), where)
    reducer.loss_scale = lambda: precision.loss_scale(engine) or 1.0
    log.info("communication: %s, %d nodes of %d processes", method, len(where.ranks), len(where.ranks[0]))
    return reducer


def make(train: TrainParams, parameters: Iterable[torch.nn.Parameter], where: Nodes) -> Reducer:
    """Make the reducer of `train.communication`, flat too; every process calls this.

    Args:
        train: how gradients are to be averaged.
        parameters: whose gradients they are, all on one device.
        where: map of the nodes.
    """
    return Reducer(Links(where, dist.get_rank()), train.communication, next(iter(parameters)).device)


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    grads = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    return grads


def _write(means: Iterable[Tensor], grads: Sequence[Tensor]) -> None:
    for mean, grad in zip(means, grads, strict=False):  # `unpack` gives what is left too: nothing
        grad.copy_(mean)
