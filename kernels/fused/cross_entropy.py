"""The head and the cross-entropy behind it as one operation, of which the logits are never held whole.

The loss is a sum over tokens, so the gradient of a chunk's logits is known as soon as they are: softmax less one-hot.
Forward goes over chunks of tokens, and adds what each has to say to the gradients of the stream and of the weight, for
a cotangent of 1; backward multiplies both by the true one. Nothing is computed twice: products are those of head and
loss apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import triton_form, uses_triton
from kernels.precision import computing_dtype, without_autocast

# Logits of a chunk: as many tokens as make so many of them, but never fewer or more than these. Every chunk reads and
# writes the weight's gradient once, so fewer than about a thousand tokens wait for memory on a GPU.
_LOGITS_AT_A_TIME = {"cpu": 2**23, "cuda": 2**28}
_FEWEST_TOKENS, _MOST_TOKENS = {"cpu": 256, "cuda": 1024}, 8192


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, ignored: int = -100, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden weight^T)[target], for each token and in sum, without logits `[T, V]`.

    Args:
        hidden_TD, weight_VD: one floating-point dtype, which is that of the logits.
        targets_T: int64, below V, or `ignored`.
        chunk: tokens whose logits are held at a time. Default: by the size of the vocabulary.

    Returns:
        The sum, 0-dim and differentiable once, in hidden and weight; and the nats `[T]`, not differentiable, 0 where
        the target is ignored. Both fp32 (fp64 for fp64 inputs), as are the softmax, and the sum over chunks that is
        the gradient of the weight.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    faults = _linear_cross_entropy_faults(hidden_TD, weight_VD, targets_T, chunk)
    if faults:
        raise ValueError(" ".join(faults))
    grad = torch.is_grad_enabled()
    total, nats_T, _, _ = torch.ops.headway.linear_cross_entropy(
        hidden_TD,
        weight_VD,
        targets_T,
        ignored,
        chunk or tokens_of_a_chunk(len(weight_VD), hidden_TD.device),
        grad and hidden_TD.requires_grad,
        grad and weight_VD.requires_grad,
    )
    return total, nats_T


def tokens_of_a_chunk(vocab_size: int, device: torch.device) -> int:
    """How many tokens have their logits held at a time."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    return max(_FEWEST_TOKENS[kind], min(_MOST_TOKENS, _LOGITS_AT_A_TIME[kind] // vocab_size))


