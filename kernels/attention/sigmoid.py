"""Sigmoid attention: every key is weighed by itself, and weights are not divided by their sum.

Two forms: a whole map, to be checked against the equation, and one in blocks of queries, exact on any device, whose
memory is linear in N: it keeps q, k and v, and makes a block's weights again where backward needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention.visible import VISIBLE_SCHEMA, Visible, attention_faults, triton_faults
from kernels.dispatch import triton_form, uses_triton
from kernels.precision import computing_dtype, without_autocast

# Queries of a block: as many as make so many weights, over all rows and heads, but never fewer or more than these. By
# measurement on a CPU: blocks that are longer multiply with more keys that their first queries do not see.
_WEIGHTS_AT_A_TIME = 2**23
_FEWEST_ROWS, _MOST_ROWS = 16, 64


def sigmoid_attention(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    visible: Visible,
    *,
    scale: float,
    bias: float,
    slopes_H: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """o_i = sum over the keys j that i sees of sigmoid(scale q_i k_j + b_i - slope |i - j|) v_j, in blocks of queries.

    What a query does not see weighs exactly 0, and a query that sees nothing gives 0. Since nothing is divided, sums
    over parts of the keys add up to the sum over all of them. Never more than some rows of the map are held at a time.

    Args:
        q_BNHd: queries, one floating-point dtype for q, k and v.
        k_BMGd, v_BMGe: keys and values; each of the G serves H / G queries, in order.
        visible: which of the M keys each of the N queries sees.
        bias: b, added to every score; -log of a number of keys makes that many weights of a score of 0 sum up to 1
            (nearly). -inf gives 0.
        slopes_H: [H], float32 or float64, >= 0 (ALiBi, arXiv 2108.12409): times the distance, taken off the score. In
            full, since what all scores of a row share does not cancel here as it does under a softmax. Not
            differentiated.
        per_row: b_i = b - log(number of keys that i sees).

    Returns:
        [B, N, H, e] in the dtype of v. Differentiable once, in q, k and v. Weights and sums are float32 (float64 for
        float64 inputs), also under autocast.

    Raises:
        ValueError: shapes or dtypes do not fit together.

    Source: arXiv 2409.04431; per_row is an extension of ours.
    """
    _check_shapes(q_BNHd, k_BMGd, v_BMGe, visible, slopes_H)
    return torch.ops.headway.sigmoid_attention(
        q_BNHd, k_BMGd, v_BMGe, slopes_H, *visible.arguments, scale, bias, per_row
    )


def sigmoid_attention_reference(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    visible: Visible,
    *,
    scale: float,
    bias: float,
    slopes_H: Tensor | None = None,
    per_row: bool = False,
) -> Tensor:
    """`sigmoid_attention` as its equation, with the whole map at once, in the dtype of its arguments."""
    _check_shapes(q_BNHd, k_BMGd, v_BMGe, visible, slopes_H)
    group = q_BNHd.shape[2] // k_BMGd.shape[2]
    k_BMHd, v_BMHe = (x.repeat_interleave(group, dim=2) for x in (k_BMGd, v_BMGe))
    scores_BHNM = torch.einsum("bnhd,bmhd->bhnm", q_BNHd, k_BMHd) * scale + bias
    queries_N = torch.arange(q_BNHd.shape[1], device=q_BNHd.device)
    seen_BHNM = visible.of(queries_N)
    if per_row:
        scores_BHNM = scores_BHNM - seen_BHNM.sum(-1, keepdim=True).clamp(min=1).to(scores_BHNM.dtype).log()
    if slopes_H is not None:
        distance_NM = queries_N[:, None] + visible.first_index - torch.arange(visible.num_keys, device=q_BNHd.device)
        scores_BHNM = scores_BHNM - slopes_H[:, None, None].to(scores_BHNM.dtype) * distance_NM.abs()
    weights_BHNM = torch.where(seen_BHNM, torch.sigmoid(scores_BHNM), 0.0)
    return torch.einsum("bhnm,bmhe->bnhe", weights_BHNM, v_BMHe)


def score_offsets(
    seen_BHRM: Tensor,
    queries_R: Tensor,
    first_key: int,
    first_index: int,
    bias: float,
    slopes_H: Tensor | None,
    per_row: bool,
    dtype: torch.dtype,
) -> Tensor | float:
    """What is added to the scaled scores of some queries and of the keys from `first_key` on.

    Broadcasts to `[B, H, R, M]`. For `per_row`, all keys that one of the queries sees have to be among the M.
    """
    offsets: Tensor | float = bias
    if per_row:
        # A query that sees nothing weighs nothing, whatever it is offset by.
        offsets = bias - seen_BHRM.sum(-1, keepdim=True).clamp(min=1).to(dtype).log()
    if slopes_H is not None:
        keys_M = torch.arange(first_key, first_key + seen_BHRM.shape[-1], device=queries_R.device)
        distance_RM = ((queries_R + first_index)[:, None] - keys_M).abs()
        offsets = offsets - slopes_H.to(dtype)[:, None, None] * distance_RM
    return offsets


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, visible: Visible, slopes_H: Tensor | None) -> None:
    """Raise `ValueError` that names all that does not fit together."""
    faults = attention_faults(q, k, v, visible)
    if slopes_H is not None and (slopes_H.shape != q.shape[2:3] or slopes_H.dtype.itemsize < 4):
        faults.append(
            f"slopes must be one float32 or float64 number for each of {q.shape[2:3].numel()} heads, received "
            f"{list(slopes_H.shape)} of {slopes_H.dtype}."
        )
    if faults:
        raise ValueError(" ".join(faults))


# -------------------------------------------------------------------------------- in blocks of queries


@dataclass(frozen=True)
class _Block:
    """Queries first .. end - 1, and the keys among which are all that they see."""

    first: int
    end: int
    first_key: int
    end_key: int


@dataclass(frozen=True)
class _Map:
    """The whole map, of which blocks are made one at a time."""

    visible: Visible
    slopes_H: Tensor | None
    scale: float
    bias: float
    per_row: bool

    @property
    def settings(self) -> tuple[Visible, Tensor | None, float, float, bool]:
        """All of them, in order."""
        return self.visible, self.slopes_H, self.scale, self.bias, self.per_row

    def blocks(self, rows: int) -> Iterator[_Block]:
        """Of `rows` queries each; the last may have fewer."""
        for first in range(0, self.visible.num_queries, rows):
            end = min(first + rows, self.visible.num_queries)
            yield _Block(first, end, *self.visible.reach(first, end))

    def weights(self, scores_BGrm: Tensor, block: _Block, heads: int) -> Tensor:
        """From the scaled scores of a block to its weights, in place: `[B, G, H / G * R, m]`."""
        queries_R = torch.arange(block.first, block.end, device=scores_BGrm.device)
        seen_BHRm = self.visible.of(queries_R, (block.first_key, block.end_key))
        offsets_BHRm = score_offsets(
            seen_BHRm,
            queries_R,
            block.first_key,
            self.visible.first_index,
            self.bias,
            self.slopes_H,
            self.per_row,
            scores_BGrm.dtype,
        )
        by_head_BHRm = scores_BGrm.view(scores_BGrm.shape[0], heads, len(queries_R), -1)
        # torch computes 1 / (1 + exp(-x)). The form with tanh(x / 2) cancels where weights are small, as they are here.
        by_head_BHRm.add_(offsets_BHRm).sigmoid_().masked_fill_(~seen_BHRm, 0)
        return scores_BGrm


def _rows_of_a_block(q: Tensor, k: Tensor) -> int:
    per_row = max(1, q.shape[0] * q.shape[2] * k.shape[1])
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _WEIGHTS_AT_A_TIME // per_row))


def _wide_by_group(x_BMGd: Tensor) -> Tensor:
    """`[B, G, M, d]`, contiguous, in the dtype that is computed in."""
    return x_BMGd.transpose(1, 2).to(computing_dtype(x_BMGd)).contiguous()


def _rows_by_group(x_BNHd: Tensor, block: _Block, groups: int) -> Tensor:
    """The rows of a block, of all heads that share a key together: `[B, G, H / G * R, d]`, wide."""
    x_BHRd = x_BNHd[:, block.first : block.end].transpose(1, 2).to(computing_dtype(x_BNHd))
    return x_BHRd.reshape(x_BHRd.shape[0], groups, -1, x_BHRd.shape[3])


def _rows_by_head(x_BGrd: Tensor, heads: int) -> Tensor:
    """`_rows_by_group` undone: `[B, R, H, d]`."""
    return x_BGrd.reshape(x_BGrd.shape[0], heads, -1, x_BGrd.shape[3]).transpose(1, 2)


def _sigmoid_forward(q: Tensor, k: Tensor, v: Tensor, whole: _Map) -> Tensor:
    if uses_triton("attention", q, triton_faults(q, v, whole.scale)):
        form = triton_form("attention")
        return form.sigmoid_forward(q, k, v, *whole.settings)
    heads, groups = q.shape[2], k.shape[2]
    out_BNHe = v.new_empty(*q.shape[:3], v.shape[3])
    with without_autocast(q.device):
        k_BGMd, v_BGMe = _wide_by_group(k), _wide_by_group(v)
        for block in whole.blocks(_rows_of_a_block(q, k)):
            keys = slice(block.first_key, block.end_key)
            q_BGrd = _rows_by_group(q, block, groups) * whole.scale
            weights_BGrm = whole.weights(q_BGrd @ k_BGMd[:, :, keys].mT, block, heads)
            out_BNHe[:, block.first : block.end] = _rows_by_head(weights_BGrm @ v_BGMe[:, :, keys], heads)
    return out_BNHe


def _sigmoid_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: _Map) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: dS = P (1 - P) (dO V^T), for which no statistic of a row is needed."""
    if uses_triton("attention", q, triton_faults(q, v, whole.scale)):
        form = triton_form("attention")
        return form.sigmoid_backward(d_out, q, k, v, *whole.settings)
    heads, groups = q.shape[2], k.shape[2]
    dq_BNHd = torch.empty_like(q, memory_format=torch.contiguous_format)
    with without_autocast(q.device):
        k_BGMd, v_BGMe = _wide_by_group(k), _wide_by_group(v)
        dk_BGMd, dv_BGMe = torch.zeros_like(k_BGMd), torch.zeros_like(v_BGMe)
        for block in whole.blocks(_rows_of_a_block(q, k)):
            keys = slice(block.first_key, block.end_key)
            q_BGrd = _rows_by_group(q, block, groups) * whole.scale
            d_BGre = _rows_by_group(d_out, block, groups)
            weights_BGrm = whole.weights(q_BGrd @ k_BGMd[:, :, keys].mT, block, heads)
            dv_BGMe[:, :, keys] += weights_BGrm.mT @ d_BGre
            d_scores_BGrm = (d_BGre @ v_BGMe[:, :, keys].mT).mul_(weights_BGrm).mul_(weights_BGrm.neg_().add_(1))
            dk_BGMd[:, :, keys] += d_scores_BGrm.mT @ q_BGrd
            dq_BNHd[:, block.first : block.end] = _rows_by_head(d_scores_BGrm @ k_BGMd[:, :, keys], heads) * whole.scale
    dk_BMGd, dv_BMGe = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dk_BGMd, dv_BGMe))
    return dq_BNHd, dk_BMGd, dv_BMGe


