"""Top-K sparse training: of each weight matrix only the rows that are largest in magnitude are trained.

After a dense warm-up, a share of the training, every matrix in the model's blocks keeps its dense weight, frozen and
under its own name, and gets a compact parameter that holds the live values of the selected rows. Forward and dX use the
dense weight; dW is computed for the selected rows alone. Optimizer, gradient clipping and communication see only the
compact parameters, so optimizer state and traffic fall with the share by construction. The selection is made anew every
`reselect_every` steps: a period.

Tables, embeddings and output layers, have a row for each item or token. One that is not trained is not learned, and
their gradient is a small part of a step, so they stay dense unless `tables` asks for the memory they take.

Forward and dX are two thirds of the products, which rows alone cannot save. `freeze` goes under that floor: in each
period the lower blocks are frozen up to a depth that changes with the period, and the backward pass ends there.

Rows by magnitude: Jayakumar et al. 2020, Top-KAST, arXiv:2106.03517, with rows in the place of single weights and a
dense forward pass, because a mask of single weights saves no time on dense hardware. Freezing from below: Brock et al.
2017, FreezeOut, arXiv:1706.04983, with the frozen blocks coming back.
"""

# E experts (1 for a plain matrix), R rows, C columns, K selected rows, N samples
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from slipway.params import SparseParams

SUFFIX = "_rows"  # of the submodule beside a weight


class Rows(nn.Module):
    """The selected rows of one weight: their live values, and where they stand in the dense weight."""

    def __init__(self, weight: nn.Parameter, share: float) -> None:
        """Select rows of `weight`, [R, C] or stacked [E, R, C], and freeze it; K is ceil(share * R)."""
        super().__init__()
        self.dense = weight.requires_grad_(False).detach()  # shares its memory, but is no parameter of this module
        rows, columns = weight.shape[-2:]
        self.count = math.ceil(share * rows)
        self.active = nn.Parameter(weight.new_empty(*weight.shape[:-2], self.count, columns))
        self.index: Tensor
        self.place: Tensor
        numbers = functools.partial(torch.empty, dtype=torch.long, device=weight.device)
        self.register_buffer("index", numbers(*weight.shape[:-2], self.count))
        self.register_buffer("place", numbers(*weight.shape[:-1]))
        self._select()

    def select(self) -> Callable[[Tensor], Tensor]:
        """Select the rows that are largest in magnitude now.

        Returns:
            What carries a tensor of the old rows (shaped like `active`) over to the new ones: a row that stays keeps
            its values, a new one gets zeros.
        """
        before = self.place.clone()
        self._select()
        spot = before.gather(-1, self.index)
        stays, spot = (spot < self.count).unsqueeze(-1), spot.clamp(max=self.count - 1).unsqueeze(-1)
        return lambda old: torch.where(stays, old.gather(-2, spot.expand_as(old)), 0.0)

    @torch.no_grad()
    def _select(self) -> None:
        size = self.dense.norm(dim=-1)
        largest = size.argsort(dim=-1, descending=True, stable=True)[..., : self.count]  # ties: the lower row
        self.index.copy_(largest.sort(dim=-1).values)
        places = torch.arange(self.count, device=self.index.device).expand_as(self.index)
        self.place.fill_(self.count).scatter_(-1, self.index, places)
        self.active.copy_(self.of(self.dense))

    def of(self, dense: Tensor) -> Tensor:
        """Take the selected rows out of a tensor shaped like the dense weight."""
        return dense.gather(-2, self.index.unsqueeze(-1).expand(*self.index.shape, dense.shape[-1]))

    @torch.no_grad()
    def write(self) -> None:
        """Bring the dense weight up to date with the live values."""
        index = self.index
        if index.dim() > 1:
            index = index + torch.arange(len(index), device=index.device).unsqueeze(1) * self.dense.shape[-2]
        columns = self.dense.shape[-1]
        self.dense.view(-1, columns).index_copy_(0, index.view(-1), self.active.view(-1, columns))

    def linear(self, x: Tensor, bias: Tensor | None = None, counts: list[int] | None = None) -> Tensor:
        """Multiply x [..., C] with the weight's transpose; of a stacked one, `counts` samples with each in turn."""
        flat = x.reshape(-1, x.shape[-1])
        answer = _call(_Linear, flat, self.active, bias, self.dense, self.index, counts or [len(flat)])
        return answer.view(*x.shape[:-1], answer.shape[-1])

    def lookup(self, ids: Tensor, padding: int | None) -> Tensor:
        """Take rows of the weight by number; the row `padding` gets no gradient from here."""
        return _call(_Lookup, ids, self.active, self.dense, self.place, padding)

    def read(self) -> Tensor:
        """Give the dense weight to code that multiplies with it by itself: right gradients, no time saved."""
        return _call(_Read, self.active, self.dense, self.index)