def _linear_cross_entropy_faults(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> list[str]:
    faults = []
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or targets.shape != hidden.shape[:1]
        or hidden.shape[1:] != weight.shape[1:]
    ):
        faults.append(
            "hidden must be [T, D], the weight [V, D] and targets [T], received "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point() or targets.dtype != torch.int64:
        faults.append(
            "hidden and weight must be of one floating-point dtype and targets int64, received "
            f"{hidden.dtype}, {weight.dtype} and {targets.dtype}."
        )
    if chunk is not None and chunk < 1:
        faults.append(f"chunk = {chunk} must be at least 1.")
    return faults


# ------------------------------------------------------------------------------------------------ chunk by chunk


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, chunk: int, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, the nats `[T]`, and the gradients for a cotangent of 1, empty where they are not wanted."""
    wide, (count, _) = computing_dtype(hidden), hidden.shape
    nats_T = hidden.new_zeros(count, dtype=wide)
    d_hidden_TD = torch.empty_like(hidden if of_hidden else hidden[:0])
    d_weight_VD = torch.empty_like(weight if of_weight else weight[:0], dtype=wide)
    if count == 0:
        d_weight_VD.zero_()
    buffer_CV = hidden.new_empty(min(chunk, count), len(weight))
    by_triton = uses_triton("cross_entropy", hidden)
    with without_autocast(hidden.device):
        for rows in _slices(count, chunk):
            hidden_CD, targets_C = hidden[rows], targets[rows]
            logits_CV = torch.mm(hidden_CD, weight.t(), out=buffer_CV[: len(hidden_CD)])
            step = triton_form("cross_entropy").nats_and_gradient if by_triton else _nats_and_gradient
            nats_T[rows], d_logits_CV = step(logits_CV, targets_C, ignored, of_hidden or of_weight)
            if of_hidden:
                torch.mm(d_logits_CV, weight, out=d_hidden_TD[rows])
            if of_weight:
                _add_product(d_weight_VD, d_logits_CV, hidden_CD, kept=rows.start > 0)
    return nats_T.sum(), nats_T, d_hidden_TD, d_weight_VD


def _slices(count: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, count)) for first in range(0, count, chunk)]


def _nats_and_gradient(logits_CV: Tensor, targets_C: Tensor, ignored: int, derived: bool) -> tuple[Tensor, Tensor]:
    """Nats `[C]`, and softmax less one-hot where it is wanted; both 0 where the target is ignored.

    The logits may be overwritten.
    """
    wide_CV = logits_CV.to(computing_dtype(logits_CV))
    counted_C = targets_C != ignored
    own_C1 = torch.where(counted_C, targets_C, 0)[:, None]
    top_C1 = wide_CV.amax(-1, keepdim=True)
    target_C1 = wide_CV.gather(1, own_C1) - top_C1
    odds_CV = wide_CV.sub_(top_C1).exp_()
    sum_C1 = odds_CV.sum(-1, keepdim=True)
    nats_C = torch.where(counted_C, (sum_C1.log() - target_C1)[:, 0], 0)
    if not derived:
        return nats_C, odds_CV
    d_CV = odds_CV.mul_(counted_C[:, None] / sum_C1)
    d_CV.scatter_add_(1, own_C1, -counted_C[:, None].to(d_CV.dtype))
    return nats_C, d_CV.to(logits_CV.dtype)


def _add_product(d_weight_VD: Tensor, d_logits_CV: Tensor, hidden_CD: Tensor, *, kept: bool) -> None:
    """d_weight = d_logits^T hidden, plus what is there if that is kept, in the dtype of the sum."""
    how: dict[str, Any] = {"beta": float(kept), "out": d_weight_VD}
    if d_weight_VD.dtype == hidden_CD.dtype:
        torch.addmm(d_weight_VD, d_logits_CV.t(), hidden_CD, **how)
    elif d_weight_VD.is_cuda:
        torch.addmm(d_weight_VD, d_logits_CV.t(), hidden_CD, out_dtype=d_weight_VD.dtype, **how)
    else:
        product_VD = d_logits_CV.t() @ hidden_CD
        d_weight_VD.add_(product_VD) if kept else d_weight_VD.copy_(product_VD)


# -------------------------------------------------------------- as operators, into which a compiler does not look


def _define_linear_cross_entropy_operators() -> None:
    forward = torch.library.custom_op(
        "headway::linear_cross_entropy",
        _linear_cross_entropy,
        mutates_args=(),
        schema="(Tensor hidden, Tensor weight, Tensor targets, int ignored, int chunk, bool of_hidden, bool of_weight)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "headway::linear_cross_entropy_backward",
        _scaled_gradients,
        mutates_args=(),
        schema="(Tensor d_total, Tensor d_hidden, Tensor d_weight, ScalarType dtype) -> (Tensor, Tensor)",
    )

    @forward.register_fake
    def _(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, chunk: int, *wanted: bool) -> Any:
        wide = computing_dtype(hidden)
        nats_T = hidden.new_empty(len(hidden), dtype=wide)
        of_hidden, of_weight = wanted
        d_weight_VD = torch.empty_like(weight if of_weight else weight[:0], dtype=wide)
        return nats_T.sum(), nats_T, torch.empty_like(hidden if of_hidden else hidden[:0]), d_weight_VD

    @backward.register_fake
    def _(d_total: Tensor, d_hidden: Tensor, d_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.empty_like(d_hidden), torch.empty_like(d_weight, dtype=dtype)

    forward.register_autograd(_differentiate_linear_cross_entropy, setup_context=_keep_unit_gradients)


def _scaled_gradients(d_total: Tensor, d_hidden: Tensor, d_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cotangent counts in full: rounded to bfloat16, it would scale all of a gradient by as much."""
    wide = computing_dtype(d_hidden)
    return (d_hidden.to(wide) * d_total).to(dtype), (d_weight * d_total).to(dtype)


def _keep_unit_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, ctx.of_hidden, ctx.of_weight = inputs
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _differentiate_linear_cross_entropy(ctx: Any, d_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.headway.linear_cross_entropy_backward(d_total, *ctx.saved_tensors, ctx.dtype)
    d_hidden, d_weight = (d if want else None for d, want in zip(found, (ctx.of_hidden, ctx.of_weight), strict=True))
    return d_hidden, d_weight, None, None, None, None, None


# An exported model carries this file with it: see kernels/attention/sigmoid.py.
if not hasattr(torch.ops.headway, "linear_cross_entropy"):
    _define_linear_cross_entropy_operators()
