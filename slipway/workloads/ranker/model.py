"""SASRec: self-attention over a user's last items (Kang and McAuley 2018, arXiv:1808.09781).

Positions are counted from the end of a history, so padding on the left changes no answer, and any length up to
`max_length` can be given. The item embeddings are also the output layer. The loss compares every next item with
items that the whole batch shares, so its cost is three matrix products.
"""

# B batch, T time, D width, I items, N negatives, P positions that have a next item
from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from slipway.workloads.ranker.loss import cross_entropy
from slipway.workloads.ranker.params import RankerParams

HIDDEN = -1e4  # finite, also in fp16: a row that is padding throughout must not become NaN


class Dropout(nn.Module):
    """What `nn.Dropout` does, five times as fast on a CPU: four decisions from each 64 random bits, not one."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability `share` (to 1 / 65,536) and scale the others up."""
        if not self.training or self.share == 0:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.share * 65_536) - 32_768
        return x * (kept.to(x.dtype) / (1 - self.share))


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_BTT: Tensor) -> Tensor:
        """Mix each position with those before it; `mask_BTT` is added to the attention logits."""
        x_BTD = x_BTD + self.dropout(self.out(self._attend(self.attention_norm(x_BTD), mask_BTT)))
        return cast(Tensor, x_BTD + self.dropout(self.down(self.dropout(F.relu(self.up(self.feed_norm(x_BTD)))))))

    def _attend(self, x_BTD: Tensor, mask_BTT: Tensor) -> Tensor:
        batch, time, width = x_BTD.shape
        split = self.qkv(x_BTD).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # each [B, heads, T, D / heads]
        logits = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads) + mask_BTT.unsqueeze(1)
        mixed = self.dropout(logits.softmax(-1)) @ value
        return cast(Tensor, mixed.transpose(1, 2).reshape(batch, time, width))


class Ranker(nn.Module):
    """Scores every item as the next one of a history; item 0 is padding."""

    def __init__(self, items: int, params: RankerParams) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, params.width, padding_idx=0)
        self.place = nn.Embedding(params.max_length, params.width)  # 0 is the last place of a history
        self.blocks = nn.ModuleList(Block(params.width, params.heads, params.dropout) for _ in range(params.blocks))
        self.norm = nn.LayerNorm(params.width)
        self.dropout = Dropout(params.dropout)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0].zero_()

    def encode(self, history_BT: Tensor) -> Tensor:
        """Give the state [B, T, D] after each item of a history (item ids, padded with 0 on the left)."""
        return self._encode(history_BT, self.item(history_BT))

    def _encode(self, history_BT: Tensor, item_BTD: Tensor) -> Tensor:
        time = history_BT.shape[1]
        places = torch.arange(time - 1, -1, -1, device=history_BT.device)
        x_BTD = self.dropout(item_BTD + self.place(places))
        hidden = (history_BT == 0).unsqueeze(1) | (places.unsqueeze(0) < places.unsqueeze(1)).unsqueeze(0)
        mask_BTT = hidden.to(x_BTD.dtype) * HIDDEN
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BTT)
        return cast(Tensor, self.norm(x_BTD))

    def logits(self, history_BT: Tensor) -> Tensor:
        """Score all items as the next one of each history: [B, I+1]."""
        return self.encode(history_BT)[:, -1] @ self.item.weight.T

    def forward(self, history_BT: Tensor, target_BT: Tensor, item_N: Tensor, bias_N: Tensor) -> Tensor:
        """Mean cross entropy over the positions whose `target_BT`, the next item, is not 0.

        Args:
            history_BT: item ids, padded with 0 on the left.
            target_BT: the item that follows each place, 0 where there is none.
            item_N: the items that are compared, rising, every target among them.
            bias_N: added to an item's logit where it is not the next one.
        """
        wanted = target_BT > 0
        # One look-up for both uses: each makes a gradient of the whole table.
        rows = self.item(torch.cat([history_BT.flatten(), item_N]))
        history_BTD = rows[: history_BT.numel()].view(*history_BT.shape, -1)
        state_PD = self._encode(history_BT, history_BTD)[wanted]
        return cross_entropy(
            state_PD, rows[history_BT.numel() :], bias_N, torch.searchsorted(item_N, target_BT[wanted])
        )


class Served(nn.Module):
    """The ranker as a service asks it, in torch: what torch.compile takes, and for comparison with the engines.

    Args:
        ranker: the trained model.
        shown: number of items that it gives.
    """

    def __init__(self, ranker: Ranker, shown: int) -> None:
        super().__init__()
        self.ranker, self.shown = ranker, shown

    def forward(self, history: Tensor) -> dict[str, Tensor]:
        """The best items and their scores, without padding and what the history [B, T] holds; and all logits."""
        logits = self.ranker.logits(history)
        left = logits.scatter(1, history, -torch.inf)
        scores, items = left[:, 1:].topk(self.shown)
        return {"scores": scores, "items": items + 1, "logits": logits}
