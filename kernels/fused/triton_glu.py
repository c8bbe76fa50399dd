"""The Triton form of `kernels.fused.glu`: forward and backward are one pass each, computed in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launches import on_their_gpu

BLOCK, NUM_WARPS = 2048, 8
"""Numbers of a program, and its warps: 8 a thread, so that loads are 16 bytes wide in any dtype."""


@triton.jit
def _glu_forward(gate_ptr, up_ptr, out_ptr, count, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + at, inside, 0.0).to(tl.float32)
    if SILU:
        gate = gate * tl.sigmoid(gate)
    tl.store(out_ptr + at, gate * up, inside)


@triton.jit
def _glu_backward(d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, count, SILU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d_out = tl.load(d_out_ptr + at, inside, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + at, inside, 0.0).to(tl.float32)
    if SILU:
        share = tl.sigmoid(gate)
        tl.store(d_gate_ptr + at, d_out * up * share * (1 + gate * (1 - share)), inside)
        tl.store(d_up_ptr + at, d_out * gate * share, inside)
    else:
        tl.store(d_gate_ptr + at, d_out * up, inside)
        tl.store(d_up_ptr + at, d_out * gate, inside)


@on_their_gpu
def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, contiguous."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if count := out.numel():
        grid = (triton.cdiv(count, BLOCK),)
        _glu_forward[grid](gate, up, out, count, activation == "silu", BLOCK, num_warps=NUM_WARPS)
    return out


@on_their_gpu
def backward(d_out: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    d_out, gate, up = d_out.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if count := gate.numel():
        grid = (triton.cdiv(count, BLOCK),)
        _glu_backward[grid](d_out, gate, up, d_gate, d_up, count, activation == "silu", BLOCK, num_warps=NUM_WARPS)
    return d_gate, d_up
