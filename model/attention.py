"""The weights with which attention mixes tokens, for whoever wants to look at them or to train on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import Visible


@dataclass(frozen=True)
class AttentionMap:
    """How the queries of a mixer weigh the keys they see: computed for a few queries at a time, never for all at once.

    A weight is exp(log weight); where `normalised`, it is divided by the sum of them over all keys that the query sees,
    with exp(extra) added to that sum.

    Attributes:
        q_BNHd, k_BMGd: queries and keys as they are multiplied; each of G keys serves H / G queries.
        scale: of their products.
        form: from scores `[B, H, R, M]` (scaled products, fp32 or wider) and the indices `[R]` of their queries to log
            weights; None where they are those.
        extra_BNH: logit of something that is no token (a key bias, a sink), which takes weight and gives nothing.
        normalised: whether weights are divided by their sum (softmax), or not (sigmoid).
    """

    q_BNHd: Tensor
    k_BMGd: Tensor
    visible: Visible
    scale: float
    form: Callable[[Tensor, Tensor], Tensor] | None = None
    extra_BNH: Tensor | None = None
    normalised: bool = True

    def log_weights(self, queries_R: Tensor) -> Tensor:
        """`[B, H, R, M]`, fp32 or wider, of the queries with these indices among the N; -inf where one sees nothing."""
        wide = torch.promote_types(self.q_BNHd.dtype, torch.float32)
        q_BGHRd = self._by_group(self.q_BNHd[:, queries_R].to(wide))
        k_BGdM = self.k_BMGd.to(wide).permute(0, 2, 3, 1)
        scores_BHRM = (q_BGHRd @ k_BGdM[:, :, None]).flatten(1, 2) * self.scale
        if self.form is not None:
            scores_BHRM = self.form(scores_BHRM, queries_R)
        return scores_BHRM.masked_fill(~self.visible.of(queries_R), -torch.inf)

    def _by_group(self, q_BRHd: Tensor) -> Tensor:
        """`[B, G, H / G, R, d]`"""
        return q_BRHd.transpose(1, 2).unflatten(1, (self.k_BMGd.shape[2], -1))
