"""Several attentions for every token, weighed by a router: BAM's mixture of attention experts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention.gated import gated_attention
from model.attention import AttentionMap
from model.context import Context
from model.initialisation import Init, Normal
from model.layer import HFName, Sharding, Site
from model.mixers.attention import Attention, AttentionConfig, visible
from model.routing import Router


@dataclass
class BAMConfig(AttentionConfig):
    """`[mixers.bam]`"""

    num_experts: int = field(kw_only=True)
    """Attentions that every token runs through, each with heads, widths and biases as above."""
    shared_kv: bool = False
    """One projection to keys and one to values for all experts, so that what decoding remembers is that of one."""
    router_init_std: float = 0.02
    """Standard deviation of the router's initial weights."""

    def faults(self, d_model: int) -> list[str]:
        faults = super().faults(d_model)
        if self.num_experts < 1:
            faults.append(
                f"num_experts = {self.num_experts} must be at least 1, the one that has all the weight; "
                'kind = "softmax" is that one without a router.'
            )
        if not 0 <= self.router_init_std < math.inf:
            faults.append(f"router_init_std = {self.router_init_std:g} must be a number, and not negative.")
        return faults


class BAM(Attention):
    """y = sum_e g_e(x) MHA_e(x),  g = softmax(W_r x) over the experts (arXiv 2408.08274, section 3.4).

    All experts run for every token, so gates are not renormalised and there is no balance. With shared keys and values
    an expert has queries and an output projection of its own.

    One attention computes the heads of all experts, in the order (key and value head g, expert e, query head of the
    group): keys and values, of each expert or shared, lie before the queries that they serve, and equal parts of the
    order have as many heads of each expert. Each expert's output is weighed in fp32 or wider.
    """

    Config = BAMConfig
    examples = [
        {"num_heads": 4, "num_experts": 3},
        {"num_heads": 4, "num_kv_heads": 2, "num_experts": 2, "shared_kv": True, "qk_norm": True, "window": 5},
        {"num_heads": 2, "head_dim": 6, "num_kv_heads": 1, "num_experts": 2, "qkv_bias": True},
        {"num_heads": 4, "num_kv_heads": 2, "num_experts": 3, "qk_norm": True},
    ]

    def __init__(self, config: BAMConfig, site: Site):
        super().__init__(config, site)
        self.router = Router(site.d_model, config.num_experts)
        self.experts: Sequence[Attention] = nn.ModuleList(Attention(config, site) for _ in range(config.num_experts))
        shared = ("k", "v", "k_norm") if config.shared_kv else ()
        for name in ("q", "k", "v", "o", "q_norm", "k_norm"):
            # What belongs to each expert is not here, and what all share is in none of them.
            for other in self.experts if name in shared else [self]:
                setattr(other, name, nn.Identity())
        self.sharding = {name: _sharding(name) for name, _ in self.named_parameters()}
        self._visible: Hashable = ("visible", config.window)

    @property
    def output_projections(self) -> list[str]:
        return [f"experts.{expert}.o" for expert in range(self.config.num_experts)]

    @property
    def head_numbers(self) -> list[int]:
        """Head i of expert e is number e num_heads + i."""
        config = self.config
        return [
            expert * config.num_heads + group * config.group_size + head
            for group in range(config.groups)
            for expert in range(config.num_experts)
            for head in range(config.group_size)
        ]

    @classmethod
    def hf_name(cls, name: str, config: Any) -> HFName | None:
        # No one has released such a model: names are as those of one attention, each expert's below a prefix.
        if name == "router.weight":
            return "self_attn.router.weight"
        expert, own = _split(name)
        known = cls.hf.get(own)
        return known.replace("self_attn.", f"self_attn.{expert}") if isinstance(known, str) else None

    def init_weights(self) -> dict[str, Init]:
        return super().init_weights() | {"router.weight": Normal(self.config.router_init_std)}

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        ctx.share(self._visible, lambda: visible(ctx, self.config.window))

    def _queries(self, x: Tensor) -> Tensor:
        """Normed, where they are: each expert has a norm of its own. What follows is alike for all heads."""
        return _together([expert.q_norm(expert._queries(x)) for expert in self.experts], self.config.group_size)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.shared_kv:
            return super()._projected(x)
        keys, values = zip(*(expert._projected(x) for expert in self.experts), strict=True)
        return _together(keys, 1), _together(values, 1)

    def mix(self, x: Tensor, q_BNHd: Tensor, k_BMGd: Tensor, v_BMGd: Tensor, ctx: Context) -> Tensor:
        q_BNHd = self.turned(q_BNHd, ctx)
        seen, scale = ctx.shared[self._visible], self.head_dim**-0.5
        if ctx.observer is not None:
            q_BNHd = ctx.observer.attention(self.site.layer, AttentionMap(q_BNHd, k_BMGd, seen, scale))
        return gated_attention(q_BNHd, k_BMGd, v_BMGd, None, visible=seen, scale=scale)

    def _projected_out(self, x: Tensor, out_BNHd: Tensor) -> Tensor:
        by_expert = out_BNHd.unflatten(2, (-1, self.config.num_experts, self.config.group_size)).unbind(3)
        outs = [expert.o(out_BNGrd.flatten(2)) for expert, out_BNGrd in zip(self.experts, by_expert, strict=True)]
        return self._weighed(x, outs)

    def _weighed(self, x: Tensor, outs: list[Tensor]) -> Tensor:
        """sum_e g_e y_e of what the experts give, `[B, N, D]` each.

        After their output projections, not before: so biases are weighed too. In the router's dtype, fp32 or wider.
        """
        gates = self.router(x).softmax(-1).unsqueeze(-1).unbind(-2)
        return reduce(torch.add, (gate * out for gate, out in zip(gates, outs, strict=True))).to(x.dtype)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        shared = self._keys_values(x, ctx) if self.config.shared_kv else None
        outs = []
        for expert in self.experts:
            keys_values = expert._keys_values(x, ctx) if shared is None else shared
            _, v_BNHd, scores_BHNM, seen = expert._reference_map(expert._queries(x), keys_values, ctx)
            weights_BHNM = scores_BHNM.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append(expert.o(torch.einsum("bhnm,bmhd->bnhd", weights_BHNM, v_BNHd).flatten(2)))
        return self._weighed(x, outs)

    def linear_flops(self) -> int:
        return super().linear_flops() + sum(expert.linear_flops() for expert in self.experts)


def _together(by_expert: Sequence[Tensor], size: int) -> Tensor:
    """Heads of all experts, from `[B, N, h, d]` of each, in the order (group, expert, one of the group's `size`)."""
    return torch.stack([x_BNhd.unflatten(2, (-1, size)) for x_BNhd in by_expert], dim=3).flatten(2, 4)


def _split(name: str) -> tuple[str, str]:
    """`experts.2.`, or nothing, and a parameter's name in an attention."""
    *expert, module, kind = name.split(".")
    return "".join(f"{part}." for part in expert), f"{module}.{kind}"


def _sharding(name: str) -> Sharding:
    """Heads are cut inside of every expert."""
    return "replicate" if name == "router.weight" else Attention.sharding[_split(name)[1]]
