"""Softmax attention by torch's fused form, with room for something that takes weight and gives nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The width of a head stays a multiple of what fused kernels want.
_EXTRA_CHANNELS = 8


def softmax_attention(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGd: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    extra_BNH: Tensor | None = None,
) -> Tensor:
    """o_i = sum_j exp(S_ij) v_j / (exp(extra_i) + sum_j exp(S_ij)) with S = q k^T / sqrt(d); `[B, N, H, d]`.

    That is out_i * sigmoid(lse_i - extra_i), of the attention without it and the logarithm of its sums: but fused
    attention does not hand on the gradient of that logarithm. So the extra logit becomes the score of one key more,
    before all others, with a value of zero, which queries reach through a channel of its own: it is a column, and
    nothing else of the attention changes.

    Args:
        mask: bool `[B or 1, 1, N, M]`, which of the M keys each query sees; with `extra_BNH` `[B or 1, 1, N, M + 1]`,
            the first of them always. None where all are seen, or all up to its own (`is_causal`, N = M).
        extra_BNH: finite logits. Default: nothing is added to the sums.
    """
    head_dim = q_BNHd.shape[3]
    if extra_BNH is not None:
        q_BNHd, k_BMGd, v_BMGd = _with_extra_key(q_BNHd, k_BMGd, v_BMGd, extra_BNH * head_dim**0.5, is_causal)
    out_BHNd = F.scaled_dot_product_attention(
        q_BNHd.transpose(1, 2),
        k_BMGd.transpose(1, 2),
        v_BMGd.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=head_dim**-0.5,
        enable_gqa=q_BNHd.shape[2] != k_BMGd.shape[2],
    )
    out_BNHd = out_BHNd.transpose(1, 2)
    if extra_BNH is None:
        return out_BNHd
    return out_BNHd[:, int(is_causal) :, :, :head_dim]


def _with_extra_key(
    q_BNHd: Tensor, k_BMGd: Tensor, v_BMGd: Tensor, score_BNH: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with more channels and a key before the others, whose products are these scores.

    Where a mask is not given but causal, a query goes before the others as well, so that each still has as many keys
    up to its own as there are queries up to it.
    """
    channel = F.pad(score_BNH.to(q_BNHd.dtype).unsqueeze(-1), (0, _EXTRA_CHANNELS - 1))
    q_BNHd = F.pad(torch.cat((q_BNHd, channel), dim=-1), (0, 0, 0, 0, int(is_causal), 0))
    # One more channel is 1 in the first key and 0 in all others.
    first_B1Gd = F.pad(torch.zeros_like(k_BMGd[:, :1]), (0, 1), value=1.0)
    k_BMGd = torch.cat((first_B1Gd, F.pad(k_BMGd, (0, 1))), dim=1)
    k_BMGd = F.pad(k_BMGd, (0, _EXTRA_CHANNELS - 1))
    v_BMGd = F.pad(v_BMGd, (0, _EXTRA_CHANNELS, 0, 0, 1, 0))
    return q_BNHd, k_BMGd, v_BMGd
