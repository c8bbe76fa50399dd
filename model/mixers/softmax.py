"""Softmax attention: multi-head or grouped-query, rotary or not, with QK-norm, a window, a key bias or a sink."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention.selected import selected_attention
from kernels.attention.softmax import softmax_attention
from model.attention import AttentionMap
from model.context import Context
from model.initialisation import Constant, Init, Normal
from model.layer import Site
from model.mixers.attention import Attention, AttentionConfig, visible

KEY_BIAS_STD = 0.02


@dataclass
class SoftmaxConfig(AttentionConfig):
    """`[mixers.softmax]`"""

    key_bias: Literal["none", "head", "shared"] = "none"
    """A learned key without value that every query sees: one for each query head, or one for all."""
    sink: bool = False
    """A learned logit for each query head that takes weight and gives nothing."""

    def faults(self, d_model: int) -> list[str]:
        faults = super().faults(d_model)
        if self.key_bias != "none" and self.sink:
            faults.append(
                f'sink = true and key_bias = "{self.key_bias}" take weight both, and one of them is enough: '
                'take key_bias = "none", or sink = false.'
            )
        return faults

    @property
    def takes_weight(self) -> bool:
        """Whether something that is no token takes weight."""
        return self.sink or self.key_bias != "none"


class Softmax(Attention):
    """softmax(q k^T / sqrt(d)) v over heads (arXiv 1706.03762), with torch's fused attention.

    With a key bias k* (arXiv 2410.10781) the sum of a row's weights has one term more, exp(q k* / sqrt(d)),
    whose value is zero: o_i = out_i * sigmoid(lse_i - q_i k* / sqrt(d)). k* is neither rotated nor normed (the queries
    that it is multiplied with are, where they are for others), and it is in no cache. A sink puts a number in the place
    of q_i k* / sqrt(d), one for each head, as gpt-oss does.
    """

    Config = SoftmaxConfig
    examples = [
        {"num_heads": 4},
        {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "window": 5},
        {"num_heads": 2, "head_dim": 6, "num_kv_heads": 1, "qkv_bias": True},
        {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "key_bias": "head"},
        {"num_heads": 4, "head_dim": 6, "window": 5, "key_bias": "shared"},
        {"num_heads": 4, "num_kv_heads": 2, "sink": True},
    ]
    sharding = Attention.sharding | {"key_bias": "heads", "shared_key_bias": "replicate", "sink": "heads"}
    # As gpt-oss calls its sinks. For a key bias there is no name anywhere else.
    hf = Attention.hf | {x: f"self_attn.{x}" for x in ("key_bias", "shared_key_bias")} | {"sink": "self_attn.sinks"}
    no_decay = frozenset({"key_bias", "shared_key_bias"})

    def __init__(self, config: SoftmaxConfig, site: Site):
        super().__init__(config, site)
        heads, bias = config.num_heads, config.key_bias
        self.key_bias = nn.Parameter(torch.empty(heads, self.head_dim)) if bias == "head" else None
        self.shared_key_bias = nn.Parameter(torch.empty(self.head_dim)) if bias == "shared" else None
        self.sink = nn.Parameter(torch.empty(heads)) if config.sink else None
        self._mask: Hashable = ("mask", config.window, config.takes_weight)
        self._visible: Hashable = ("visible", config.window)

    def init_weights(self) -> dict[str, Init]:
        inits = super().init_weights()
        if self.key_bias is not None:
            inits["key_bias"] = Normal(KEY_BIAS_STD)
        if self.shared_key_bias is not None:
            inits["shared_key_bias"] = Normal(KEY_BIAS_STD)
        if self.sink is not None:
            inits["sink"] = Constant(0.0)
        return inits

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        if self._goes_by_tiles(ctx.positions):
            ctx.share(self._visible, lambda: visible(ctx, self.config.window))
        else:
            ctx.share(self._mask, lambda: attention_mask(ctx, self.config.window, self.config.takes_weight))

    def _goes_by_tiles(self, x: Tensor) -> bool:
        """Whether attention is made in tiles, of which those that no query sees are left out, and there is no mask."""
        return x.device.type == "cuda" and not self.config.takes_weight

    def mix(self, x: Tensor, q_BNHd: Tensor, k_BMGd: Tensor, v_BMGd: Tensor, ctx: Context) -> Tensor:
        q_BNHd = self.turned(q_BNHd, ctx)
        extra_BNH = self._extra_logit(q_BNHd)
        if ctx.observer is not None:
            seen = visible(ctx, self.config.window)
            weights = AttentionMap(q_BNHd, k_BMGd, seen, self.head_dim**-0.5, extra_BNH=extra_BNH)
            q_BNHd = ctx.observer.attention(self.site.layer, weights)
        if self._goes_by_tiles(q_BNHd):
            return selected_attention(q_BNHd, k_BMGd, v_BMGd, None, ctx.shared[self._visible], self.head_dim**-0.5)
        mask, is_causal = ctx.shared[self._mask]
        return softmax_attention(q_BNHd, k_BMGd, v_BMGd, mask=mask, is_causal=is_causal, extra_BNH=extra_BNH)

    def _extra_logit(self, q_BNHd: Tensor) -> Tensor | None:
        """What takes weight beside the keys, as a logit; None where nothing does."""
        if self.sink is not None:
            return self.sink.expand(q_BNHd.shape[:3])
        if self.key_bias is not None:
            return torch.einsum("bnhd,hd->bnh", q_BNHd, self.key_bias) * self.head_dim**-0.5
        if self.shared_key_bias is not None:
            return torch.einsum("bnhd,d->bnh", q_BNHd, self.shared_key_bias) * self.head_dim**-0.5
        return None

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q_BNHd, v_BNHd, scores_BHNM, seen = self._reference_map(self._queries(x), self._keys_values(x, ctx), ctx)
        scores_BHNM = scores_BHNM.masked_fill(~seen, -torch.inf)
        extra_BNH = self._extra_logit(q_BNHd)
        if extra_BNH is not None:
            scores_BHNM = torch.cat((scores_BHNM, extra_BNH.transpose(1, 2).unsqueeze(-1)), dim=-1)
        # The value of what was appended is zero.
        weights_BHNM = scores_BHNM.softmax(-1)[..., : x.shape[1]]
        return self.o(torch.einsum("bhnm,bmhd->bnhd", weights_BHNM, v_BNHd).flatten(2))

    def linear_flops(self) -> int:
        # A key bias is a linear map of the queries, whatever the length.
        biased = self.config.num_heads * self.head_dim if self.config.key_bias != "none" else 0
        return super().linear_flops() + 2 * biased


def attention_mask(ctx: Context, window: int | None, extra: bool = False) -> tuple[Tensor | None, bool]:
    """Which of the M keys each of the N queries sees, as torch's fused attention wants it: (mask, is_causal).

    The mask is bool `[B or 1, 1, N, M]`, or M + 1 where an `extra` key that all see goes before the others; None where
    plain causal (or full) attention says it all, so that torch may take its fastest path. Decided outside of the
    blocks, since inside compiled ones N may be symbolic.
    """
    n = ctx.positions.shape[1]
    only_new = ctx.first_index == 0 or (n == 1 and ctx.causal) or not ctx.causal
    if ctx.documents is None and window is None and only_new:
        return None, ctx.causal and n > 1
    mask = visible(ctx, window).of(torch.arange(n, device=ctx.positions.device))
    return F.pad(mask, (1, 0), value=True) if extra else mask, False
