"""The language model: transformers' own DeepSeek-V3, with multi-head latent attention and a mixture of experts.

Source: DeepSeek-AI 2024, DeepSeek-V3 Technical Report, arXiv:2412.19437, section 2.1. Beside the loss of the next token
a small one keeps the experts of a layer equally busy within each text (its equations 17 to 20).
"""

# B batch, T time, E experts
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model comes from a folder; nothing is ever fetched

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # its usual name
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3ForCausalLM,
    DeepseekV3RotaryEmbedding,
)

from slipway import artifacts
from slipway.errors import DataError, ModelError
from slipway.workloads.llm.params import LlmParams

BALANCE = 1e-4  # weight of the loss that keeps experts busy, as published
EXPERTS = "grouped_mm"  # how transformers runs the experts: the fastest that was tried here (1.2 x its loop)


class LanguageModel(DeepseekV3ForCausalLM):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """Its forward gives the loss, as the training loop asks."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the file of the class itself, which is this one

    def forward(self, token_BT: Tensor, each: bool = False) -> Tensor:
        """Mean loss of every token given those before it; or, with `each`, the mean log-likelihood of every row [B].

        Args:
            token_BT: [B, T+1] token ids.
            each: whether rows are told apart, as for validation; then the experts' balance is left out.
        """
        found = super().forward(input_ids=token_BT[:, :-1], use_cache=False, output_router_logits=not each)
        surprise = F.cross_entropy(found.logits.float().transpose(1, 2), token_BT[:, 1:], reduction="none")
        if each:
            return -surprise.mean(1)
        routers = found.router_logits or ()
        shape = (len(token_BT), token_BT.shape[1] - 1)
        chosen: Any = self.config.num_experts_per_tok
        balance = [_imbalance(logits.view(*shape, -1), chosen) for logits in routers]
        loss: Tensor = surprise.mean() + BALANCE * sum(balance, start=surprise.new_zeros(()))
        return loss


def _imbalance(logits_BTE: Tensor, chosen: int) -> Tensor:
    """1 where all experts are equally busy within each row, more where they are not (arXiv:2412.19437, eq. 17-20)."""
    score = logits_BTE.float().sigmoid()
    share = (score / score.sum(-1, keepdim=True)).mean(1)  # [B, E]
    busy = torch.zeros_like(score).scatter_(-1, score.topk(chosen, dim=-1).indices, 1.0).mean(1)  # [B, E]
    return (share * busy).sum(-1).mean() * logits_BTE.shape[-1] / chosen


def configure(params: LlmParams, vocabulary: int, end: int) -> DeepseekV3Config:
    """Sizes of a model that starts from scratch."""
    return DeepseekV3Config(
        vocab_size=vocabulary,
        hidden_size=params.width,
        intermediate_size=params.dense_width,
        moe_intermediate_size=params.expert_width,
        num_hidden_layers=params.layers,
        first_k_dense_replace=params.dense_layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.heads,
        q_lora_rank=params.q_lora_rank,
        kv_lora_rank=params.kv_lora_rank,
        qk_nope_head_dim=params.head_width,
        qk_rope_head_dim=params.head_width // 2,
        v_head_dim=params.head_width,
        n_routed_experts=params.experts,
        num_experts_per_tok=params.experts_per_token,
        n_shared_experts=params.shared_experts,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_mtp_layers=0,
        max_position_embeddings=params.context_length,
        bos_token_id=None,
        eos_token_id=end,
        use_cache=False,
    )


def make(params: LlmParams, vocabulary: int, end: int) -> LanguageModel:
    """Make the model: from `params.weights`, or with weights from torch's generator.

    Raises:
        ModelError: the folder is not one in the Hugging Face layout, or its model does not fit params or tokenizer.
    """
    if params.weights:
        model = load(Path(params.weights), params.context_length, vocabulary)
    else:
        model = LanguageModel(configure(params, vocabulary, end))
    model.config.use_cache = False
    model.set_experts_implementation(EXPERTS)
    # A buffer is cast to the precision of training, and a bf16 frequency would be off by up to 0.4 % from the one that
    # is served; the forward brings a plain tensor to its device by itself.
    rotary = model.model.rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        value = getattr(rotary, name)
        delattr(rotary, name)
        setattr(rotary, name, value)
    return model


def load(folder: Path, context_length: int, vocabulary: int) -> LanguageModel:
    """Read a model in the Hugging Face layout: config.json and *.safetensors.

    Raises:
        ModelError: says what is missing, what does not fit, and what to set.
    """
    config = _config(folder)
    if vocabulary > config.vocab_size:
        raise ModelError(
            f"{folder}: its vocabulary has {config.vocab_size} tokens, the data's {vocabulary}; set "
            f"ingest.tokenizer.file to {folder}/tokenizer.json"
        )
    if context_length > config.max_position_embeddings:
        raise ModelError(
            f"{folder}: takes at most {config.max_position_embeddings} tokens; lower llm.context_length, now "
            f"{context_length}"
        )
    if torch.get_default_device().type == "meta":  # the memory plan wants shapes alone
        return LanguageModel(config)
    try:
        read: Any = LanguageModel.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors fail in their own ways
        raise ModelError(f"{folder}: its weights cannot be read: {' '.join(str(error).split())[:400]}") from error
    model, found = read
    wrong = {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "mismatched_keys") if found.get(kind)}
    if wrong:
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise ModelError(f"{folder}: its weights are not those of its config.json ({told})")
    made: LanguageModel = model.train()
    return made


def _config(folder: Path) -> DeepseekV3Config:
    if not folder.is_dir():
        raise ModelError(f"params.yaml: llm.weights: {folder}: no such folder; give one in the Hugging Face layout")
    try:
        raw = artifacts.read_json(folder / "config.json")
    except DataError as error:
        raise ModelError(f"params.yaml: llm.weights: not a folder in the Hugging Face layout ({error})") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != DeepseekV3Config.model_type:
        raise ModelError(
            f"{folder}/config.json: model_type is {kind!r}; this workload trains {DeepseekV3Config.model_type!r}"
        )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: holds no *.safetensors; give a folder with the weights beside config.json")
    if raw.get("quantization_config"):
        raise ModelError(f"{folder}/config.json: quantized weights cannot be trained; convert them to bf16 first")
    try:
        return DeepseekV3Config.from_pretrained(folder)
    except Exception as error:  # strict dataclasses and JSON fail in their own ways
        raise ModelError(f"{folder}/config.json: {' '.join(str(error).split())[:300]}") from error


def describe(config: DeepseekV3Config) -> dict[str, Any]:
    """What an export has to know: the configuration, and what transformers makes of its rotary part."""
    rotary: Any = DeepseekV3RotaryEmbedding(config)
    with torch.device("meta"):  # without weights
        attention: Any = DeepseekV3Attention(config, layer_idx=0)
    return {
        "config": config.to_diff_dict(),
        "frequencies": rotary.inv_freq.tolist(),
        "rotary_scale": float(rotary.attention_scaling),
        "attention_scale": float(attention.scaling),
    }
