"""SASRec: self-attention over a user's last items (Kang and McAuley 2018, arXiv:1808.09781).

Positions are counted from the end of a history, so padding on the left changes no answer, and any length up to
`max_length` can be given. The item embeddings are also the output layer. The loss compares every next item with
negatives that the whole batch shares, so its cost is one matrix product.
"""

# B batch, T time, D width, I items, N negatives, P positions that have a next item
from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its usual name

from slipway.workloads.ranker.params import RankerParams

HIDDEN = -1e4  # finite, also in fp16: a row that is padding throughout must not become NaN


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

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
        self.bce = params.loss == "bce"
        self.item = nn.Embedding(items + 1, params.width, padding_idx=0)
        self.place = nn.Embedding(params.max_length, params.width)  # 0 is the last place of a history
        self.blocks = nn.ModuleList(Block(params.width, params.heads, params.dropout) for _ in range(params.blocks))
        self.norm = nn.LayerNorm(params.width)
        self.dropout = nn.Dropout(params.dropout)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.item.weight[0].zero_()

    def encode(self, history_BT: Tensor) -> Tensor:
        """Give the state [B, T, D] after each item of a history (item ids, padded with 0 on the left)."""
        time = history_BT.shape[1]
        places = torch.arange(time - 1, -1, -1, device=history_BT.device)
        x_BTD = self.dropout(self.item(history_BT) + self.place(places))
        hidden = (history_BT == 0).unsqueeze(1) | (places.unsqueeze(0) < places.unsqueeze(1)).unsqueeze(0)
        mask_BTT = hidden.to(x_BTD.dtype) * HIDDEN
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BTT)
        return cast(Tensor, self.norm(x_BTD))

    def logits(self, history_BT: Tensor) -> Tensor:
        """Score all items as the next one of each history: [B, I+1]."""
        return self.encode(history_BT)[:, -1] @ self.item.weight.T

    def forward(self, history_BT: Tensor, target_BT: Tensor, negative_N: Tensor) -> Tensor:
        """Mean loss over the positions whose `target_BT`, the next item, is not 0.

        Args:
            history_BT: item ids, padded with 0 on the left.
            target_BT: the item that follows each place, 0 where there is none.
            negative_N: item ids that every position is compared with.
        """
        wanted = target_BT > 0
        state_PD, target_P = self.encode(history_BT)[wanted], target_BT[wanted]
        positive_P = (state_PD * self.item(target_P)).sum(-1)
        negative_PN = state_PD @ self.item(negative_N).T
        negative_PN = negative_PN.masked_fill(target_P.unsqueeze(1) == negative_N, HIDDEN)
        if self.bce:
            return F.softplus(-positive_P).mean() + F.softplus(negative_PN).mean()
        together_PN = torch.cat([positive_P.unsqueeze(1), negative_PN], dim=1).float()
        return F.cross_entropy(together_PN, torch.zeros_like(target_P))
