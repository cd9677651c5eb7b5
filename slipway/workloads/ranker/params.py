"""The ranker's own section of `params.yaml`; it imports nothing heavy, because Airflow's form is made from it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from slipway.params import Count, Section


class RankerParams(Section):
    """SASRec (Kang and McAuley 2018, arXiv:1808.09781) with a softmax over sampled items."""

    width: Annotated[int, Field(ge=8, le=4096)] = 128
    """Width of the item embeddings and of every block (8..4096, a multiple of heads)."""
    blocks: Annotated[int, Field(ge=1, le=48)] = 2
    """Self-attention blocks (1..48)."""
    heads: Count = 1
    """Attention heads of a block (1 or more)."""
    max_length: Annotated[int, Field(ge=2, le=1024)] = 50
    """Most recent items of a history that the model sees (2..1024)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of activations dropped in training (0..1, 1 excluded)."""
    negatives: Annotated[int, Field(ge=1, le=65_536)] = 512
    """Items that a batch is compared with beside its own, drawn uniformly (1..65536; all items or more: every one)."""

    @model_validator(mode="after")
    def _divides(self) -> RankerParams:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        return self


MODEL = RankerParams

TECHNIQUES = ("int8", "bf16")
