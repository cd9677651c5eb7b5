"""The llm's own section of `params.yaml`; it imports nothing heavy, because Airflow's form is made from it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from slipway.params import Count, Section


class LlmParams(Section):
    """DeepSeek-V3 (arXiv:2412.19437): multi-head latent attention, mixture of experts with shared ones."""

    layers: Annotated[int, Field(ge=1, le=256)] = 2
    """Transformer layers (1..256)."""
    dense_layers: Annotated[int, Field(ge=0)] = 1
    """The first of them, which have a dense feed-forward; the others are mixtures of experts (0 or more)."""
    width: Annotated[int, Field(ge=8, le=65_536)] = 96
    """Width of embeddings and layers (8..65536)."""
    dense_width: Count = 256
    """Inner width of a dense feed-forward (1 or more)."""
    heads: Count = 4
    """Attention heads (1 or more)."""
    head_width: Annotated[int, Field(ge=4, multiple_of=4)] = 24
    """Width of a head's values, and of its keys without the rotary half (4 or more, by fours)."""
    q_lora_rank: Annotated[int, Field(ge=1)] | None = 48
    """Rank of the latent that queries are made from (1 or more); empty: they are not compressed."""
    kv_lora_rank: Count = 32
    """Rank of the latent that keys and values are made from (1 or more)."""
    experts: Annotated[int, Field(ge=2, le=4096)] = 8
    """Routed experts of a layer (2..4096)."""
    experts_per_token: Count = 2
    """Routed experts that a token goes through (1 or more, at most `experts`)."""
    shared_experts: Count = 1
    """Experts that every token goes through (1 or more)."""
    expert_width: Count = 64
    """Inner width of an expert (1 or more)."""
    context_length: Annotated[int, Field(ge=2, le=1_048_576)] = 64
    """Most tokens that the model sees (2..1048576)."""
    epoch_tokens: Annotated[int, Field(ge=0)] = 98_304
    """Training tokens of an epoch, drawn anew for each (0: all)."""
    weights: str | None = None
    """Folder in the Hugging Face layout to start from, with its sizes; empty: from scratch."""

    @model_validator(mode="after")
    def _fits(self) -> LlmParams:
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token must be at most experts, got {self.experts_per_token}, {self.experts}")
        if self.dense_layers > self.layers:
            raise ValueError(f"dense_layers must be at most layers, got {self.dense_layers} and {self.layers}")
        return self


MODEL = LlmParams

TECHNIQUES = ("int8", "bf16")
