"""What mixers have in common that weigh every key by a query: projections, rotation, cache, and which keys are seen."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import Visible
from model.cache import GrowingTensor
from model.context import Context
from model.layer import Mixer, Site, gate_heads
from model.mixers.heads import PROJECTIONS, head_faults, nearest_divisor, rotation_faults
from model.norms import make_norm
from model.positions import rotary_table, rotate


@dataclass
class AttentionConfig:
    """Settings of heads of queries, and of keys and values that they may share."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads. Default: num_heads."""
    head_dim: int | None = None
    """Width of a head. Default: model.d_model / num_heads."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, before the rotation."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it. Default: all of them."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies, where model.positions = "rope"."""
    qkv_bias: bool | None = None
    """Biases on the q, k and v projections. Default: model.bias."""

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        faults = head_faults(d_model, self.num_heads, head_dim=self.head_dim)
        kv_heads = self.num_kv_heads
        if kv_heads is not None and self.num_heads >= 1 and (kv_heads < 1 or self.num_heads % kv_heads):
            faults.append(
                f"num_kv_heads = {kv_heads} does not divide num_heads = {self.num_heads}: the nearest that "
                f"does is {nearest_divisor(self.num_heads, kv_heads)}."
            )
        if self.rotated:
            faults += rotation_faults(d_model, self.num_heads, self.head_dim)
        if self.window is not None and self.window < 1:
            faults.append(f"window = {self.window} must be at least 1, the token itself.")
        return faults

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def group_size(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_heads // self.groups

    @property
    def rotated(self) -> bool:
        """Whether queries and keys are rotated where model.positions = "rope"."""
        return True

    def tensor_parallel_units(self) -> dict[str, int]:
        """What tp must divide."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.groups}


class Attention(Mixer):
    """y = W_o of what the queries' heads take from values; how they weigh them is said in `mix` and `reference`."""

    context = "kv"
    has_attention_map = True
    token_norms = frozenset({"q_norm", "k_norm"})
    sharding = {
        **PROJECTIONS,
        "q_norm.weight": "replicate",
        "k_norm.weight": "replicate",
    }
    hf = {f"{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")} | {
        f"{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"
    }

    def __init__(self, config: AttentionConfig, site: Site):
        super().__init__(config, site)
        heads, kv_heads = config.num_heads, config.groups
        self.head_dim = config.head_dim or site.d_model // heads
        qkv_bias = site.bias if config.qkv_bias is None else config.qkv_bias
        self.q = nn.Linear(site.d_model, heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(site.d_model, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(site.d_model, kv_heads * self.head_dim, bias=qkv_bias)
        self.o = nn.Linear(heads * self.head_dim, site.d_model, bias=site.bias)
        self.q_norm = make_norm("rmsnorm", self.head_dim, site.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm("rmsnorm", self.head_dim, site.norm_eps) if config.qk_norm else nn.Identity()
        rotated = site.positions == "rope" and config.rotated
        self._rotary: Hashable = ("rotary", self.head_dim, config.rope_theta) if rotated else None

    def prepare(self, ctx: Context) -> None:
        if self._rotary:
            ctx.share(self._rotary, lambda: rotary_table(ctx.positions, self.head_dim, self.config.rope_theta))

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        k_BMGd, v_BMGd = self._keys_values(x, ctx, cache)
        out_BNHd = self.mix(x, self._queries(x), k_BMGd, v_BMGd, ctx)
        return self._projected_out(x, gate_heads(out_BNHd, head_gate))

    def _projected_out(self, x: Tensor, out_BNHd: Tensor) -> Tensor:
        """`[B, N, D]` from what the heads give for the input x."""
        return self.o(out_BNHd.flatten(2))

    def mix(self, x: Tensor, q_BNHd: Tensor, k_BMGd: Tensor, v_BMGd: Tensor, ctx: Context) -> Tensor:
        """What each query takes from the values of all M keys, `[B, N, H, d]`; shows its weights to `ctx.observer`.

        Queries are as the projection gives them: `turned` makes them what is multiplied with keys.
        """
        raise NotImplementedError

    def _queries(self, x: Tensor) -> Tensor:
        """`[B, N, H, d]`, as the projection gives them."""
        return self.q(x).unflatten(-1, (-1, self.head_dim))

    def turned(self, q_BNHd: Tensor, ctx: Context) -> Tensor:
        """Queries as they are multiplied with keys: normed and rotated."""
        q_BNHd = self.q_norm(q_BNHd)
        return rotate(q_BNHd, ctx.shared[self._rotary]) if self._rotary else q_BNHd

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normed but not yet rotated, and values `[B, N, G, d]` of these tokens."""
        heads = (-1, self.head_dim)
        return self.k_norm(self.k(x).unflatten(-1, heads)), self.v(x).unflatten(-1, heads)

    def _keys_values(self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
        """Keys (normed and rotated) and values `[B, M, G, d]` of all tokens that these may see."""
        k_BNGd, v_BNGd = self._projected(x)
        if self._rotary:
            k_BNGd = rotate(k_BNGd, ctx.shared[self._rotary])
        if cache is not None:
            k_BNGd, v_BNGd = _remember(cache, k_BNGd, v_BNGd)
        return ctx.cut.keys_values(k_BNGd, v_BNGd, ctx.causal)

    def _reference_map(
        self, q_BNHd: Tensor, keys_values: tuple[Tensor, Tensor], ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For references, from queries as the projection gives them: queries and values of every head, scores
        `[B, H, N, N]`, and which keys are seen."""
        q_BNHd = self.turned(q_BNHd, ctx)
        k_BNGd, v_BNGd = keys_values
        group = q_BNHd.shape[2] // k_BNGd.shape[2]
        k_BNHd, v_BNHd = (kv.repeat_interleave(group, dim=2) for kv in (k_BNGd, v_BNGd))
        scores_BHNM = torch.einsum("bnhd,bmhd->bhnm", q_BNHd, k_BNHd) / self.head_dim**0.5
        place = torch.arange(q_BNHd.shape[1], device=q_BNHd.device)
        distance = place[:, None] - place[None, :]
        seen = distance >= 0 if ctx.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.config.window is not None:
            seen = seen & (distance.abs() < self.config.window)
        if ctx.documents is not None:
            seen = seen & (ctx.documents[:, None, :, None] == ctx.documents[:, None, None, :])
        return q_BNHd, v_BNHd, scores_BHNM, seen

    def first_seen(self, place: int) -> int:
        return 0 if self.config.window is None else max(0, place - self.config.window + 1)

    def flops(self, n: int) -> float:
        window = min(n, self.config.window or n)
        # On the mean over the queries; each counts itself by half, so that without a window they are n / 2.
        keys = (window**2 / 2 + (n - window) * (window - 0.5)) / n
        return self.linear_flops() + 4 * keys * len(self.head_numbers) * self.head_dim * self.active_share


def visible(ctx: Context, window: int | None) -> Visible:
    """Which keys the queries of a forward pass see: those of the cache and of other processes' pieces included."""
    n = ctx.positions.shape[1]
    m = ctx.first_index + n if ctx.causal else n * ctx.cut.size
    key_documents = None
    if ctx.documents is not None:
        key_documents = ctx.documents if ctx.key_documents is None else ctx.key_documents[:, :m]
    return Visible(n, m, ctx.first_index, ctx.causal, window, ctx.documents, key_documents)


def _remember(cache: dict[str, Any], k_BNGd: Tensor, v_BNGd: Tensor) -> tuple[Tensor, Tensor]:
    """Append to the cached keys and values; return all of them."""
    keys = cache.setdefault("k", GrowingTensor())
    values = cache.setdefault("v", GrowingTensor())
    return keys.append(k_BNGd), values.append(v_BNGd)
