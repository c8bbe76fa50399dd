"""Gated feed-forwards: down(activation(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from kernels.fused.glu import glu
from model.context import Context
from model.layer import FeedForward, HFName, Site


@dataclass
class GatedConfig:
    """`[feedforwards.swiglu]`, `[feedforwards.sglu]`"""

    d_ff: int
    """Hidden width."""

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        return [] if self.d_ff >= 1 else [f"d_ff = {self.d_ff} must be at least 1."]

    def tensor_parallel_units(self) -> dict[str, int]:
        """What tp must divide."""
        return {"d_ff": self.d_ff}


class SGLU(FeedForward):
    """down(gate(x) * up(x)), without activation (TransNormerLLM, arXiv 2405.17381, Eq. 12).

    The product of two linear maps grows as the square of its input: it wants a pre-norm, and bf16 rather than fp16.
    """

    Config = GatedConfig
    activation: ClassVar[str] = "none"
    sharding = {
        "gate.weight": "column",
        "up.weight": "column",
        "down.weight": "row",
        "gate.bias": "column",
        "up.bias": "column",
        "down.bias": "replicate",
    }
    hf: ClassVar[Mapping[str, HFName]] = {
        f"{ours}.{kind}": f"channel_mixer.{theirs}.{kind}"
        for ours, theirs in (("gate", "l1"), ("up", "l2"), ("down", "l3"))
        for kind in ("weight", "bias")
    }

    def __init__(self, config: GatedConfig, site: Site):
        super().__init__(config, site)
        self.gate = nn.Linear(site.d_model, config.d_ff, bias=site.bias)
        self.up = nn.Linear(site.d_model, config.d_ff, bias=site.bias)
        self.down = nn.Linear(config.d_ff, site.d_model, bias=site.bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.down(glu(self.gate(x), self.up(x), self.activation))

    def flops(self, n: int) -> float:
        return self.linear_flops()


class SwiGLU(SGLU):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    activation = "silu"
    hf = {f"{x}.{kind}": f"mlp.{x}_proj.{kind}" for x in ("gate", "up", "down") for kind in ("weight", "bias")}
