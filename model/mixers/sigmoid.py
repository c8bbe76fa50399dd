"""Sigmoid attention: every key is weighed by itself, without a sum that weights are divided by."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.attention.sigmoid import score_offsets, sigmoid_attention
from kernels.lightning.decay import alibi_ladder
from model.attention import AttentionMap
from model.context import Context
from model.layer import Site
from model.mixers.attention import Attention, AttentionConfig, visible


@dataclass
class SigmoidConfig(AttentionConfig):
    """`[mixers.sigmoid]`"""

    length: int = field(kw_only=True)
    """Tokens that a query sees at most in training: data.seq_len, or the window. The bias is -log of it."""
    bias_mode: Literal["const", "per_row"] = "const"
    """const: every score is biased by -log(length). per_row: by -log of the tokens that the query sees."""
    alibi: bool = False
    """Scores fall with the distance, by a slope for each head (ALiBi), instead of a rotation."""
    hybrid_norm: bool = True
    """A norm, of the kind of model.norm, on what the mixer adds to the residual stream."""

    def faults(self, d_model: int) -> list[str]:
        faults = super().faults(d_model)
        if self.length < 1:
            faults.append(f"length = {self.length} must be at least 1, the token itself: data.seq_len is usual.")
        elif self.window is not None and 1 <= self.window < self.length:
            faults.append(
                f"length = {self.length} is more than a token sees with window = {self.window}: take length = "
                f"{self.window}, or leave window out."
            )
        return faults

    @property
    def rotated(self) -> bool:
        return not self.alibi


class Sigmoid(Attention):
    """o_i = sum_j sigmoid(q_i k_j / sqrt(d) + b) v_j;  y = W_o o  (arXiv 2409.04431).

    b = -log(length), so that the weights of a whole row of scores near 0 sum up to about 1; it is no parameter, and
    decoding beyond `length` does not change it. `bias_mode = "per_row"` counts what each query sees instead (ours, not
    the paper's). With ALiBi (arXiv 2108.12409) slope_h (i - j) is taken off the scores, in full. The norm on the
    output, x + norm(mixer(norm(x))), stands in the block.
    """

    Config = SigmoidConfig
    examples = [
        {"num_heads": 4, "length": 24},
        {"num_heads": 4, "num_kv_heads": 2, "length": 24, "alibi": True, "qk_norm": True},
        {"num_heads": 2, "head_dim": 6, "num_kv_heads": 1, "length": 5, "window": 5, "hybrid_norm": False},
        {"num_heads": 6, "head_dim": 5, "num_kv_heads": 2, "length": 24, "alibi": True, "bias_mode": "per_row"},
    ]
    sharding = Attention.sharding | {"slopes": "heads"}

    def __init__(self, config: SigmoidConfig, site: Site):
        super().__init__(config, site)
        self.slopes: Tensor | None
        self.register_buffer("slopes", torch.empty(config.num_heads) if config.alibi else None, persistent=False)
        self.remake_buffers()
        self._visible: Hashable = ("visible", config.window)

    def remake_buffers(self) -> None:
        if self.slopes is not None:
            ladder = alibi_ladder(self.config.num_heads)
            self.slopes = torch.tensor(ladder, dtype=torch.float32, device=self.slopes.device)

    @property
    def _bias(self) -> float:
        return 0.0 if self.config.bias_mode == "per_row" else -math.log(self.config.length)

    def prepare(self, ctx: Context) -> None:
        super().prepare(ctx)
        ctx.share(self._visible, lambda: visible(ctx, self.config.window))

    def mix(self, x: Tensor, q_BNHd: Tensor, k_BMGd: Tensor, v_BMGd: Tensor, ctx: Context) -> Tensor:
        q_BNHd = self.turned(q_BNHd, ctx)
        seen, scale, per_row = ctx.shared[self._visible], self.head_dim**-0.5, self.config.bias_mode == "per_row"
        if ctx.observer is not None:
            weights = AttentionMap(q_BNHd, k_BMGd, seen, scale, form=self._log_weights(ctx), normalised=False)
            q_BNHd = ctx.observer.attention(self.site.layer, weights)
        return sigmoid_attention(
            q_BNHd, k_BMGd, v_BMGd, seen, scale=scale, bias=self._bias, slopes_H=self.slopes, per_row=per_row
        )

    def _log_weights(self, ctx: Context) -> Any:
        """From scores `[B, H, R, M]` and the indices of their queries to log weights, for observers."""
        seen, slopes_H, per_row = ctx.shared[self._visible], self.slopes, self.config.bias_mode == "per_row"

        def form(scores_BHRM: Tensor, queries_R: Tensor) -> Tensor:
            seen_BHRM, first = seen.of(queries_R), seen.first_index
            dtype = scores_BHRM.dtype
            offsets = score_offsets(seen_BHRM, queries_R, 0, first, self._bias, slopes_H, per_row, dtype)
            return torch.nn.functional.logsigmoid(scores_BHRM + offsets)

        return form

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        _, v_BNHd, scores_BHNM, seen = self._reference_map(self._queries(x), self._keys_values(x, ctx), ctx)
        place = torch.arange(x.shape[1], device=x.device)
        if self.config.bias_mode == "per_row":
            scores_BHNM = scores_BHNM - seen.sum(-1, keepdim=True).to(x.dtype).log()
        else:
            scores_BHNM = scores_BHNM - math.log(self.config.length)
        if self.slopes is not None:
            distance_NM = (place[:, None] - place[None, :]).abs()
            scores_BHNM = scores_BHNM - self.slopes[:, None, None].to(x.dtype) * distance_NM
        weights_BHNM = torch.sigmoid(scores_BHNM).masked_fill(~seen, 0.0)
        return self.o(torch.einsum("bhnm,bmhd->bnhd", weights_BHNM, v_BNHd).flatten(2))
