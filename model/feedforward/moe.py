"""A mixture of experts: each token goes through the few feed-forwards that a router chooses for it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.grouped import Gather, inverse_of, permuted
from model.context import Context
from model.feedforward.experts import Experts
from model.initialisation import Constant, Init, Normal
from model.layer import FeedForward, HFName, Sharding, Site
from model.routing import SMALLEST_SUM, Balance, BalanceOver, Router, Routing, Score, best, chosen


@dataclass
class MoEConfig:
    """`[feedforwards.moe]`"""

    num_experts: int
    """How many there are."""
    top_k: int
    """How many of them each token goes through."""
    expert: str
    """What each of them is: the name of another [feedforwards.NAME]."""
    shared: str | None = None
    """What every token goes through beside them: the name of another [feedforwards.NAME]. Default: nothing."""
    score: Score = "softmax"
    """What makes gates of the router's scores."""
    gate_norm: Literal["selected", "none"] = "selected"
    """Gates of the chosen experts are divided by their sum, or left as they are (needed for top_k = 1)."""
    gate_scale: float = 1.0
    """What multiplies them."""
    balance_weight: float = 0.01
    """What the balance of experts weighs in the loss; 0: there is no such term."""
    balance_over: BalanceOver = "sequence"
    """Whether experts are to be chosen evenly by the tokens of each sequence, or by those of the global batch."""
    z_loss_weight: float = 0.001
    """What the mean of logsumexp(scores)^2 weighs in the loss; 0: there is no such term."""
    bias_rate: float = 0.0
    """By how much, after each update, the number that is added to an expert's score when experts are chosen moves
    against its load; 1e-3 is usual. 0: there is none."""
    router_init_std: float = 0.02
    """Standard deviation of the router's initial weights."""

    def parts(self) -> dict[str, str]:
        """Which other feed-forwards it is made of: key -> name."""
        named = {"expert": self.expert, "shared": self.shared}
        return {key: name for key, name in named.items() if name is not None}

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        faults = []
        if self.num_experts < 1:
            faults.append(f"num_experts = {self.num_experts} must be at least 1.")
        elif not 1 <= self.top_k <= self.num_experts:
            near = min(max(self.top_k, 1), self.num_experts)
            faults.append(
                f"top_k = {self.top_k} of num_experts = {self.num_experts} cannot be chosen: the nearest that can is "
                f"{near}."
            )
        elif self.top_k == 1 < self.num_experts and self.gate_norm == "selected":
            faults.append(
                'gate_norm = "selected" with top_k = 1: the one gate of a token would always be 1, and the router '
                'would learn nothing from the loss. Take gate_norm = "none", or top_k = 2.'
            )
        if self.balance_over == "micro_batch":
            faults.append(
                'balance_over = "micro_batch" would make the loss depend on parallel.microbatches and on the layout: '
                'take "sequence", or "global_batch".'
            )
        for key in ("balance_weight", "z_loss_weight", "bias_rate", "router_init_std"):
            if not 0 <= (value := getattr(self, key)) < math.inf:
                faults.append(f"{key} = {value:g} must be a number, and not negative.")
        if not 0 < self.gate_scale < math.inf:
            faults.append(f"gate_scale = {self.gate_scale:g} must be a number above 0; 1 leaves gates as they are.")
        return faults


