"""Choosing a few of several units for each token (heads, groups of heads), and training a router to choose them evenly.

With p_ti the softmax over the U units of a token's scores, K units chosen for each token, and over N tokens

    P_i = mean_t p_ti,    f_i = the share of tokens that choose i,    balance = (U / K) sum_i P_i f_i

which is 1 where all are chosen equally often (the form of Megatron-LM; that of arXiv 2410.11842, eq. 7, without U / K).
No gradient goes through f. Single-device code; where tokens are spread, `parallel/balance.py` adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import without_autocast

BalanceOver = Literal["sequence", "global_batch", "micro_batch"]
"""Of which tokens P and f are means. A micro-batch is refused."""


class Router(nn.Linear):
    """A linear map without bias to scores of units, in fp32 or wider whatever the model is cast to."""

    keep_fp32 = True

    def __init__(self, d_model: int, num_units: int):
        super().__init__(d_model, num_units, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` -> `[B, N, U]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            return F.linear(x.to(wide), self.weight.to(wide))

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keep_wide, recurse)


@dataclass(frozen=True)
class Balance:
    """How evenly a layer's units are to be chosen.

    Attributes:
        weight: beta: it weighs the loss U sum_i P_i f_i, averaged over the layers that have one, as the code does that
            was released with arXiv 2410.11842; that is beta K times the balance above.
        over: the tokens of a sequence (then the mean over sequences), or of the global batch.
        num_units: U.
    """

    weight: float
    over: BalanceOver
    num_units: int


@dataclass(frozen=True)
class Routing:
    """What a router has chosen.

    Attributes:
        scores_BNU: of the units, before the softmax, fp32 or wider.
        chosen_BNU: bool, K of them for each token.
        active_BNH: bool, of the heads that are here, whichever unit they belong to, those that run.
    """

    scores_BNU: Tensor
    chosen_BNU: Tensor
    active_BNH: Tensor


def choose(scores_BNU: Tensor, count: int) -> Tensor:
    """Bool `[B, N, U]`: the `count` units of each token with the largest scores; of equal ones, the first."""
    # A stable sort, where torch's topk says nothing about equal ones: prefill and steps have to choose alike.
    order = scores_BNU.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores_BNU, dtype=torch.bool).scatter(-1, order, True)
