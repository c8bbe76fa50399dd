"""The product inside of a gated feed-forward, act(gate) * up, that keeps its two factors and nothing else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import triton_form, uses_triton

GLU_ACTIVATIONS = ("none", "silu")


def glu(gate: Tensor, up: Tensor, activation: str = "none") -> Tensor:
    """act(gate) * up.

    Args:
        gate, up: [..., F], of one shape and floating-point dtype.
        activation: "none" or "silu", of the gate.

    Returns:
        Like gate. The Triton form rounds once, the portable one after the activation, too. Differentiable once.

    Raises:
        ValueError: shapes, dtypes or the activation are not such.

    Source: arXiv 2002.05202 (silu), arXiv 2405.17381, Eq. 12 (none).
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or activation not in GLU_ACTIVATIONS:
        raise ValueError(
            f"gate and up must be of one shape and dtype, and the activation one of {', '.join(GLU_ACTIVATIONS)}; "
            f"received {list(gate.shape)} of {gate.dtype}, {list(up.shape)} of {up.dtype} and {activation!r}."
        )
    if uses_triton("glu", gate):
        return torch.ops.headway.glu(gate, up, activation)
    if activation == "none":
        return gate * up
    if torch.compiler.is_compiling():
        # A compiler chooses by itself what to keep, and fuses what it sees.
        return F.silu(gate) * up
    return _SiluProduct.apply(gate, up)


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up, with the same roundings as torch's own, but without silu(gate) kept for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(d_out * up, gate) if ctx.needs_input_grad[0] else None
        return d_gate, d_out * F.silu(gate) if ctx.needs_input_grad[1] else None


# ----------------------------------------------- the Triton form as an operator, into which a compiler does not look


def _define_glu_operators() -> None:
    forward = torch.library.custom_op(
        "headway::glu",
        lambda gate, up, activation: triton_form("glu").forward(gate, up, activation),
        mutates_args=(),
        schema="(Tensor gate, Tensor up, str activation) -> Tensor",
    )
    backward = torch.library.custom_op(
        "headway::glu_backward",
        lambda d_out, gate, up, activation: triton_form("glu").backward(d_out, gate, up, activation),
        mutates_args=(),
        schema="(Tensor d_out, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    )
    forward.register_fake(lambda gate, up, activation: gate.new_empty(gate.shape))
    backward.register_fake(lambda d_out, gate, up, activation: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
    forward.register_autograd(_differentiate_glu, setup_context=_keep_glu_inputs)


def _keep_glu_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate_glu(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.headway.glu_backward(d_out, *ctx.saved_tensors, ctx.activation), None)


# An exported model carries this file with it: see kernels/attention/sigmoid.py.
if not hasattr(torch.ops.headway, "glu"):
    _define_glu_operators()
