"""The llm as an ONNX graph, in FP32 or INT8, made from its weights.

One pass over a text, no cache. Queries, keys and values come from their latents as in training. The experts are
computed densely: all of them as two wide matrix products, of which a token's router weights keep its own. That costs
experts / experts_per_token times as much as routing, but no shape depends on the data; it is for models that fit a CPU.

    tokens int64 [B, T], padded with -1 on the right
    ->  next int64 [B, K], log_probs float32 [B, K]      the likeliest tokens after the last one
        likelihood float32 [B, T], hits float32 [B, T]   of the token that follows each place: its log-probability, and
                                                         whether it was the likeliest; 0 where none follows
"""

# B batch, T time, D width, H heads, N nope, R rotary, V value, L latent, E experts, F expert width, K shown
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from slipway.workloads.base import Array
from slipway.workloads.graph import Graph, Ranges

SHOWN = 50
HIDDEN = np.float32(-1e9)
PADDING = -1


class LlmGraph:
    """Builds the graph; with `ranges` of a layer's inputs, that layer is INT8.

    Args:
        weights: by their names in transformers.
        about: of model.json: config, frequencies, scales, context_length.
        ranges: by layer.
    """

    def __init__(self, weights: Mapping[str, Array], about: Mapping[str, Any], ranges: Ranges | None = None) -> None:
        self.graph, self.weights, self.about = Graph(ranges), weights, about
        self.config: Mapping[str, Any] = about["config"]
        self._probe = False

    def build(self, probe: bool = False) -> bytes:
        """Serialise the model; `probe` adds least and largest input of every linear layer as `range.LAYER`: [2]."""
        self._probe = probe
        g, vocabulary = self.graph, len(self.weights["lm_head.weight"])
        state = self._encode()
        self._score(state)
        self._best(state, min(SHOWN, vocabulary))
        shown, value = min(SHOWN, vocabulary), helper.make_tensor_value_info
        outputs = [
            value("next", TensorProto.INT64, ["B", shown]),
            value("log_probs", TensorProto.FLOAT, ["B", shown]),
            value("likelihood", TensorProto.FLOAT, ["B", "T"]),
            value("hits", TensorProto.FLOAT, ["B", "T"]),
            *(value(name, TensorProto.FLOAT, [2]) for name in g.probes),
        ]
        return g.model("llm", [value("tokens", TensorProto.INT64, ["B", "T"])], outputs)

    def _encode(self) -> str:
        """State after each token: [B, T, D]."""
        g = self.graph
        known = g.op("Max", "tokens", g.constant(np.int64(0), "zero"))  # what padding becomes is seen by no token
        x = g.op("Gather", g.constant(self.weights["model.embed_tokens.weight"], "embedding"), known)
        time = g.op("Gather", g.op("Shape", "tokens"), g.ints(1))
        turns = self._turns(time)
        mask = self._mask(time)
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = g.op("Add", x, self._attend(self._norm(x, name + "input_layernorm"), name + "self_attn.", turns, mask))
            inner = self._norm(x, name + "post_attention_layernorm")
            dense = layer < self.config["first_k_dense_replace"]
            feed = self._feed(inner, name + "mlp.") if dense else self._mix(inner, name + "mlp.")
            x = g.op("Add", x, feed)
        return self._norm(x, "model.norm")

    def _turns(self, time: str) -> tuple[str, str]:
        """Cosine and sine of each place's angles: [T, R/2] each."""
        g, scale = self.graph, np.float32(self.about["rotary_scale"])
        frequencies = np.array(self.about["frequencies"], np.float32)
        angles = np.arange(self.about["context_length"], dtype=np.float32)[:, None] * frequencies
        tables = g.constant(np.cos(angles) * scale, "cosines"), g.constant(np.sin(angles) * scale, "sines")
        cosine, sine = (g.op("Slice", table, g.ints(0), time, g.ints(0)) for table in tables)
        return cosine, sine

    def _mask(self, time: str) -> str:
        """What is added to the attention logits: [T, T], hidden above the diagonal."""
        g = self.graph
        places = g.op("Range", g.scalar(0), g.op("Squeeze", time), g.scalar(1))
        later = g.op("Greater", g.op("Unsqueeze", places, g.ints(0)), g.op("Unsqueeze", places, g.ints(1)))
        return g.op("Mul", g.op("Cast", later, to=TensorProto.FLOAT), g.constant(HIDDEN, "hidden"))

    def _attend(self, x: str, name: str, turns: tuple[str, str], mask: str) -> str:
        g, config = self.graph, self.config
        heads, plain, rotary = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        if config["q_lora_rank"] is None:
            query = self._linear(x, name + "q_proj")
        else:
            latent = self._norm(self._linear(x, name + "q_a_proj"), name + "q_a_layernorm")
            query = self._linear(latent, name + "q_b_proj")
        latent, turning = self._split(self._linear(x, name + "kv_a_proj_with_mqa"), config["kv_lora_rank"], rotary)
        both = self._linear(self._norm(latent, name + "kv_a_layernorm"), name + "kv_b_proj")
        key, value = self._split(self._heads(both, heads), plain, config["v_head_dim"])
        query, query_turning = self._split(self._heads(query, heads), plain, rotary)
        query_turning, turning = self._turn(query_turning, turns), self._turn(self._heads(turning, 1), turns)
        # The rotary key is one for all heads: two products that are added save writing it out for each.
        logits = g.op("Add", self._product(query, key), self._product(query_turning, turning))
        scale = g.constant(np.float32(self.about["attention_scale"]), "attention_scale")
        weights = g.op("Softmax", g.op("Add", g.op("Mul", logits, scale), mask), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        return self._linear(g.op("Reshape", mixed, g.ints(0, 0, heads * config["v_head_dim"])), name + "o_proj")

    def _heads(self, x: str, heads: int) -> str:
        parts = self.graph.op("Reshape", x, self.graph.ints(0, 0, heads, -1))
        return self.graph.op("Transpose", parts, perm=[0, 2, 1, 3])

    def _product(self, query: str, key: str) -> str:
        return self.graph.op("MatMul", query, self.graph.op("Transpose", key, perm=[0, 1, 3, 2]))

    def _split(self, x: str, *widths: int) -> tuple[str, str]:
        first = self.graph.op("Split", x, self.graph.ints(*widths), outputs=2, axis=-1)
        return first, f"{first}.1"

    def _turn(self, x: str, turns: tuple[str, str]) -> str:
        """Turn pairs of the last axis by each place's angles (Su et al. 2021, arXiv:2104.09864)."""
        g, half = self.graph, self.config["qk_rope_head_dim"] // 2
        if self.config.get("rope_interleave", True):  # pairs lie beside one another
            pairs = g.op("Reshape", x, g.ints(0, 0, 0, half, 2))
            first, second = (g.op("Gather", pairs, g.scalar(side), axis=4) for side in (0, 1))
        else:
            first, second = self._split(x, half, half)
        cosine, sine = turns
        one = g.op("Sub", g.op("Mul", first, cosine), g.op("Mul", second, sine))
        other = g.op("Add", g.op("Mul", second, cosine), g.op("Mul", first, sine))
        return g.op("Concat", one, other, axis=-1)

    def _feed(self, x: str, name: str) -> str:
        gate = self._silu(self._linear(x, name + "gate_proj"))
        return self._linear(self.graph.op("Mul", gate, self._linear(x, name + "up_proj")), name + "down_proj")

    def _silu(self, x: str) -> str:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def _mix(self, x: str, name: str) -> str:
        """Shared experts, and the routed ones weighted by the router."""
        g = self.graph
        both, down = self.weights[name + "experts.gate_up_proj"], self.weights[name + "experts.down_proj"]  # EFD, EDF
        experts, width = down.shape[0], down.shape[2]
        flat = both.reshape(experts * 2 * width, -1)
        inner = g.linear(x, name + "experts.gate_up_proj", flat, probe=self._probe)
        gate, up = self._split(g.op("Reshape", inner, g.ints(0, 0, experts, 2 * width)), width, width)
        kept = g.op("Unsqueeze", self._route(x, name + "gate."), g.ints(-1))  # [B, T, E, 1]
        inner = g.op("Mul", g.op("Mul", self._silu(gate), up), kept)
        flat = down.transpose(1, 0, 2).reshape(-1, experts * width)
        inner = g.op("Reshape", inner, g.ints(0, 0, experts * width))
        routed = g.linear(inner, name + "experts.down_proj", flat, probe=self._probe)
        return g.op("Add", routed, self._feed(x, name + "shared_experts."))

    def _route(self, x: str, name: str) -> str:
        """Weight of each expert for each token: [B, T, E], 0 for those that it does not go through."""
        g, config = self.graph, self.config
        scores = g.op("Sigmoid", g.op("MatMul", x, g.constant(self.weights[name + "weight"].T, name + "weight")))
        bias = g.constant(self.weights[name + "e_score_correction_bias"], name + "bias")
        choice = self._best_groups(g.op("Add", scores, bias))
        chosen = g.op("TopK", choice, g.ints(config["num_experts_per_tok"]), outputs=2, axis=-1)
        weights = g.op("GatherElements", scores, f"{chosen}.1", axis=-1)
        if config["norm_topk_prob"]:
            total = g.op("ReduceSum", weights, g.ints(-1), keepdims=1)
            weights = g.op("Div", weights, g.op("Add", total, g.constant(np.float32(1e-20), "least")))
        weights = g.op("Mul", weights, g.constant(np.float32(config["routed_scaling_factor"]), "routed_scale"))
        nothing = g.op("Mul", scores, g.constant(np.float32(0), "nought"))
        return g.op("ScatterElements", nothing, f"{chosen}.1", weights, axis=-1)

    def _best_groups(self, choice: str) -> str:
        """Hide the experts outside of the groups whose two best ones are best together."""
        g, config = self.graph, self.config
        groups, kept = config["n_group"], config["topk_group"]
        if kept == groups:
            return choice
        apart = g.op("Reshape", choice, g.ints(0, 0, groups, -1))
        two = g.op("TopK", apart, g.ints(2), outputs=2, axis=-1)
        worth = g.op("ReduceSum", two, g.ints(-1), keepdims=0)  # [B, T, G]
        best = g.op("TopK", worth, g.ints(kept), outputs=2, axis=-1)
        zeros = g.op("Mul", worth, g.constant(np.float32(0), "nought"))
        ones = g.op("Add", g.op("Mul", best, g.constant(np.float32(0), "nought")), g.constant(np.float32(1), "one"))
        open_ = g.op("Unsqueeze", g.op("ScatterElements", zeros, f"{best}.1", ones, axis=-1), g.ints(-1))
        inside = g.op("Greater", open_, g.constant(np.float32(0.5), "half"))
        return g.op("Reshape", g.op("Where", inside, apart, g.constant(HIDDEN, "hidden")), g.op("Shape", choice))

    def _norm(self, x: str, name: str) -> str:
        g = self.graph
        # transformers gives the norms of the latents its default, whatever the configuration says of the others.
        inside = name.endswith(("q_a_layernorm", "kv_a_layernorm"))
        epsilon = g.constant(np.float32(1e-6 if inside else self.config["rms_norm_eps"]), f"epsilon{inside}")
        square = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
        level = g.op("Div", x, g.op("Sqrt", g.op("Add", square, epsilon)))
        return g.op("Mul", level, g.constant(self.weights[name + ".weight"], name))

    def _linear(self, x: str, name: str) -> str:
        bias = self.weights.get(name + ".bias")
        return self.graph.linear(x, name, self.weights[name + ".weight"], bias, self._probe)

    def _log_probs(self, state: str) -> str:
        logits = self.graph.linear(state, "lm_head", self.weights["lm_head.weight"], None, self._probe)
        self._probe = False  # the head is built twice, and probed where it sees all places
        return self.graph.op("LogSoftmax", logits, axis=-1)

    def _best(self, state: str, shown: int) -> None:
        """The likeliest tokens after the last one."""
        g = self.graph
        real = g.op("Cast", g.op("GreaterOrEqual", "tokens", g.constant(np.int64(0), "zero")), to=TensorProto.INT64)
        last = g.op("Sub", g.op("ReduceSum", real, g.ints(1), keepdims=1), g.ints(1))  # [B, 1]
        last = g.op("Max", last, g.constant(np.int64(0), "zero"))
        end = g.op("GatherND", state, last, batch_dims=1)  # [B, D]
        found = g.op("TopK", self._log_probs(end), g.ints(shown), outputs=2, axis=-1)
        g.output("log_probs", found)
        g.output("next", f"{found}.1")

    def _score(self, state: str) -> None:
        """How likely the tokens of the text themselves are."""
        g, zero = self.graph, self.graph.constant(np.int64(0), "zero")
        ahead = g.op("Slice", "tokens", g.ints(1), g.ints(1 << 31), g.ints(1))
        ahead = g.op("Pad", ahead, g.ints(0, 0, 0, 1), g.constant(np.int64(PADDING), "padding"))
        follows = g.op("Cast", g.op("GreaterOrEqual", ahead, zero), to=TensorProto.FLOAT)
        log_probs = self._log_probs(state)
        index = g.op("Unsqueeze", g.op("Max", ahead, zero), g.ints(-1))
        found = g.op("Squeeze", g.op("GatherElements", log_probs, index, axis=-1), g.ints(-1))
        g.output("likelihood", g.op("Mul", found, follows))
        right = g.op("Equal", g.op("ArgMax", log_probs, axis=-1, keepdims=0), ahead)
        g.output("hits", g.op("Cast", right, to=TensorProto.FLOAT))
