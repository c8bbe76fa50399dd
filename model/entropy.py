"""How spread out attention is, and a penalty on heads that attend to too few keys or to too many.

Jha & Reagen, arXiv 2501.03489, Algorithm 1. With a_ij the weights of query i of a sequence b of N tokens:

    H_i = - sum_j a_ij log a_ij                       the entropy of a query, in nats
    E(b, l, h) = 1/N sum_i H_i                        of a head h of a layer l
    d = E - theta(l, h) E_max,   E_max = log N        how far it is from its threshold
    penalty(b, l, h) = d^2 where |d| > gamma E_max, else 0

of which the mean over heads, then over layers, then over sequences enters the loss, times lambda. theta is learned.
Single-device code; where heads, layers, sequences or parts of them are spread, `parallel/entropy.py` adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.attention import AttentionMap

QUERIES_AT_ONCE = 256

Reduction = Literal["mean", "per_query_sum"]
Normaliser = Literal["length", "seen"]


def query_entropies(weights: AttentionMap, queries_at_once: int = QUERIES_AT_ONCE) -> Tensor:
    """Entropy of each query's weights over the keys it sees: `[B, H, N]`, nats, fp32 or wider, differentiable.

    What is not normalised is normalised first, and an extra logit, which is no token, is left out. A block of queries
    is computed at a time, and again in backward, so that no more than `[B, H, queries_at_once, M]` is ever held.
    """
    blocks = torch.arange(weights.q_BNHd.shape[1], device=weights.q_BNHd.device).split(queries_at_once)
    again = partial(checkpoint, _entropies_of, weights, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(queries_R) for queries_R in blocks], dim=-1)


def _entropies_of(weights: AttentionMap, queries_R: Tensor) -> Tensor:
    """`[B, H, R]`"""
    unseen_BHRM = (raw_BHRM := weights.log_weights(queries_R)) == -torch.inf
    # A query that sees nothing has no weights to speak of: all alike instead, none of which is then counted.
    log_BHRM = raw_BHRM.masked_fill(unseen_BHRM.all(-1, keepdim=True), 0.0).log_softmax(-1)
    return -(log_BHRM.exp() * log_BHRM.masked_fill(unseen_BHRM, 0.0)).sum(-1)


def keys_seen(weights: AttentionMap, queries_at_once: int = QUERIES_AT_ONCE) -> Tensor:
    """How many keys each query sees: int64 `[B or 1, 1, N]`."""
    blocks = torch.arange(weights.q_BNHd.shape[1], device=weights.q_BNHd.device).split(queries_at_once)
    return torch.cat([weights.visible.of(queries_R).sum(-1) for queries_R in blocks], dim=-1)


@dataclass(frozen=True)
class Penalties:
    """The penalties of some sequences and heads of one layer, neither averaged nor weighted.

    Attributes:
        sum_H: summed over sequences (and queries, under "per_query_sum").
        by_entropy_BHN: derivative of all of them with respect to each query's entropy.
        by_threshold_H: and with respect to the thresholds.
    """

    sum_H: Tensor
    by_entropy_BHN: Tensor
    by_threshold_H: Tensor


@dataclass(frozen=True)
class EntropyPenalty:
    """What is penalised, and how much it weighs.

    Attributes:
        weight: lambda.
        margin: gamma; within so much of E_max around its threshold a head is left alone.
        threshold: initial theta.
        reduction: "mean" as above; "per_query_sum" penalises each query's entropy and sums over queries and sequences,
            as the code does that was released with the paper (heads and layers are averaged all the same).
        normaliser: "length": E_max is log N for every query, although a causal one sees fewer. "seen": each query's
            entropy is divided by the log of the number of keys it sees, those that see one are left out, and E_max is
            1.
    """

    weight: float
    margin: float = 0.2
    threshold: float = 0.5
    reduction: Reduction = "mean"
    normaliser: Normaliser = "length"
    queries_at_once: int = QUERIES_AT_ONCE

    @torch.no_grad()
    def penalties(
        self,
        entropies_BHN: Tensor,
        seen_B1N: Tensor,
        threshold_H: Tensor,
        length: int,
        sum_pieces: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Penalties:
        """Penalties and their derivatives, of what `query_entropies` and `keys_seen` give.

        Args:
            length: N of whole rows.
            sum_pieces: where rows are cut along N and these are pieces of them: sums over the pieces. Under "mean" the
                result is then that of whole rows, the same for each of their pieces, but for the derivatives
                with respect to the entropies here.
        """
        rate_B1N = torch.ones_like(seen_B1N, dtype=entropies_BHN.dtype)
        highest = math.log(length)
        if self.normaliser == "seen":
            rate_B1N = torch.where(seen_B1N > 1, 1 / seen_B1N.clamp(min=2).to(entropies_BHN.dtype).log(), 0.0)
            highest = 1.0
        levels_BHN, counts_B1N = entropies_BHN * rate_B1N, rate_B1N > 0
        if self.reduction == "mean":
            sums = torch.cat((levels_BHN, counts_B1N.expand(len(levels_BHN), -1, -1)), dim=1).sum(-1, keepdim=True)
            sums_BH1, number_B11 = sum_pieces(sums).split([levels_BHN.shape[1], 1], dim=1)
            # A sequence in which no query sees a second key has no level, and no penalty.
            counts_B1N, number_B11 = number_B11 > 0, number_B11.clamp(min=1)
            levels_BHN, rate_B1N = sums_BH1 / number_B11, rate_B1N / number_B11
        apart_BHN = levels_BHN - threshold_H[:, None].to(levels_BHN.dtype) * highest
        apart_BHN = torch.where((apart_BHN.abs() > self.margin * highest) & counts_B1N, apart_BHN, 0.0)
        return Penalties(apart_BHN.square().sum((0, 2)), 2 * apart_BHN * rate_B1N, -2 * highest * apart_BHN.sum((0, 2)))
