"""Cross entropy among sampled items without autograd's copies: a block of positions at a time, while it is cached.

Autograd keeps and passes over the [P, N] logits about ten times; that, not the matrix products, was most of a step's
time on a CPU. Here the logits of a block of positions are made, turned into their own gradient in place, multiplied
into the gradients of states and items, and forgotten. Computing the gradient in the forward pass is how the fused
cross entropy of Liger Kernel does it (Hsu et al. 2024, arXiv:2410.10989).
"""

# P positions, D width, N items that are compared, R positions of a block
from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18  # logits of a block: 1 MB in FP32, what a core's second cache holds


def cross_entropy(state_PD: Tensor, item_ND: Tensor, bias_N: Tensor, answer_P: Tensor) -> Tensor:
    """Mean cross entropy of the right item among all N, whose logits are `state @ item + bias`, its own without bias.

    Args:
        state_PD: what the model makes of each history.
        item_ND: embeddings of the items that are compared.
        bias_N: added to the logit of an item where it is not the right one.
        answer_P: which of the N is right.
    """
    return cast(Tensor, _CrossEntropy.apply(state_PD, item_ND, bias_N, answer_P))  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state_PD: Tensor, item_ND: Tensor, bias_N: Tensor, answer_P: Tensor) -> Tensor:
        count, exact = len(state_PD), torch.float32  # sums and gradients, whatever the precision of the products
        loss = torch.zeros((), dtype=exact, device=state_PD.device)
        grad_state_PD = torch.empty_like(state_PD, dtype=exact)
        grad_item_ND = torch.zeros_like(item_ND, dtype=exact)
        bias_N, rows = bias_N.to(state_PD.dtype), max(64, BLOCK // len(item_ND))
        for begin in range(0, count, rows):
            state_RD, answer_R1 = state_PD[begin : begin + rows], answer_P[begin : begin + rows, None]
            logits_RN = torch.addmm(bias_N, state_RD, item_ND.T)
            own_R1 = (state_RD.to(exact) * item_ND[answer_R1.squeeze(1)]).sum(1, keepdim=True)
            logits_RN.scatter_(1, answer_R1, own_R1.to(logits_RN.dtype))
            top_R1 = logits_RN.amax(1, keepdim=True)
            weight_RN = logits_RN.sub_(top_R1).exp_()
            sum_R1 = weight_RN.sum(1, keepdim=True, dtype=exact)
            loss += (sum_R1.log() + (top_R1 - own_R1)).sum()
            weight_RN.scatter_add_(1, answer_R1, -sum_R1.to(weight_RN.dtype))
            share_R1 = 1 / (count * sum_R1)
            grad_state_PD[begin : begin + rows] = (weight_RN @ item_ND) * share_R1
            grad_item_ND += weight_RN.T @ (state_RD * share_R1).to(state_RD.dtype)
        ctx.save_for_backward(grad_state_PD, grad_item_ND)
        ctx.dtype = state_PD.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        state_PD, item_ND = ((grad_loss[0] * gradient).to(ctx.dtype) for gradient in ctx.saved_tensors)
        return state_PD, item_ND, None, None
