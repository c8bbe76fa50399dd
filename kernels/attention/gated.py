"""stand-in until the kernel lands"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.visible import Visible


def gated_attention(q, k, v, gate, head_index=None, *, selected=None, visible: Visible, scale: float) -> Tensor:
    n = q.shape[1]
    plain = visible.documents is None and visible.window is None and visible.num_queries == visible.num_keys
    mask = None if plain else visible.of(torch.arange(n, device=q.device))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain and visible.causal and n > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    if selected is not None:
        out = out.masked_fill(~selected[..., None], 0)
    return out if gate is None else (out * gate.unsqueeze(-1)).to(v.dtype)
