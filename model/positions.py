"""Positions: rotary embedding (RoPE) and linearised relative positions (LRPE). Angles are computed in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.initialisation import Computed, Init


def rotary_table(positions_BN: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin `[B, N, 1, head_dim / 2]`, fp32, of position times theta^(-2j / head_dim) (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BN.device) / head_dim
    angles = positions_BN[..., None, None].double() * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x_BNHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs (j, j + d/2), the order of the Llama checkpoints in Hugging Face."""
    cos, sin = table
    wide = torch.promote_types(x_BNHd.dtype, cos.dtype)
    first, second = x_BNHd.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BNHd.dtype)


class Angles(nn.Module):
    """Parameters that stay fp32 or wider whatever the model is cast to: angles at large positions need it."""

    keep_fp32 = True

    def _apply(self, fn: Any, recurse: bool = True) -> Angles:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keep_wide, recurse)


class LRPE(Angles):
    """Linearised relative position encoding with learned angles: x -> [x cos(theta t), x sin(theta t)].

    Doubles the key width: the product of two encoded vectors is sum_j q_j k_j cos(theta_j (t - s))
    (TransNormerLLM, arXiv 2405.17381, section 4.2). The initial theta is one ladder over all channels of all heads:
    theta_{h,j} = 10000^(-2 (h d + j) / (H d)), as in the released code.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, head_dim))

    def forward(self, x_BNHd: Tensor, positions_BN: Tensor) -> Tensor:
        """`[B, N, H, d]` -> `[B, N, H, 2d]` in the dtype of x."""
        angles = positions_BN[..., None, None].double() * self.theta.double()
        wide = torch.promote_types(x_BNHd.dtype, torch.float32)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        return torch.cat((x_BNHd * cos, x_BNHd * sin), dim=-1).to(x_BNHd.dtype)

    def init_weights(self) -> dict[str, Init]:
        return {"theta": Computed(lrpe_ladder)}


def lrpe_ladder(shape: torch.Size) -> Tensor:
    """The initial theta `[H, d]`."""
    channels = torch.arange(shape.numel(), dtype=torch.float64)
    return (10000.0 ** (-2.0 * channels / shape.numel())).reshape(shape)