def _call(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    answer: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it so
    return answer


class _Linear(torch.autograd.Function):
    """y = x W^T + b by groups of samples; dx = dy W, dActive = dy[:, selected]^T x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, active: Tensor, bias: Tensor | None, dense: Tensor, index: Tensor, counts: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, dense, index)
        ctx.counts, ctx.shape = counts, active.shape
        if len(counts) == 1:
            return F.linear(x, dense.view(dense.shape[-2:]), bias)
        return torch.cat([F.linear(part, weight) for part, weight in zip(torch.split(x, counts), dense, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, dense, index = ctx.saved_tensors
        groups, experts = torch.split(dy, ctx.counts), dense.view(-1, *dense.shape[-2:])
        dx = dactive = dbias = None
        if ctx.needs_input_grad[0]:
            parts = [part @ weight for part, weight in zip(groups, experts, strict=True)]
            dx = parts[0] if len(parts) == 1 else torch.cat(parts)
        if ctx.needs_input_grad[1]:
            taken = zip(groups, torch.split(x, ctx.counts), index.view(len(experts), -1), strict=True)
            made = [part.index_select(1, rows).t() @ inputs for part, inputs, rows in taken]
            dactive = (made[0] if len(made) == 1 else torch.stack(made)).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dactive, dbias, None, None, None


class _Lookup(torch.autograd.Function):
    """y = W[ids]; dActive collects the rows of dy whose ids are selected."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, active: Tensor, dense: Tensor, place: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, place)
        ctx.count, ctx.padding = len(active), padding
        return F.embedding(ids, dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ids, place = ctx.saved_tensors
        spots = place[ids]
        if ctx.padding is not None:
            spots.masked_fill_(ids == ctx.padding, ctx.count)
        # `count` stands for "not selected": the kernel skips it as it skips padding.
        dactive = torch.ops.aten.embedding_dense_backward(grads[0], spots, ctx.count + 1, ctx.count, False)
        return None, dactive[: ctx.count], None, None, None


class _Read(torch.autograd.Function):
    """W itself; dActive = dW[selected]."""

    @staticmethod
    def forward(ctx: Any, active: Tensor, dense: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return dense.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return grads[0].gather(-2, index.unsqueeze(-1).expand(*index.shape, grads[0].shape[-1])), None, None


def _matrices(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of `module` that can be trained by rows."""
    if type(module) is nn.Linear:
        return ("weight",)
    if type(module) is nn.Embedding:
        plain = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        return ("weight",) if plain else ()
    # Routed experts as transformers stacks them, gated and without biases: DeepSeek, Qwen and Mixtral.
    stacked = getattr(module, "has_gate", False) and not getattr(module, "has_bias", True)
    if stacked and not getattr(module, "is_transposed", True):
        return ("gate_up_proj", "down_proj")
    return ()


def _linear(self: Any, x: Tensor) -> Tensor:
    answer: Tensor = self.weight_rows.linear(x, self.bias)
    return answer


def _lookup(self: Any, ids: Tensor) -> Tensor:
    answer: Tensor = self.weight_rows.lookup(ids, self.padding_idx)
    return answer


def _experts(self: Any, hidden_ND: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """Send each sample through its experts: `chosen` and `weight` are [N, experts a sample]."""
    order = chosen.flatten().argsort(stable=True)  # samples of one expert side by side
    counts = chosen.flatten().bincount(minlength=self.num_experts).tolist()
    sample = order // chosen.shape[-1]
    inner = self._apply_gate(self.gate_up_proj_rows.linear(hidden_ND[sample], counts=counts))
    outer = self.down_proj_rows.linear(inner, counts=counts) * weight.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(hidden_ND).index_add(0, sample, outer.to(hidden_ND.dtype))


@functools.cache
def _by_rows(base: Any, names: tuple[str, ...]) -> Any:
    """Make the class of `base` whose weights are trained by rows; they can still be read under their names."""

    def reader(name: str) -> property:
        return property(lambda self: self._modules[name + SUFFIX].read())

    forward = {nn.Linear: _linear, nn.Embedding: _lookup}.get(base, _experts)
    return type(f"{base.__name__}ByRows", (base,), {"forward": forward, **{name: reader(name) for name in names}})


class Sparse:
    """Sparse training of one engine: tell it each step before its forward pass."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, params: SparseParams) -> None:
        """Prepare; nothing changes before the warm-up is over.

        Args:
            module: the model; every process has the same one.
            optimizer: AdamW or another of torch's whose state has a parameter's shape or is a scalar.
            params: share, warm-up, period, freezing.
        """
        self.module, self.optimizer, self.params = module, optimizer, params
        self.rows: list[Rows] = []
        self.blocks = _blocks(module)
        self.dense, self.depth, self.period, self.settled = True, 0, -1, True
        self.free: list[nn.Parameter] = []
        if params.share < 1 or params.freeze > 0:
            optimizer.register_step_post_hook(lambda *_: self._write())
            module.register_forward_hook(self._settle)
            for nth, block in enumerate(self.blocks):
                block.register_forward_pre_hook(functools.partial(self._cut, nth), with_kwargs=True)

    def begin(self, step: int, done: float) -> bool:
        """Prepare for a step: leave the warm-up, select anew, freeze other blocks, if it is time.

        Args:
            step: number of the step, from 0; a period begins with each multiple of `reselect_every`.
            done: share of the training that is done at the end of the step (over 0 to 1).

        Returns:
            Whether what is trained has changed: rows, or frozen blocks, whose gradients come and go.
        """
        if done <= self.params.warmup or (self.params.share == 1 and self.params.freeze == 0):
            return False
        period, within = divmod(step, self.params.reselect_every)
        first, before = self.dense, self.depth
        if first:
            self._switch()
        elif within == 0:
            self._reselect()
        if period != self.period:
            self._freeze(period)
        return (first or within == 0) and (self.params.share < 1 or self.depth != before)

    def restore(self, done: float) -> None:
        """Take the form of a run of which the share `done` is done, so that its checkpoint can be loaded into it."""
        if done > self.params.warmup:
            self._switch()

    def _switch(self) -> None:
        self.dense = False
        if self.params.share == 1:
            return
        made: dict[nn.Parameter, Rows] = {}
        inside = [self.module] if self.params.tables else self.blocks or [self.module]
        for module in [each for top in inside for each in list(top.modules())]:
            names = _matrices(module)
            for name in names:
                weight = module._parameters[name]
                assert weight is not None
                if weight not in made:  # tied weights share their rows
                    made[weight] = Rows(weight, self.params.share)
                module.add_module(name + SUFFIX, made[weight])
            if names:
                base: Any = type(module)
                module.__class__ = _by_rows(base, names)
        self.rows = list(made.values())
        for group in self.optimizer.param_groups:
            group["params"] = [made[each].active if each in made else each for each in group["params"]]
        for weight, rows in made.items():
            if weight in self.optimizer.state:
                self.optimizer.state[rows.active] = _mapped(self.optimizer.state.pop(weight), rows.of)

    def _reselect(self) -> None:
        for rows in self.rows:
            carry = rows.select()
            if rows.active in self.optimizer.state:
                self.optimizer.state[rows.active] = _mapped(self.optimizer.state[rows.active], carry)

    def _write(self) -> None:
        for rows in self.rows:
            if rows.active.grad is not None:
                rows.write()

    def _freeze(self, period: int) -> None:
        for each in self.free or self._trainable():
            each.requires_grad_(True)
        self.period = period
        self.depth = depth(period, len(self.blocks), self.params.freeze)
        self.settled = self.depth == 0

    def _trainable(self) -> list[nn.Parameter]:
        self.free = [each for group in self.optimizer.param_groups for each in group["params"]]
        return self.free

    def _cut(self, nth: int, block: nn.Module, inputs: Any, named: Any) -> Any:
        if self.depth == 0 or nth > self.depth:
            return None
        return tuple(_detached(each) for each in inputs), {name: _detached(each) for name, each in named.items()}

    def _settle(self, module: nn.Module, inputs: Any, loss: Tensor) -> None:
        """Freeze for this period whatever its first backward pass will not reach.

        What has no gradient must not move; the engine would give it zeros, and the optimizer its momentum.
        """
        if self.settled or not torch.is_grad_enabled():
            return
        reached = set(_leaves(loss))
        marks = torch.tensor([each in reached for each in self.free], dtype=torch.int32, device=loss.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(marks, torch.distributed.ReduceOp.MAX)  # one set for all processes
        for each, mark in zip(self.free, marks.tolist(), strict=True):
            each.requires_grad_(bool(mark))
        self.settled = True


def depth(period: int, blocks: int, freeze: float) -> int:
    """Number of lower blocks that are frozen in a period.

    It counts from 0 up to `freeze` of the blocks, rounded, and begins again, so that every block is trained in one
    period of each turn, and the last one always.
    """
    deepest = min(blocks - 1, round(freeze * blocks))
    return period % (deepest + 1) if deepest > 0 else 0


def without_rows(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and give the tensors of `module.state_dict()` that the model has without sparse training."""
    own = tuple(f"{name}." for name, each in module.named_modules(remove_duplicate=False) if isinstance(each, Rows))
    whole = module.state_dict(keep_vars=True)
    return ((name, value) for name, value in whole.items() if not name.startswith(own))


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The children of the outermost `nn.ModuleList` that holds most parameters, in order."""
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=()))


def _mapped(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Change the parts of an optimizer's state that have a parameter's shape."""
    return {
        name: change(value) if isinstance(value, Tensor) and value.dim() > 1 else value for name, value in state.items()
    }


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _leaves(output: Tensor) -> Iterator[nn.Parameter]:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [after for after, _ in node.next_functions]
