"""Norms. torch computes their statistics in fp32 (or the input's own type when wider) and casts the result back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fused.norm_gate import activate_gate, norm_gate
from model.initialisation import Constant, Init


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without weight or bias (TransNormerLLM, arXiv 2405.17381, Eq. 14)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), eps=self.eps)

    def init_weights(self) -> dict[str, Init]:
        return {}


class RMSNorm(SimpleRMSNorm):
    """SimpleRMSNorm times a learned weight `[width]` (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)

    def init_weights(self) -> dict[str, Init]:
        return {"weight": Constant(1.0)}


class LayerNorm(nn.Module):
    """Mean and variance normalised, with weight and bias (arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)

    def init_weights(self) -> dict[str, Init]:
        return {"weight": Constant(1.0), "bias": Constant(0.0)}


NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm, "srmsnorm": SimpleRMSNorm, "layernorm": LayerNorm}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """The norm named `kind` over `width` channels."""
    return NORMS[kind](width, eps)


def gated_norm(norm: nn.Module, x: Tensor, gate: Tensor, activation: str = "none") -> Tensor:
    """norm(x) * act(gate), in one pass where the norm is a root mean square over the last dimension of x.

    Another may stand in its place (`Mixer.full_width_norm`): one that comes after, or is for each modality.

    Args:
        x, gate: `[..., W]`. activation: of the gate: none, sigmoid or silu.
    """
    if type(norm) in (SimpleRMSNorm, RMSNorm):
        return norm_gate(x, gate, getattr(norm, "weight", None), eps=norm.eps, activation=activation)
    return norm(x) * activate_gate(gate, activation)
