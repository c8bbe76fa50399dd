"""A root mean square norm and the gate behind it, with nothing kept for backward but what came in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import triton_form, uses_triton
from kernels.precision import computing_dtype

GATE_ACTIVATIONS = ("none", "sigmoid", "silu")
WIDEST_NORM_GATE = 16384
"""Channels: a program of the Triton form has a whole row before it."""


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float, activation: str = "none") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * act(gate), the mean over the last dimension.

    Args:
        x, gate: [..., W], of one shape and floating-point dtype.
        weight: [W], of that dtype. Default: ones.
        activation: "none", "sigmoid" or "silu", of the gate.

    Returns:
        Like x. Statistics are float32 (float64 for float64 inputs). The Triton form rounds once, the portable one also
        after the norm and the activation. Differentiable once.

    Raises:
        ValueError: shapes, dtypes or the activation are not such.

    Source: arXiv 2405.17381, Eq. 11 and 14 (no weight, no activation); arXiv 2501.08313 (weight and sigmoid).
    """
    _check_norm_gate(x, gate, weight, activation)
    width = x.shape[-1]
    unfit = "" if 0 < width <= WIDEST_NORM_GATE else f"rows of {width} channels, {WIDEST_NORM_GATE} is the most"
    if uses_triton("norm_gate", x, unfit):
        return torch.ops.headway.norm_gate(x, gate, weight, eps, activation)[0]
    if torch.compiler.is_compiling():
        # A compiler chooses by itself what to keep, and fuses what it sees.
        return _norm_gate_forward(x, gate, weight, eps, activation)
    return _NormGate.apply(x, gate, weight, eps, activation)


def _check_norm_gate(x: Tensor, gate: Tensor, weight: Tensor | None, activation: str) -> None:
    faults = []
    if x.shape != gate.shape or x.dtype != gate.dtype:
        faults.append(
            f"x and gate must be of one shape and dtype, received {list(x.shape)} of {x.dtype} and "
            f"{list(gate.shape)} of {gate.dtype}."
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        faults.append(f"the weight must be {list(x.shape[-1:])}, received {list(weight.shape)}.")
    if activation not in GATE_ACTIVATIONS:
        faults.append(f"the activation {activation!r} must be one of {', '.join(GATE_ACTIVATIONS)}.")
    if faults:
        raise ValueError(" ".join(faults))


def activate_gate(gate: Tensor, activation: str) -> Tensor:
    """act(gate), in its dtype."""
    return {"none": lambda x: x, "sigmoid": torch.sigmoid, "silu": F.silu}[activation](gate)


# ------------------------------------------------------------------------------------- the portable form


def _norm_gate_forward(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps) * activate_gate(gate, activation)


class _NormGate(torch.autograd.Function):
    """Keeps its inputs, and finds the factor of a row again: that is one more pass, over what is read anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str) -> Tensor:
        return _norm_gate_forward(x, gate, weight, eps, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gate, weight, ctx.eps, ctx.activation = inputs
        ctx.save_for_backward(x, gate, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        wide = computing_dtype(x)
        d_wide, x_wide = d_out.to(wide), x.to(wide)
        # With n = x r and r = 1 / sqrt(mean(x^2) + eps): dx = r (dn - n mean(n dn)).
        factor = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + ctx.eps)
        normed = x_wide * factor
        weighed = normed if weight is None else normed * weight
        d_gate = _gate_gradient(d_wide * weighed, gate.to(wide), ctx.activation).to(gate.dtype)
        d_weighed = d_wide * activate_gate(gate.to(wide), ctx.activation)
        d_weight = None
        if weight is not None:
            d_weight = (d_weighed * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
            d_weighed = d_weighed * weight
        d_x = factor * (d_weighed - normed * (normed * d_weighed).mean(-1, keepdim=True))
        return d_x.to(x.dtype), d_gate, d_weight, None, None


def _gate_gradient(d_activated: Tensor, gate: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return d_activated
    share = torch.sigmoid(gate)
    slope = share * (1 - share)
    return d_activated * (slope if activation == "sigmoid" else share + gate * slope)


# ----------------------------------------------- the Triton form as an operator, into which a compiler does not look


def _define_norm_gate_operators() -> None:
    forward = torch.library.custom_op(
        "headway::norm_gate",
        lambda x, gate, weight, eps, activation: triton_form("norm_gate").forward(x, gate, weight, eps, activation),
        mutates_args=(),
        schema="(Tensor x, Tensor gate, Tensor? weight, float eps, str activation) -> (Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "headway::norm_gate_backward",
        lambda d_out, x, gate, weight, factors_T, activation: triton_form("norm_gate").backward(
            d_out, x, gate, weight, factors_T, activation
        ),
        mutates_args=(),
        schema="(Tensor d_out, Tensor x, Tensor gate, Tensor? weight, Tensor factors, str activation) "
        "-> (Tensor, Tensor, Tensor)",
    )

    @forward.register_fake
    def _(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)

    @backward.register_fake
    def _(d_out: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        d_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        return x.new_empty(x.shape), gate.new_empty(gate.shape), d_weight

    forward.register_autograd(_differentiate_norm_gate, setup_context=_keep_norm_gate_inputs)


def _keep_norm_gate_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, weight, _, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gate, weight, output[1])


def _differentiate_norm_gate(ctx: Any, d_out: Tensor, d_factors: Tensor | None) -> tuple[Tensor | None, ...]:
    x, gate, weight, factors_T = ctx.saved_tensors
    d_x, d_gate, d_weight = torch.ops.headway.norm_gate_backward(d_out, x, gate, weight, factors_T, ctx.activation)
    return d_x, d_gate, None if weight is None else d_weight, None, None


# An exported model carries this file with it: see kernels/attention/sigmoid.py.
if not hasattr(torch.ops.headway, "norm_gate"):
    _define_norm_gate_operators()
