"""MiniMax: Lightning attention as MiniMax-01 has it, with activated values, a weighted norm and a sigmoid gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lightning import lightning_attention_recurrent
from model.context import Context
from model.layer import Packed, Site
from model.mixers.lightning import Lightning, LightningConfig
from model.norms import make_norm


@dataclass
class MiniMaxConfig:
    """`[mixers.minimax]`"""

    num_heads: int
    """Heads of queries, keys, values and gates."""
    head_dim: int | None = None
    """Width of a head. Default: model.d_model / num_heads."""

    def as_lightning(self) -> LightningConfig:
        """The settings of the Lightning layer underneath: MiniMax's decay, and no positions but that."""
        return LightningConfig(self.num_heads, self.head_dim, decay="alibi_layer_minimax", lrpe_layers=[])

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        return self.as_lightning().faults(d_model)

    def tensor_parallel_units(self) -> dict[str, int]:
        """What tp must divide."""
        return {"num_heads": self.num_heads}


class MiniMax(Lightning):
    """O = [(Q K^T) * decay * causal] V with Q, K, V = silu(x W_qkv);  y = W_o (RMSNorm(O) * sigmoid(x W_u)).

    MiniMax-01, arXiv 2501.08313, as in transformers. The norm is over all heads together, with a weight; nothing is
    scaled by 1/sqrt(d); there are no biases.
    """

    Config = MiniMaxConfig
    gate_activation = "sigmoid"
    examples = [{"num_heads": 4}, {"num_heads": 3, "head_dim": 6}]
    # The norm's weight is [H * e], head after head like the rows of v: cut along with them, a rank weighs the channels
    # of its own heads. ("heads" is for what has one entry, or row, a head.)
    sharding = {name: how for name, how in Lightning.sharding.items() if name != "lrpe.theta"} | {
        "norm.weight": "column"
    }
    hf = {
        f"{x}.weight": Packed("self_attn.qkv_proj.weight", part, 3, per_head=True) for part, x in enumerate("qkv")
    } | {
        "u.weight": "self_attn.output_gate.weight",
        "o.weight": "self_attn.out_proj.weight",
        "norm.weight": "self_attn.norm.weight",
    }
    no_decay = frozenset()
    # That of the class in transformers, whose configuration does not reach it: model.norm_eps is for the block's norms.
    norm_eps = 1e-6

    def __init__(self, config: MiniMaxConfig, site: Site):
        super().__init__(config.as_lightning(), site)
        self.config = config
        self.norm = make_norm("rmsnorm", config.num_heads * self.value_head_dim, self.norm_eps)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q_BNHd, k_BNHd, v_BNHe = (F.silu(z(x)).unflatten(-1, (-1, self.head_dim)) for z in (self.q, self.k, self.v))
        out_BNHe, _ = lightning_attention_recurrent(q_BNHd, k_BNHd, v_BNHe, self.slopes, documents=ctx.documents)
        wide = out_BNHe.flatten(2)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_eps) * self.norm.weight
        return self.o(normed / (1 + torch.exp(-self.u(x))))

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        q_BNHd, k_BNHd, v_BNHe = super()._project(x, ctx)
        return q_BNHd, k_BNHd, self.activation(v_BNHe)
