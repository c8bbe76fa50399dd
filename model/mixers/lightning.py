"""Lightning: the gated linear attention of TransNormerLLM, with fixed decay per head and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lightning import (
    decay_slopes,
    lightning_attention,
    lightning_attention_recurrent,
    lightning_final_state,
)
from model.context import Context
from model.layer import HFName, Mixer, Packed, Site, gate_heads, incoming_state
from model.mixers.heads import head_faults
from model.norms import gated_norm, make_norm
from model.positions import LRPE

ACTIVATIONS = {
    "silu": F.silu,
    "1+elu": lambda x: 1 + F.elu(x),
    "elu": F.elu,
    "relu": F.relu,
    "none": lambda x: x,
}


@dataclass
class LightningConfig:
    """`[mixers.lightning]`"""

    num_heads: int
    """Heads of queries, keys, values and gates."""
    head_dim: int | None = None
    """Key width of a head (before LRPE doubles it). Default: model.d_model / num_heads."""
    value_head_dim: int | None = None
    """Value width of a head. Default: head_dim."""
    decay: Literal["alibi_layer", "alibi_layer_minimax", "paper"] = "alibi_layer"
    """Decay schedule: that of the released code, that of MiniMax, or the formula printed in the paper."""
    lrpe_layers: list[int] = field(default_factory=lambda: [0])
    """Global indices of the layers whose queries and keys carry positions (LRPE); the others know decay alone."""
    activation: Literal["silu", "1+elu", "elu", "relu", "none"] = "silu"
    """Feature map of queries and keys."""

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        widths = {"head_dim": self.head_dim, "value_head_dim": self.value_head_dim}
        faults = head_faults(d_model, self.num_heads, **widths)
        if any(layer < 0 for layer in self.lrpe_layers):
            faults.append(f"lrpe_layers = {self.lrpe_layers} must be layer indices from 0.")
        return faults

    def tensor_parallel_units(self) -> dict[str, int]:
        """What tp must divide."""
        return {"num_heads": self.num_heads}


class Lightning(Mixer):
    """O = [(phi(Q) phi(K)^T) * decay * causal] V;  y = W_o (SRMSNorm(O) * U).

    TransNormerLLM, arXiv 2405.17381, Eq. 11. The norm is over all heads together; V and U have no activation; nothing
    is scaled by 1/sqrt(d); there are no biases.
    """

    Config: ClassVar[type] = LightningConfig
    context = "state"
    bidirectional = False
    full_width_norm = "norm"
    gate_activation = "none"
    examples = [
        {"num_heads": 4},
        {"num_heads": 2, "head_dim": 6, "value_head_dim": 10, "lrpe_layers": []},
        {"num_heads": 4, "decay": "paper", "lrpe_layers": [0, 1], "activation": "1+elu"},
    ]
    sharding = {
        "q.weight": "column",
        "k.weight": "column",
        "v.weight": "column",
        "u.weight": "column",
        "o.weight": "row",
        "lrpe.theta": "heads",
        "slopes": "heads",
    }
    hf: ClassVar[Mapping[str, HFName]] = {
        f"{x}.weight": Packed("token_mixer.qkvu_proj.weight", part, 4) for part, x in enumerate("qkvu")
    } | {
        "o.weight": "token_mixer.out_proj.weight",
        "lrpe.theta": "token_mixer.lrpe.theta",
    }
    no_decay = frozenset({"lrpe.theta"})

    def __init__(self, config: LightningConfig, site: Site):
        super().__init__(config, site)
        heads = config.num_heads
        self.head_dim = config.head_dim or site.d_model // heads
        self.value_head_dim = config.value_head_dim or self.head_dim
        self.q = nn.Linear(site.d_model, heads * self.head_dim, bias=False)
        self.k = nn.Linear(site.d_model, heads * self.head_dim, bias=False)
        self.v = nn.Linear(site.d_model, heads * self.value_head_dim, bias=False)
        self.u = nn.Linear(site.d_model, heads * self.value_head_dim, bias=False)
        self.o = nn.Linear(heads * self.value_head_dim, site.d_model, bias=False)
        self.lrpe = LRPE(heads, self.head_dim) if site.layer in config.lrpe_layers else None
        self.norm = make_norm("srmsnorm", heads * self.value_head_dim, site.norm_eps)
        self.activation = ACTIVATIONS[config.activation]
        self._all_slopes = decay_slopes(config.decay, heads, site.layer, site.num_layers)
        self.slopes: Tensor
        self.register_buffer("slopes", torch.empty(heads), persistent=False)
        self.remake_buffers()

    def remake_buffers(self) -> None:
        self.slopes = torch.tensor(self._all_slopes, dtype=torch.float32, device=self.slopes.device)

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        q_BNHd, k_BNHd, v_BNHe = self._project(x, ctx)
        out_BNHe, state_BHde = lightning_attention(
            q_BNHd,
            k_BNHd,
            v_BNHe,
            self.slopes,
            initial_state=incoming_state(
                ctx, cache, lambda: lightning_final_state(k_BNHd, v_BNHe, self.slopes, ctx.documents), self.slopes
            ),
            documents=ctx.documents,
        )
        if cache is not None:
            cache["state"] = state_BHde
        gated_BNV = gated_norm(self.norm, out_BNHe.flatten(2), self.u(x), self.gate_activation)
        gated_BNHe = gated_BNV.unflatten(-1, (-1, self.value_head_dim))
        return self.o(gate_heads(gated_BNHe, head_gate).flatten(2))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q_BNHd, k_BNHd, v_BNHe = self._project(x, ctx)
        out_BNHe, _ = lightning_attention_recurrent(q_BNHd, k_BNHd, v_BNHe, self.slopes, documents=ctx.documents)
        wide = out_BNHe.flatten(2)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.site.norm_eps)
        return self.o(normed * self.u(x))

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys `[B, N, H, d]` (`2d` with LRPE), values `[B, N, H, e]`."""
        q_BNHd = self.activation(self.q(x)).unflatten(-1, (-1, self.head_dim))
        k_BNHd = self.activation(self.k(x)).unflatten(-1, (-1, self.head_dim))
        v_BNHe = self.v(x).unflatten(-1, (-1, self.value_head_dim))
        if self.lrpe is not None:
            q_BNHd, k_BNHd = self.lrpe(q_BNHd, ctx.positions), self.lrpe(k_BNHd, ctx.positions)
        return q_BNHd, k_BNHd, v_BNHe

    def flops(self, n: int) -> float:
        key_dim = self.head_dim * (1 if self.lrpe is None else 2)
        return self.linear_flops() + 4 * key_dim * self.value_head_dim * self.config.num_heads