def _map_of(q: Tensor, k: Tensor, slopes: Tensor | None, *rest: Any) -> _Map:
    *arguments, scale, bias, per_row = rest
    return _Map(Visible.from_arguments(q, k, *arguments), slopes, scale, bias, per_row)


# ------------------------------------------------------------- as operators, into which a compiler does not look

_REST = f"Tensor? slopes, {VISIBLE_SCHEMA}, float scale, float bias, bool per_row"


def _define_operators() -> None:
    """Blocks are a loop whose length depends on N: traced, it would be unrolled, and again for each other N."""
    forward = torch.library.custom_op(
        "headway::sigmoid_attention",
        lambda q, k, v, *rest: _sigmoid_forward(q, k, v, _map_of(q, k, *rest)),
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_REST}) -> Tensor",
    )
    backward = torch.library.custom_op(
        "headway::sigmoid_attention_backward",
        lambda d_out, q, k, v, *rest: _sigmoid_backward(d_out, q, k, v, _map_of(q, k, *rest)),
        mutates_args=(),
        schema=f"(Tensor d_out, Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(lambda q, k, v, *rest: v.new_empty(*q.shape[:3], v.shape[3]))
    backward.register_fake(
        lambda d_out, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    )
    forward.register_autograd(_differentiate, setup_context=_keep_inputs)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.first_index, ctx.causal, ctx.window, ctx.scale, ctx.bias, ctx.per_row = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.headway.sigmoid_attention_backward(
        d_out, *ctx.saved_tensors, ctx.first_index, ctx.causal, ctx.window, ctx.scale, ctx.bias, ctx.per_row
    )
    return (*grads, *[None] * 9)


# An exported model carries this file with it. Where it is loaded beside Headway, or beside another export, the
# operators are there: to define them again would take them away from who has them.
if not hasattr(torch.ops.headway, "sigmoid_attention"):
    _define_operators()