class ExpertRouter(Router):
    """Scores of experts, and what they are chosen by: the same, or with a number added that no gradient moves.

    Attributes:
        selection_bias: `[E]`, added to what gates are made of, when experts are chosen (arXiv 2408.15664).
    """

    def __init__(self, d_model: int, config: MoEConfig):
        super().__init__(d_model, config.num_experts)
        self.score = config.score
        self.selection_bias = (
            nn.Parameter(torch.empty(config.num_experts), requires_grad=False) if config.bias_rate > 0 else None
        )

    def init_weights(self) -> dict[str, Init]:
        return {} if self.selection_bias is None else {"selection_bias": Constant(0.0)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., D]` -> twice `[..., E]`, fp32 or wider: scores, and what is largest for the experts to be chosen."""
        scores = super().forward(x)
        if self.selection_bias is None:
            return scores, scores
        values = scores.softmax(-1) if self.score == "softmax" else scores.sigmoid()
        return scores, values.detach() + self.selection_bias


class MoE(FeedForward):
    """y = sum_i g_i E_i(x) over the K experts with the largest scores s = W_g x, of all tokens: none is dropped.

    Gates, with m the experts that are chosen, before `gate_scale`:

        softmax    "selected"  softmax(s over m)_i          "none"  softmax(s)_i           (arXiv 2101.03961)
        sigmoid    "selected"  sig(s_i) / sum_m sig(s)      "none"  sig(s_i)               (arXiv 2412.19437)

    A shared feed-forward is added with a gate of 1. Balance and z-loss: `model/routing.py`.
    """

    Config = MoEConfig
    examples = [
        {"moe": {"num_experts": 4, "top_k": 2, "expert": "swiglu"}, "swiglu": {"d_ff": 24}},
        {
            "moe": {
                "num_experts": 4,
                "top_k": 1,
                "expert": "gelu",
                "shared": "sglu",
                "score": "sigmoid",
                "gate_norm": "none",
                "gate_scale": 1.5,
                "bias_rate": 0.01,
                "balance_over": "global_batch",
            },
            "gelu": {"d_ff": 24},
            "sglu": {"d_ff": 24},
        },
        {
            "moe": {"num_experts": 8, "top_k": 3, "expert": "sglu", "score": "sigmoid", "bias_rate": 0.02},
            "sglu": {"d_ff": 12},
        },
    ]

    def __init__(self, config: MoEConfig, site: Site):
        super().__init__(config, site)
        expert, settings = site.feedforwards[config.expert]
        self.router = ExpertRouter(site.d_model, config)
        self.experts = Experts({str(number): expert(settings, site) for number in range(config.num_experts)})
        self.shared = None
        if config.shared is not None:
            shared, settings = site.feedforwards[config.shared]
            self.shared = shared(settings, site)

    @property
    def made_of(self) -> dict[str, FeedForward]:
        """The feed-forwards that are here, by the prefixes of their parameters."""
        found = {f"experts.{number}.": expert for number, expert in self.experts.items()}
        return found if self.shared is None else found | {"shared.": self.shared}

    @property
    def sharding(self) -> dict[str, Sharding]:  # type: ignore[override]
        words: dict[str, Sharding] = {"router.weight": "replicate", "router.selection_bias": "replicate"}
        for prefix, part in self.made_of.items():
            words |= {prefix + name: word for name, word in part.sharding.items()}
        return words

    @property
    def output_projections(self) -> list[str]:
        return [prefix + part.output_projection for prefix, part in self.made_of.items()]

    @classmethod
    def hf_name(cls, name: str, config: Any) -> HFName | None:
        """As Mixtral calls them; a shared feed-forward and numbers for choosing, as DeepSeek-V3 does."""
        known = {
            "router.weight": "block_sparse_moe.gate.weight",
            "router.selection_bias": "block_sparse_moe.gate.e_score_correction_bias",
        }
        if (match := re.fullmatch(r"experts\.(\d+)\.(gate|up|down)\.weight", name)) is not None:
            letter = {"gate": "w1", "down": "w2", "up": "w3"}[match[2]]
            return f"block_sparse_moe.experts.{match[1]}.{letter}.weight"
        if (match := re.fullmatch(r"shared\.(gate|up|down)\.weight", name)) is not None:
            return f"block_sparse_moe.shared_experts.{match[1]}_proj.weight"
        return known.get(name)

    def init_weights(self) -> dict[str, Init]:
        return {"router.weight": Normal(self.config.router_init_std)}

    @property
    def balance(self) -> Balance | None:
        config = self.config
        factor = config.balance_weight * config.num_experts / config.top_k
        return Balance(factor, config.balance_over, config.num_experts)

    @property
    def z_loss_weight(self) -> float:
        return self.config.z_loss_weight

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        scores_BNE, ranked_BNE = self.router(x)
        index_BNK = best(ranked_BNE, self.config.top_k)
        if ctx.observer is not None:
            scores_BNE = self._shown(scores_BNE, index_BNK, ctx)
        out = self._chosen_experts(x, index_BNK, self._gates(scores_BNE, index_BNK), ctx)
        return out if self.shared is None else out + self.shared(x, ctx)

    def _shown(self, scores: Tensor, index: Tensor, ctx: Context) -> Tensor:
        """Scores, `[B, N, E]`, or `[T, E]` of the tokens of one modality, after an observer has seen them."""
        assert ctx.observer is not None
        picked = chosen(index, self.config.num_experts)
        if ctx.tower is None:
            found = Routing("feedforward", scores, picked, score=self.config.score)
            return ctx.observer.routing(self.site.layer, found)
        # Whoever observes knows tokens by their sequences.
        assert ctx.groups is not None
        (batch_size, n), rows = ctx.groups.shape, ctx.groups.rows_of(ctx.tower)
        nothing = scores.new_zeros(batch_size * n, self.config.num_experts)
        found = Routing(
            "feedforward",
            nothing.index_copy(0, rows, scores).unflatten(0, (batch_size, n)),
            nothing.bool().index_copy(0, rows, picked).unflatten(0, (batch_size, n)),
            score=self.config.score,
            tower=ctx.tower,
            routed_BN=nothing[:, 0].bool().index_fill(0, rows, True).unflatten(0, (batch_size, n)),
        )
        return ctx.observer.routing(self.site.layer, found).flatten(0, 1)[rows]

    def _gates(self, scores_BNE: Tensor, index_BNK: Tensor) -> Tensor:
        """Of the chosen experts, `[B, N, K]`, fp32 or wider."""
        selected = self.config.gate_norm == "selected"
        if self.config.score == "softmax":
            if selected:
                gates_BNK = scores_BNE.gather(-1, index_BNK).softmax(-1)
            else:
                gates_BNK = scores_BNE.softmax(-1).gather(-1, index_BNK)
        else:
            gates_BNK = scores_BNE.gather(-1, index_BNK).sigmoid()
            if selected:
                gates_BNK = gates_BNK / (gates_BNK.sum(-1, keepdim=True) + SMALLEST_SUM)
        return gates_BNK * self.config.gate_scale

    # How many rows an expert gets is known only when it runs: a compiler's graph breaks here.
    @torch.compiler.disable
    def _chosen_experts(self, x_BND: Tensor, index_BNK: Tensor, gates_BNK: Tensor, ctx: Context) -> Tensor:
        """Every token's sum over its experts, `[B, N, D]`."""
        top_k = self.config.top_k
        order = index_BNK.flatten().argsort(stable=True)
        inverse = inverse_of(order)
        counts_E = chosen(index_BNK, self.config.num_experts).flatten(0, -2).sum(0)
        dispatch = ctx.experts.dispatch(counts_E, len(order))
        rows_RD = dispatch.send(Gather.apply(x_BND.flatten(0, -2), order, inverse, top_k))
        made_RD = dispatch.bring_back(self.experts(rows_RD, dispatch.sizes, [ctx] * len(self.experts)))
        # From the order of experts back to that of tokens: a sum that is always taken in the same order.
        made_BNKD = permuted(made_RD, inverse, order).unflatten(0, index_BNK.shape)
        return (made_BNKD.to(gates_BNK.dtype) * gates_BNK[..., None]).sum(-2).to(x_BND.dtype)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The same as its equation: all experts for all tokens, and most of what they give times zero."""
        scores_BNE, ranked_BNE = self.router(x)
        index_BNK = best(ranked_BNE, self.config.top_k)
        gates_BNE = torch.zeros_like(scores_BNE).scatter(-1, index_BNK, self._gates(scores_BNE, index_BNK))
        out = sum(gates_BNE[..., int(number), None] * expert(x, ctx) for number, expert in self.experts.items())
        return out if self.shared is None else out + self.shared(x, ctx)

    def flops(self, n: int) -> float:
        each = self.made_of["experts.0."].flops(n)
        shared = 0.0 if self.shared is None else self.shared.flops(n)
        return 2 * self.router.weight.numel() + self.config.top_k * each + shared
