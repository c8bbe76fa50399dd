"""NormLinear: the linear attention of TransNormer, normed instead of divided by the sum of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.lightning import lightning_attention, lightning_attention_recurrent, lightning_final_state
from model.context import Context
from model.initialisation import Computed, Init
from model.layer import Mixer, Site, gate_heads, incoming_state
from model.mixers.heads import PROJECTIONS, head_faults, rotation_faults
from model.mixers.lightning import ACTIVATIONS
from model.norms import make_norm
from model.positions import Angles, rotary_table, rotate


@dataclass
class NormLinearConfig:
    """`[mixers.norm_linear]`"""

    num_heads: int
    """Heads of queries, keys and values."""
    head_dim: int | None = None
    """Key width of a head. Default: model.d_model / num_heads."""
    value_head_dim: int | None = None
    """Value width of a head. Default: head_dim."""
    activation: Literal["1+elu", "elu", "silu", "relu", "none"] = "1+elu"
    """Feature map of queries and keys: 1+elu in TransNormer T2, elu in T1."""
    norm: Literal["srmsnorm", "rmsnorm"] = "srmsnorm"
    """The norm over all heads together; rmsnorm has a learned weight."""
    rotation: Literal["learned", "fixed", "none"] = "learned"
    """Angles by which queries and keys are turned, where model.positions = "rope"; none: no positions."""
    reflection: bool = True
    """Before the rotation, reflect at a fixed random plane, one for each layer."""
    rope_theta: float = 10000.0
    """Base of the angles, or of their initial values."""

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        widths = {"head_dim": self.head_dim, "value_head_dim": self.value_head_dim}
        faults = head_faults(d_model, self.num_heads, **widths)
        if self.rotation != "none":
            faults += rotation_faults(d_model, self.num_heads, self.head_dim, ', or rotation = "none"')
        if self.rope_theta <= 0:
            faults.append(f"rope_theta = {self.rope_theta} must be above 0: 10000 is usual.")
        return faults

    def tensor_parallel_units(self) -> dict[str, int]:
        """What tp must divide."""
        return {"num_heads": self.num_heads}


class NormLinear(Mixer):
    """O = [(phi(Q) phi(K)^T) * causal] V;  y = W_o Norm(O).

    NormAttention of TransNormer, arXiv 2210.10340, section 4: no decay, no scale and no row normaliser, but a norm over
    all heads together. Positions, where there are any, are a rotation after phi (by learned angles, behind a fixed
    reflection, in the published configurations). The norm's eps stands inside the root, as everywhere here; the
    released code adds 1e-8 outside of it.
    """

    Config = NormLinearConfig
    context = "state"
    bidirectional = False
    full_width_norm = "norm"
    examples = [
        {"num_heads": 4},
        {"num_heads": 4, "activation": "elu"},
        {"num_heads": 2, "head_dim": 5, "value_head_dim": 10, "activation": "silu", "rotation": "none"},
        {"num_heads": 2, "head_dim": 6, "norm": "rmsnorm", "rotation": "fixed", "reflection": False},
    ]
    sharding = {
        **PROJECTIONS,
        "norm.weight": "column",
        "angles.theta": "replicate",
        "reflector": "replicate",
    }
    hf = {f"{x}.{kind}": f"token_mixer.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")} | {
        "o.weight": "token_mixer.out_proj.weight",
        "o.bias": "token_mixer.out_proj.bias",
        "norm.weight": "token_mixer.norm.weight",
        "angles.theta": "token_mixer.urpe.theta",
    }
    no_decay = frozenset({"angles.theta"})

    def __init__(self, config: NormLinearConfig, site: Site):
        super().__init__(config, site)
        heads = config.num_heads
        self.head_dim = config.head_dim or site.d_model // heads
        self.value_head_dim = config.value_head_dim or self.head_dim
        self.q = nn.Linear(site.d_model, heads * self.head_dim, bias=site.bias)
        self.k = nn.Linear(site.d_model, heads * self.head_dim, bias=site.bias)
        self.v = nn.Linear(site.d_model, heads * self.value_head_dim, bias=site.bias)
        self.o = nn.Linear(heads * self.value_head_dim, site.d_model, bias=site.bias)
        self.norm = make_norm(config.norm, heads * self.value_head_dim, site.norm_eps)
        self.activation = ACTIVATIONS[config.activation]
        self.rotation = config.rotation if site.positions == "rope" else "none"
        self.angles = LearnedAngles(self.head_dim, config.rope_theta) if self.rotation == "learned" else None
        self._rotary = ("rotary", self.head_dim, config.rope_theta)
        # Queries and keys are reflected alike, so without a rotation in between nothing would change.
        reflected = config.reflection and self.rotation != "none"
        self.reflector: Tensor | None
        self.register_buffer("reflector", torch.empty(self.head_dim) if reflected else None, persistent=False)
        self.remake_buffers()

    def remake_buffers(self) -> None:
        if self.reflector is not None:
            self.reflector = unit_vector(self.head_dim, self.site.layer).to(self.reflector.device)

    def prepare(self, ctx: Context) -> None:
        if self.rotation == "fixed":
            ctx.share(self._rotary, lambda: rotary_table(ctx.positions, self.head_dim, self.config.rope_theta))

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        q_BNHd, k_BNHd, v_BNHe = self._project(x, ctx)
        slopes_H = no_slopes(q_BNHd)
        out_BNHe, state_BHde = lightning_attention(
            q_BNHd,
            k_BNHd,
            v_BNHe,
            slopes_H,
            initial_state=incoming_state(
                ctx, cache, lambda: lightning_final_state(k_BNHd, v_BNHe, slopes_H, ctx.documents), None
            ),
            documents=ctx.documents,
        )
        if cache is not None:
            cache["state"] = state_BHde
        normed_BNHe = self.norm(out_BNHe.flatten(2)).unflatten(-1, (-1, self.value_head_dim))
        return self.o(gate_heads(normed_BNHe, head_gate).flatten(2))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q_BNHd, k_BNHd, v_BNHe = self._project(x, ctx)
        slopes_H = no_slopes(q_BNHd)
        out_BNHe, _ = lightning_attention_recurrent(q_BNHd, k_BNHd, v_BNHe, slopes_H, documents=ctx.documents)
        wide = out_BNHe.flatten(2)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.site.norm_eps)
        return self.o(normed * getattr(self.norm, "weight", 1.0))

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys `[B, N, H, d]`, activated and then turned; values `[B, N, H, e]`."""
        q_BNHd = self.activation(self.q(x)).unflatten(-1, (-1, self.head_dim))
        k_BNHd = self.activation(self.k(x)).unflatten(-1, (-1, self.head_dim))
        v_BNHe = self.v(x).unflatten(-1, (-1, self.value_head_dim))
        if self.rotation != "none":
            table = ctx.shared[self._rotary] if self.angles is None else self.angles(ctx.positions)
            q_BNHd, k_BNHd = self._turn(q_BNHd, table), self._turn(k_BNHd, table)
        return q_BNHd, k_BNHd, v_BNHe

    def _turn(self, x_BNHd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Reflect and rotate, in fp32 or wider; the result is in the dtype of x."""
        wide = x_BNHd.to(torch.promote_types(x_BNHd.dtype, torch.float32))
        if self.reflector is not None:
            wide = wide - 2 * (wide * self.reflector).sum(-1, keepdim=True) * self.reflector
        return rotate(wide, table).to(x_BNHd.dtype)

    def flops(self, n: int) -> float:
        return self.linear_flops() + 4 * self.head_dim * self.value_head_dim * self.config.num_heads


class LearnedAngles(Angles):
    """The table of a rotation by learned angles theta `[d / 2]`, the same for all heads.

    They begin as the rotary frequencies base^(-2j / d) (arXiv 2104.09864).
    """

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.base = base
        self.theta = nn.Parameter(torch.empty(head_dim // 2))

    def forward(self, positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[B, N, 1, d / 2]` of position times angle, computed in fp64, in the dtype of theta."""
        angles = positions_BN[..., None, None].double() * self.theta.double()
        return angles.cos().to(self.theta.dtype), angles.sin().to(self.theta.dtype)

    def init_weights(self) -> dict[str, Init]:
        return {"theta": Computed(self._ladder)}

    def _ladder(self, shape: torch.Size) -> Tensor:
        """The initial theta: one step of the ladder for each pair of channels."""
        return self.base ** -(torch.arange(shape[0], dtype=torch.float64) / shape[0])


def unit_vector(width: int, layer: int) -> Tensor:
    """A direction `[width]`, fp32 on the CPU, that depends on the global index of the layer and on nothing else.

    A model is not the same with another vector, and it is in no checkpoint: how it is drawn must never change.
    """
    generator = torch.Generator(device="cpu").manual_seed(layer)
    vector = torch.randn(width, generator=generator, dtype=torch.float64, device="cpu")
    return (vector / vector.norm()).float()


def no_slopes(q_BNHd: Tensor) -> Tensor:
    """Decay slopes `[H]` of heads that forget nothing, as many as this process holds."""
    return q_BNHd.new_zeros(q_BNHd.shape[2], dtype=torch.float32)
