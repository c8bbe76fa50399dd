"""Choosing a few of several units for each token (heads, experts), and training a router to choose them evenly.

With p_ti the softmax over the U units of a token's scores (or their sigmoids over the sum of these), K units chosen for
each token, and over N tokens

    P_i = mean_t p_ti,    f_i = the share of tokens that choose i,    balance = (U / K) sum_i P_i f_i

which is 1 where all are chosen equally often (the form of Megatron-LM; that of arXiv 2410.11842, eq. 7, without U / K).
No gradient goes through f. What keeps scores small is the mean over tokens of logsumexp(scores)^2 (arXiv 2202.08906).
 Single-device code; where tokens are spread, `parallel/balance.py` adds up.
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

Score = Literal["softmax", "sigmoid"]
Part = Literal["mixer", "feedforward"]

SMALLEST_SUM = 1e-20
"""Added to sums of sigmoids before dividing by them."""


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
        factor: what multiplies sum_i P_i f_i of the layer in the loss.
        over: the tokens of a sequence (then the mean over sequences), or of the global batch.
        num_units: U.
        shared_out: whether the factor is divided by the number of layers that have one of this kind, so that these are
            averaged rather than added up.
    """

    factor: float
    over: BalanceOver
    num_units: int
    shared_out: bool = False


@dataclass(frozen=True)
class Routing:
    """What a router has chosen.

    Attributes:
        part: whose router it is: the mixer's, or the feed-forward's.
        scores_BNU: of the units, fp32 or wider.
        chosen_BNU: bool, K of them for each token.
        active_BNH: bool, of the heads that are here, whichever unit they belong to, those that run; None where units
            are no heads.
        score: how scores become probabilities.
        tower: of which modality the tokens are that it routes, where each has a router of its own.
        routed_BN: bool, these tokens; None where it routes all. The others have scores of zero and choose nothing.
    """

    part: Part
    scores_BNU: Tensor
    chosen_BNU: Tensor
    active_BNH: Tensor | None = None
    score: Score = "softmax"
    tower: int = 0
    routed_BN: Tensor | None = None

    def probabilities(self) -> Tensor:
        """`[B, N, U]`, whatever the gates are made of: each token's sum is 1."""
        if self.score == "softmax":
            return self.scores_BNU.softmax(-1)
        scores_BNU = self.scores_BNU.sigmoid()
        return scores_BNU / (scores_BNU.sum(-1, keepdim=True) + SMALLEST_SUM)


def best(scores_BNU: Tensor, count: int) -> Tensor:
    """int64 `[B, N, count]`: the units of each token with the largest scores, best first; of equal ones, the first."""
    # A stable sort, where torch's topk says nothing about equal ones: prefill and steps have to choose alike.
    return scores_BNU.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]


def chosen(index_BNK: Tensor, num_units: int) -> Tensor:
    """Bool `[B, N, U]`: which units these are."""
    nothing = torch.zeros(*index_BNK.shape[:-1], num_units, dtype=torch.bool, device=index_BNK.device)
    return nothing.scatter(-1, index_BNK, True)


def choose_units(scores_BNU: Tensor, count: int) -> Tensor:
    """Bool `[B, N, U]`: the `count` units of each token with the largest scores; of equal ones, the first."""
    return chosen(best(scores_BNU, count), scores_BNU.shape[-1])
