"""The feed-forward of GPT: down(gelu(up(x)))."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context
from model.feedforward.gated import GatedConfig
from model.layer import FeedForward, Site, Transposed


@dataclass
class GeluConfig(GatedConfig):
    """`[feedforwards.gelu]`"""

    tanh: bool = True
    """The tanh approximation, as in GPT-2 and Megatron-LM, rather than the exact error function."""


class GeluMLP(FeedForward):
    """down(gelu(up(x))) (arXiv 1606.08415)."""

    Config = GeluConfig
    sharding = {"up.weight": "column", "up.bias": "column", "down.weight": "row", "down.bias": "replicate"}
    hf = {
        "up.weight": Transposed("mlp.c_fc.weight"),
        "up.bias": "mlp.c_fc.bias",
        "down.weight": Transposed("mlp.c_proj.weight"),
        "down.bias": "mlp.c_proj.bias",
    }

    def __init__(self, config: GeluConfig, site: Site):
        super().__init__(config, site)
        self.up = nn.Linear(site.d_model, config.d_ff, bias=site.bias)
        self.down = nn.Linear(config.d_ff, site.d_model, bias=site.bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.config.tanh else "none"))

    def flops(self, n: int) -> float:
        return self.linear_flops()
