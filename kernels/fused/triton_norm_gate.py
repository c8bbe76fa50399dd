"""The Triton form of `kernels.fused.norm_gate`: a program has one row or several narrow ones before it, in fp32."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launches import on_their_gpu

TILE = 2048
"""Numbers of a program, as far as rows are narrower than that."""
MOST_PROGRAMS = 528
"""Of backward: each adds up the weight's gradient over its rows, so the fewer the less is added up in the end. Four for
each multiprocessor of an H100. A number of its own, so that sums come out the same on any device."""


def shape_of(width: int) -> dict[str, int]:
    """Rows and columns of a program's tile, and its warps, for rows of this width."""
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns)
    warps = min(32, max(4, rows * columns // 256))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "sigmoid":
        gate = tl.sigmoid(gate)
    elif ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    return gate


@triton.jit
def _norm_gate_forward(
    x_ptr, gate_ptr, weight_ptr, out_ptr, factors_ptr, count, width, eps,
    ACTIVATION: tl.constexpr, WEIGHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    at = rows[:, None] * width + columns[None, :]
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
    factors = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    normed = x * factors[:, None]
    if WEIGHED:
        normed = normed * tl.load(weight_ptr + columns, columns < width, 0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, normed * _activated(gate, ACTIVATION), inside)
    tl.store(factors_ptr + rows, factors, rows < count)


@triton.jit
def _norm_gate_backward(
    d_out_ptr, x_ptr, gate_ptr, weight_ptr, factors_ptr, d_x_ptr, d_gate_ptr, d_weights_ptr, count, width,
    ACTIVATION: tl.constexpr, WEIGHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program goes over every so-many-th tile; of the weight's gradient it leaves one row of sums behind."""
    columns = tl.arange(0, COLUMNS)
    in_width = columns < width
    if WEIGHED:
        weight = tl.load(weight_ptr + columns, in_width, 0.0).to(tl.float32)
        d_weight = tl.zeros([COLUMNS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        inside = (rows < count)[:, None] & in_width[None, :]
        d_out = tl.load(d_out_ptr + at, inside, 0.0).to(tl.float32)
        x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
        factors = tl.load(factors_ptr + rows, rows < count, 0.0)
        normed = x * factors[:, None]
        d_activated = d_out * normed
        d_normed = d_out * _activated(gate, ACTIVATION)
        if WEIGHED:
            d_activated = d_activated * weight[None, :]
            d_weight += tl.sum(d_normed * normed, 0)
            d_normed = d_normed * weight[None, :]
        if ACTIVATION == "sigmoid":
            share = tl.sigmoid(gate)
            d_activated = d_activated * share * (1 - share)
        elif ACTIVATION == "silu":
            share = tl.sigmoid(gate)
            d_activated = d_activated * share * (1 + gate * (1 - share))
        tl.store(d_gate_ptr + at, d_activated, inside)
        along = tl.sum(normed * d_normed, 1) / width
        tl.store(d_x_ptr + at, (d_normed - normed * along[:, None]) * factors[:, None], inside)
    if WEIGHED:
        tl.store(d_weights_ptr + tl.program_id(0).to(tl.int64) * width + columns, d_weight, in_width)


@on_their_gpu
def forward(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str) -> tuple[Tensor, Tensor]:
    """The gated rows, contiguous, and each row's factor `[T]`, fp32."""
    x, gate = x.contiguous(), gate.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    factors_T = x.new_empty(x.numel() // width, dtype=torch.float32)
    if count := len(factors_T):
        how = shape_of(width)
        grid = (triton.cdiv(count, how["ROWS"]),)
        given, weighed = (x, False) if weight is None else (weight.contiguous(), True)
        _norm_gate_forward[grid](x, gate, given, out, factors_T, count, width, eps, activation, weighed, **how)
    return out, factors_T


@on_their_gpu
def backward(
    d_out: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, factors_T: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight; that of no weight is empty."""
    d_out, x, gate = d_out.contiguous(), x.contiguous(), gate.contiguous()
    d_x, d_gate, width, count = torch.empty_like(x), torch.empty_like(gate), x.shape[-1], len(factors_T)
    how: dict[str, Any] = shape_of(width)
    programs = min(MOST_PROGRAMS, triton.cdiv(count, how["ROWS"]))
    d_weights_PW = x.new_empty(0 if weight is None else programs, width, dtype=torch.float32)
    if count:
        given, weighed = (x, False) if weight is None else (weight.contiguous(), True)
        _norm_gate_backward[(programs,)](
            d_out, x, gate, given, factors_T, d_x, d_gate, d_weights_PW, count, width, activation, weighed, **how
        )
    return d_x, d_gate, x.new_empty(0) if weight is None else d_weights_PW.sum(0).to(weight.dtype)
