"""Mixture-of-head attention: some heads always run, and a router chooses others for each token."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kernels.attention.gated import gated_attention
from model.attention import AttentionMap
from model.context import Context
from model.initialisation import Init, Normal
from model.layer import Site
from model.mixers.attention import Attention, AttentionConfig, visible
from model.routing import Balance, BalanceOver, Router, Routing, choose_units

NORM_EPS = 1e-6
"""Added to what norms of queries are divided by, which may be 0."""


@dataclass
class MoHConfig(AttentionConfig):
    """`[mixers.moh]`

    Heads are numbered so that the first shared_heads are shared; a group of query heads has one key and value head.
    """

    shared_heads: int = field(kw_only=True)
    """The first so many query heads run for every token."""
    active_heads: int = field(kw_only=True)
    """So many of the others, the routed ones, run for each token."""
    router: Literal["learned", "norm"] = "learned"
    """What scores routed heads: a linear map of the input, or the norm of a head's query, without weights."""
    two_stage: bool | None = None
    """A further linear map weighs shared heads, all together, against routed ones. Default: with the learned router."""
    gate_scaling: Literal["unit_mean", "paper"] = "unit_mean"
    """Gates of the learned router: over the heads that run, with a mean of 1, as in the released code; or the softmax
    over all of them, as printed. The gates of router "norm" are 1."""
    straight_through: Literal["selected", "all"] = "selected"
    """The gradient of router "norm" goes through the heads that run; or through all, which then all are computed."""
    route_unit: Literal["head", "kv_group"] = "head"
    """Heads are chosen one by one, or all that share a key and value head together."""
    balance_weight: float = 0.01
    """What the balance of routed heads weighs in the loss; 0: there is no such term."""
    balance_over: BalanceOver = "sequence"
    """Routed heads are to be chosen equally often in each sequence, or over the global batch (which is counted in a
    forward pass of its own before each step)."""
    router_init_std: float = 0.02
    """Standard deviation of the routers' initial weights."""
    group_order: list[int] | None = None
    """Key and value heads, with their query heads, in the order in which they are kept: place i has group_order[i].
    Default: one in which equal parts have equally many shared heads, as far as that goes, so that tensor-parallel ranks
    have equal work. Exports to Hugging Face undo it."""

    def __post_init__(self) -> None:
        if self.group_order is None and self._counts_fit:
            self.group_order = balanced_order(self.groups, self.shared_heads // self.group_size, self._splits_a_group)

    @property
    def unit_size(self) -> int:
        """Heads that are chosen together."""
        return self.group_size if self.route_unit == "kv_group" else 1

    @property
    def num_units(self) -> int:
        """What is chosen from."""
        return (self.num_heads - self.shared_heads) // self.unit_size

    @property
    def active_units(self) -> int:
        """How many of them are chosen."""
        return self.active_heads // self.unit_size

    @property
    def weighs_stages(self) -> bool:
        """Whether shared heads are weighed against routed ones."""
        return self.router == "learned" if self.two_stage is None else self.two_stage

    @property
    def weighs_shared(self) -> bool:
        """Whether shared heads are weighed against each other: one alone has all the weight."""
        return self.router == "learned" and self.shared_heads > 1

    @property
    def _counts_fit(self) -> bool:
        heads, groups = self.num_heads, self.groups
        return heads >= 1 and groups >= 1 and heads % groups == 0 and 0 <= self.shared_heads < heads

    @property
    def _splits_a_group(self) -> bool:
        return self.shared_heads % self.group_size > 0

    def faults(self, d_model: int) -> list[str]:
        faults = super().faults(d_model) + self._range_faults()
        routed = self.num_heads - self.shared_heads
        if self.num_heads >= 1 and not 0 <= self.shared_heads < self.num_heads:
            faults.append(
                f"shared_heads = {self.shared_heads} must lie in [0, num_heads - 1 = {self.num_heads - 1}], so that "
                'there are heads to choose from; kind = "softmax" runs all of them.'
            )
        elif self.num_heads >= 1 and not 1 <= self.active_heads <= routed:
            faults.append(
                f"active_heads = {self.active_heads} of {routed} routed heads (num_heads - shared_heads) cannot run: "
                f"take {min(max(self.active_heads, 1), routed)}."
            )
        if self.weighs_stages and self.shared_heads == 0:
            faults.append(
                "shared_heads = 0 with two-stage routing, which weighs shared heads against routed ones: set two_stage "
                "= false, or share a head."
            )
        if self.route_unit == "kv_group" and self._counts_fit and (size := self.group_size) > 1:
            faults += [
                f'{key} = {value} with route_unit = "kv_group": {size} query heads share a key and value head and are '
                f"chosen together, so it must be a multiple of {size}: take {max(size * round(value / size), least)}."
                for key, value, least in (
                    ("shared_heads", self.shared_heads, 0),
                    ("active_heads", self.active_heads, size),
                )
                if value % size
            ]
        return faults + self._order_faults()

    def _range_faults(self) -> list[str]:
        faults = []
        if self.router == "norm" and self.two_stage:
            faults.append('two_stage = true with router = "norm", whose gates are 1: set two_stage = false.')
        if self.router == "norm" and self.gate_scaling == "paper":
            faults.append('gate_scaling = "paper" with router = "norm", whose gates are 1: take "unit_mean".')
        if self.router == "learned" and self.straight_through == "all":
            faults.append(
                'straight_through = "all" is for router = "norm": the gates of router = "learned" have gradients of '
                'their own; take "selected".'
            )
        alone = self._counts_fit and self.active_heads == self.unit_size and self.num_units > 1
        if self.router == "learned" and self.gate_scaling == "unit_mean" and alone:
            faults.append(
                f"active_heads = {self.active_heads} is one choice for each token, and a gate over one is always 1: a "
                f'learned router would not learn from the loss. Take {2 * self.unit_size}, gate_scaling = "paper", or '
                'router = "norm".'
            )
        if self.balance_over == "micro_batch":
            faults.append(
                'balance_over = "micro_batch" would make the loss depend on parallel.microbatches and on the layout: '
                'take "sequence", or "global_batch".'
            )
        for key in ("balance_weight", "router_init_std"):
            if not 0 <= (value := getattr(self, key)) < math.inf:
                faults.append(f"{key} = {value:g} must be a number, and not negative.")
        return faults

    def _order_faults(self) -> list[str]:
        if self.group_order is None or sorted(self.group_order) == list(range(self.groups)):
            return []
        return [
            f"group_order = {self.group_order} must have each of the {self.groups} key and value heads once, from 0: "
            "leave it out for the usual order."
        ]


def balanced_order(groups: int, shared: int, splits_a_group: bool = False) -> list[int]:
    """Groups, of which the first `shared` are, in an order in which each of as many equal parts as can be has equally
    many of both kinds. As they are where there is no such order, or where a further group is shared in part."""
    parts = 1 if splits_a_group or shared == 0 else math.gcd(shared, groups)
    each, others = shared // parts, (groups - shared) // parts
    return [
        group
        for part in range(parts)
        for group in (
            *range(part * each, (part + 1) * each),
            *range(shared + part * others, shared + (part + 1) * others),
        )
    ]


class MoH(Attention):
    """y = sum_i g_i H_i W_o,i over the heads that run for a token (arXiv 2410.11842, eq. 5 to 8).

    With the learned router, m the heads that are chosen (those of the K largest W_r x), S shared and h - S routed ones:

        "unit_mean"    g_i = w_1 S softmax(W_s x)_i              shared
                       g_i = w_2 K softmax(W_r x over m)_i       routed, in m;  w = 2 softmax(W_h x)
        "paper"        g_i = a_1 softmax(W_s x)_i  and  a_2 softmax(W_r x)_i,   a = softmax(W_h x)

    With router "norm" the scores are norms of queries, before their norm and rotation, over their spread (of two, over
    their mean), gates are 1, and their gradients go on to the softmax of the scores, straight through (eq. 9, 10).
    """

    Config = MoHConfig
    examples = [
        {"num_heads": 8, "head_dim": 4, "shared_heads": 2, "active_heads": 2},
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "shared_heads": 1,
            "active_heads": 2,
            "router": "norm",
            "qk_norm": True,
            "window": 5,
        },
        {
            "num_heads": 8,
            "head_dim": 4,
            "num_kv_heads": 4,
            "shared_heads": 2,
            "active_heads": 4,
            "route_unit": "kv_group",
            "balance_over": "global_batch",
        },
        {"num_heads": 4, "shared_heads": 0, "active_heads": 2, "two_stage": False, "gate_scaling": "paper"},
        {
            "num_heads": 6,
            "head_dim": 6,
            "num_kv_heads": 3,
            "shared_heads": 2,
            "active_heads": 2,
            "router": "norm",
            "route_unit": "kv_group",
            "straight_through": "all",
        },
    ]
    sharding = Attention.sharding | {
        "route.weight": "replicate",
        "weigh_shared.weight": "replicate",
        "weigh_stages.weight": "replicate",
        "heads": "heads",
        "places": "replicate",
    }
    routers = frozenset({"route", "weigh_shared", "weigh_stages"})
    # As the code calls them that was released for vision models.
    hf = Attention.hf | {
        "route.weight": "self_attn.wg.weight",
        "weigh_stages.weight": "self_attn.wg_0.weight",
        "weigh_shared.weight": "self_attn.wg_1.weight",
    }

    def __init__(self, config: MoHConfig, site: Site):
        super().__init__(config, site)
        learned = config.router == "learned"
        self.route = Router(site.d_model, config.num_units) if learned else None
        self.weigh_shared = Router(site.d_model, config.shared_heads) if config.weighs_shared else None
        self.weigh_stages = Router(site.d_model, 2) if config.weighs_stages else None
        # The number of the head at each place, of which tensor parallelism leaves a share here, and the place of each.
        self.heads: Tensor
        self.places: Tensor
        for name in ("heads", "places"):
            self.register_buffer(name, torch.empty(config.num_heads, dtype=torch.int64), persistent=False)
        self.remake_buffers()
        self._visible: Hashable = ("visible", config.window)

    def remake_buffers(self) -> None:
        numbers = self.head_numbers
        self.heads = torch.tensor(numbers, device=self.heads.device)
        self.places = torch.tensor(sorted(range(len(numbers)), key=numbers.__getitem__), device=self.places.device)

    def init_weights(self) -> dict[str, Init]:
        normal = Normal(self.config.router_init_std)
        routers = {f"{name}.weight": normal for name in self.routers if getattr(self, name) is not None}
        return super().init_weights() | routers

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        ctx.share(self._visible, lambda: visible(ctx, self.config.window))

    @property
    def head_numbers(self) -> list[int]:
        size = self.config.group_size
        return [group * size + head for group in self.config.group_order for head in range(size)]

    @property
    def active_share(self) -> float:
        return (self.config.shared_heads + self.config.active_heads) / self.config.num_heads

    @property
    def balance(self) -> Balance | None:
        # As the code has it that was released: averaged over layers, and K times the balance of `model.routing`.
        units = self.config.num_units
        return Balance(self.config.balance_weight * units, self.config.balance_over, units, shared_out=True)

    def mix(self, x: Tensor, q_BNHd: Tensor, k_BMGd: Tensor, v_BMGd: Tensor, ctx: Context) -> Tensor:
        gates_BNH, active_BNH = self._gates(x, q_BNHd, ctx)
        q_BNHd = self.turned(q_BNHd, ctx)
        seen, scale = ctx.shared[self._visible], self.head_dim**-0.5
        if ctx.observer is not None:
            q_BNHd = ctx.observer.attention(self.site.layer, AttentionMap(q_BNHd, k_BMGd, seen, scale))
        all_run = self.config.router == "norm" and self.config.straight_through == "all"
        return gated_attention(
            q_BNHd,
            k_BMGd,
            v_BMGd,
            gates_BNH,
            selected=None if all_run else active_BNH,
            visible=seen,
            scale=scale,
            share=self.active_share,
        )

    def _gates(self, x: Tensor, q_BNHd: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Gates, and which heads run, `[B, N, H]`, of the heads that are here."""
        scores_BNU = self._norm_scores(q_BNHd, ctx) if self.route is None else self.route(x)
        chosen_BNU = choose_units(scores_BNU, self.config.active_units)
        active_BNH = self._by_head(torch.ones_like(chosen_BNU[..., :1]), chosen_BNU)
        if ctx.observer is not None:
            scores_BNU = ctx.observer.routing(self.site.layer, Routing("mixer", scores_BNU, chosen_BNU, active_BNH))
        if self.route is None:
            probabilities_BNU = scores_BNU.softmax(-1)
            through_BNU = probabilities_BNU - probabilities_BNU.detach()
            if self.config.straight_through == "selected":
                through_BNU = through_BNU * chosen_BNU
            return self._by_head(torch.ones_like(scores_BNU[..., :1]), chosen_BNU + through_BNU), active_BNH
        return self._by_head(*self._learned_gates(x, scores_BNU, chosen_BNU)), active_BNH

    def _norm_scores(self, q_BNHd: Tensor, ctx: Context) -> Tensor:
        """Norms of routed units over their spread, as in the released code, `[B, N, U]`, fp32 or wider."""
        wide = torch.promote_types(q_BNHd.dtype, torch.float32)
        squares_BNH = ctx.heads.gather(q_BNHd.to(wide).square().sum(-1))[..., self.places]
        squares_BNU = squares_BNH[..., self.config.shared_heads :].unflatten(-1, (-1, self.config.unit_size)).sum(-1)
        # The root has no derivative at 0.
        norms_BNU = squares_BNU.clamp(min=torch.finfo(wide).tiny).sqrt()
        # One has no spread, and that of two is their distance: over it they would always be as far apart, and no
        # gradient could be trusted where they are nearly alike.
        many = norms_BNU.shape[-1] > 2
        unit_BN1 = norms_BNU.std(-1, keepdim=True) if many else norms_BNU.mean(-1, keepdim=True)
        return norms_BNU / (unit_BN1 + NORM_EPS)

    def _learned_gates(self, x: Tensor, scores_BNU: Tensor, chosen_BNU: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of shared heads `[B, N, S]` (or one for all), and of routed units `[B, N, U]`, 0 where not chosen."""
        config, paper = self.config, self.config.gate_scaling == "paper"
        shared_BNS = torch.ones_like(scores_BNU[..., :1])
        if self.weigh_shared is not None:
            shared_BNS = self.weigh_shared(x).softmax(-1) * (1 if paper else config.shared_heads)
        if paper:
            routed_BNU = scores_BNU.softmax(-1) * chosen_BNU
        else:
            routed_BNU = scores_BNU.masked_fill(~chosen_BNU, -torch.inf).softmax(-1) * config.active_units
        if self.weigh_stages is not None:
            stages_BN2 = self.weigh_stages(x).softmax(-1) * (1 if paper else 2)
            shared_BNS, routed_BNU = shared_BNS * stages_BN2[..., :1], routed_BNU * stages_BN2[..., 1:]
        return shared_BNS, routed_BNU

    def _by_head(self, shared_BNS: Tensor, routed_BNU: Tensor) -> Tensor:
        """`[B, N, H]` of the heads that are here, from what shared heads have, each or all, and routed units."""
        shared_BNS = shared_BNS.expand(*shared_BNS.shape[:-1], self.config.shared_heads)
        numbered = torch.cat((shared_BNS, routed_BNU.repeat_interleave(self.config.unit_size, dim=-1)), dim=-1)
        return numbered[..., self.heads]

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q_BNHd = self._queries(x)
        _, v_BNHd, scores_BHNM, seen = self._reference_map(q_BNHd, self._keys_values(x, ctx), ctx)
        weights_BHNM = scores_BHNM.masked_fill(~seen, -torch.inf).softmax(-1)
        gates_BNH, _ = self._gates(x, q_BNHd, ctx)
        return self.o((torch.einsum("bhnm,bmhd->bnhd", weights_BHNM, v_BNHd) * gates_BNH[..., None]).flatten(2))
