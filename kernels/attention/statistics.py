"""Statistics of attention weights: entropy, largest logit, what the first key gets, sinks.

All are computed from blocks of log weights `[B, H, R, M]` of a few queries, -inf where a query does not see a key: no
map of all queries by all keys is ever made. Definitions and sources are in docs/diagnostics.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowStatistics(NamedTuple):
    """Of each query (row) and head, `[B, H, R]`; floats are as wide as the log weights.

    Attributes:
        keys: how many keys the row sees, int64.
        entropy: of its weights over tokens, divided by their sum, in nats: 0 to log(keys).
        entropy_norm: entropy / log(keys), 0 to 1; 0 where the row sees one key only, which no mean may count.
        logit_max: its largest log weight.
        effective_keys: 1 / sum of the squared weights (divided by their sum): 1 to keys.
        first_weight: the weight of the first key of the row's own document.
        mass: the sum of its weights: 1 for softmax, less where something that is no token takes a part, and whatever
            it comes to where weights are not divided by their sum.
    """

    keys: Tensor
    entropy: Tensor
    entropy_norm: Tensor
    logit_max: Tensor
    effective_keys: Tensor
    first_weight: Tensor
    mass: Tensor


def row_statistics(
    log_weights_BHRM: Tensor, first_BR: Tensor, extra_BHR: Tensor | None = None, *, normalised: bool = True
) -> RowStatistics:
    """Statistics of each row.

    Args:
        log_weights_BHRM: fp32 or wider; -inf where nothing is seen.
        first_BR: index among the M of the first key of the row's document, int64.
        extra_BHR: logit of something that is no token, which takes weight.
        normalised: whether weights are divided by their sum.
    """
    keys = (log_weights_BHRM > -torch.inf).sum(-1)
    weights = _shifted(log_weights_BHRM)
    # H = log sum - sum p S, with S less its largest: where a row has collapsed, both terms are near 0 by themselves.
    # (What is not seen has a weight of 0, and any finite number in place of its -inf.)
    finite_BHRM = weights.log_BHRM.clamp(min=torch.finfo(log_weights_BHRM.dtype).min)
    mean_log_BHR = (weights.exp_BHRM * finite_BHRM).sum(-1) / weights.sum_BHR
    entropy_BHR = (weights.sum_BHR.log() - mean_log_BHR).clamp(min=0.0)
    log_keys = keys.to(entropy_BHR.dtype).clamp(min=1.0).log()
    first_BHR = weights.exp_BHRM.gather(-1, first_BR[:, None, :, None].expand(*keys.shape, 1))[..., 0]
    lse_BHR = weights.largest_BHR + weights.sum_BHR.log()
    mass_BHR = row_mass(lse_BHR, extra_BHR, normalised=normalised)
    return RowStatistics(
        keys=keys,
        entropy=entropy_BHR,
        entropy_norm=entropy_BHR / log_keys.masked_fill(log_keys == 0.0, torch.inf),
        logit_max=weights.largest_BHR,
        effective_keys=weights.sum_BHR.square() / weights.exp_BHRM.square().sum(-1),
        first_weight=first_BHR / weights.sum_BHR * (mass_BHR if normalised else 1.0),
        mass=mass_BHR,
    )


def row_mass(lse_BHR: Tensor, extra_BHR: Tensor | None, *, normalised: bool) -> Tensor:
    """The sum of each row's weights, from the log of the sum of their exponentials."""
    if not normalised:
        return lse_BHR.exp()
    if extra_BHR is None:
        return torch.ones_like(lse_BHR)
    return torch.sigmoid(lse_BHR - extra_BHR)


def sink_weights(log_weights_BHRM: Tensor, extra_BHR: Tensor | None = None, *, normalised: bool = True) -> Tensor:
    """The weights `[B, H, R, M]` of which sinks are measured.

    Weights that are not divided by their sum are, for this purpose. What something that is no token takes is left out
    as a column, and the row is not filled up for it: there a model may put what would be a sink.
    """
    weights = _shifted(log_weights_BHRM)
    total_BHR = weights.sum_BHR
    if extra_BHR is not None and normalised:
        total_BHR = total_BHR + (extra_BHR - weights.largest_BHR).exp()
    return weights.exp_BHRM / total_BHR[..., None]


def sink_scores(sums: Tensor) -> Tensor:
    """alpha_k, the mean weight of key k over the queries from k on (Gu et al. 2025, arXiv 2410.10781).

    Args:
        sums: `[..., T]`, the weights of each key of a causal window of T tokens summed over its T queries.
    """
    length = sums.shape[-1]
    return sums / torch.arange(length, 0, -1, device=sums.device)


class _Shifted(NamedTuple):
    """Log weights less the largest of their row, that largest one, their exponentials and the sum of those (>= 1)."""

    log_BHRM: Tensor
    largest_BHR: Tensor
    exp_BHRM: Tensor
    sum_BHR: Tensor


def _shifted(log_weights_BHRM: Tensor) -> _Shifted:
    largest_BHR = log_weights_BHRM.amax(-1)
    # A row that sees nothing has weights of 0 with a sum of 1, and nothing that is not a number.
    largest_BHR = largest_BHR.masked_fill(largest_BHR == -torch.inf, 0.0)
    log_BHRM = log_weights_BHRM - largest_BHR[..., None]
    exp_BHRM = log_BHRM.exp()
    return _Shifted(log_BHRM, largest_BHR, exp_BHRM, exp_BHRM.sum(-1).clamp(min=1.0))
