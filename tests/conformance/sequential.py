"""A mixer as a user might bring it, for the tests: nothing but a loop over all tokens can compute it, so where the
sequence is cut it trades its piece for a part of the heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.context import Context
from model.initialisation import Init, Normal
from model.layer import Mixer, Site, gate_heads


@dataclass
class SequentialConfig:
    num_heads: int

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"num_heads": self.num_heads}


class Sequential(Mixer):
    """h_t = tanh(v_t + a_h h_(t-1)), cleared where a document begins; one coupling a_h for each head."""

    Config: ClassVar[type] = SequentialConfig
    context = "heads"
    bidirectional = False
    sharding = {"v.weight": "column", "v.bias": "column", "coupling": "heads", "o.weight": "row", "o.bias": "replicate"}

    def __init__(self, config: SequentialConfig, site: Site):
        super().__init__(config, site)
        self.head_dim = site.d_model // config.num_heads
        self.v = nn.Linear(site.d_model, site.d_model, bias=site.bias)
        self.o = nn.Linear(site.d_model, site.d_model, bias=site.bias)
        self.coupling = nn.Parameter(torch.empty(config.num_heads))

    def init_weights(self) -> dict[str, Init]:
        return super().init_weights() | {"coupling": Normal(1.0)}

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        v_BNHd = ctx.cut.to_heads(self.v(x).unflatten(-1, (-1, self.head_dim)))
        coupling_H1 = ctx.cut.heads_here(self.coupling)[:, None]
        documents_BN = ctx.key_documents
        state_BHd, out = torch.zeros_like(v_BNHd[:, 0]), []
        for t in range(v_BNHd.shape[1]):
            if documents_BN is not None and t > 0:
                state_BHd = state_BHd * (documents_BN[:, t] == documents_BN[:, t - 1])[:, None, None]
            state_BHd = torch.tanh(v_BNHd[:, t] + coupling_H1 * state_BHd)
            out.append(state_BHd)
        out_BNHd = ctx.cut.from_heads(torch.stack(out, dim=1))
        return self.o(gate_heads(out_BNHd, head_gate).flatten(2))

    def flops(self, n: int) -> float:
        return self.linear_flops()


class Forgetful(Sequential):
    """Says the same, and takes its piece for the whole."""

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        return self.o(self.v(x).cumsum(1))
