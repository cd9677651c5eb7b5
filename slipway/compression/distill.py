"""Distillation (Hinton et al. 2015, arXiv:1503.02531): a smaller network learns what the full one answers.

The loss is a mix of the workload's own and of how far the two networks' softened answers are apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

TAUGHT = 0.7  # share of the loss that the teacher has
TEMPERATURE = 2.0


class Taught(nn.Module):
    """A model under training whose network learns from a teacher, too.

    Args:
        student: gives the workload's loss; its attribute `network` gives logits [B, C].
        teacher: takes what `student.network` takes; is not trained.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: no part of what is trained and saved
        self._seen: list[tuple[Tensor, Tensor]] = []
        assert isinstance(student.network, nn.Module)  # what a workload that offers `distill` has
        student.network.register_forward_hook(self._note)

    def _note(self, _network: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> None:
        if self.training:
            self._seen.append((given[0], logits))

    def forward(self, **batch: Any) -> Tensor:
        """Mix of the workload's loss and the teacher's."""
        self._seen.clear()
        own: Tensor = self.student(**batch)
        if not self._seen:
            return own  # validation
        ((given, logits),) = self._seen
        with torch.no_grad():
            wanted = self._teacher[0](given)
        return (1 - TAUGHT) * own + TAUGHT * apart(logits, wanted, TEMPERATURE)


def apart(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Mean divergence of softened answers [B, C], scaled so that gradients do not shrink with the temperature."""
    ours, theirs = F.log_softmax(logits / temperature, -1), F.log_softmax(wanted / temperature, -1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
