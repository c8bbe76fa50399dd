"""Rows sorted by group, and linear maps of which each group has its own: what mixtures of experts are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

ALIGNMENT = 16
"""Bytes: what `grouped_mm` wants of the rows of its arguments."""


def group_sizes(counts: Tensor, total: int) -> list[int]:
    """`counts [E]` as numbers. Of tensors without values (in a plan), `total` spread evenly."""
    if is_fake(counts):
        each, more = divmod(total, len(counts))
        return [each + (group < more) for group in range(len(counts))]
    return counts.tolist()


class Gather(torch.autograd.Function):
    """Rows `[T, D]`, each taken `copies` times, in another order: `[T * copies, D]`.

    Row r of the result is copy `order[r]`, of row `order[r] // copies`. Backward takes copies back to their places and
    adds them up: no row is written by two at a time, so the sum is always the same (an index's own gradient is not, on
    a GPU, and is slow on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x_TD[order // copies]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def permuted(x_RD: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order, `x[order]`; `inverse` undoes it."""
    return Gather.apply(x_RD, order, inverse, 1)


def inverse_of(order: Tensor) -> Tensor:
    """The order that undoes this one."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def one_product_serves(x_TD: Tensor, weight_FD: Tensor) -> bool:
    """Whether `GroupedLinear` is worth its copy of the weights: on a GPU, where many small products leave it idle.

    On a CPU a loop takes the time of one product of all rows (decision 0020).
    """
    aligned = all(size * x_TD.element_size() % ALIGNMENT == 0 for size in weight_FD.shape)
    return x_TD.is_cuda and len(x_TD) > 0 and aligned and can_group(x_TD.dtype)


def can_group(dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product for this dtype."""
    return hasattr(F, "grouped_mm") and dtype in (torch.float32, torch.bfloat16, torch.float16)


class GroupedLinear(torch.autograd.Function):
    """`x_g W_g^T` for rows `[T, D]` sorted by group, ending at `ends` `[G]` int32: `[T, F]`, in one grouped product.

    Weights `[F, D]` are given one by one and joined for the product, in forward and once more in backward, so that
    nothing is kept for backward but what is there anyway. A group without rows has gradients of zero.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, ends, *weights)
        return F.grouped_mm(x_TD.contiguous(), torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, ends, *weights = ctx.saved_tensors
        grad_TF = grad_TF.contiguous()
        grad_x = F.grouped_mm(grad_TF, torch.stack(weights), offs=ends) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return grad_x, None, *(None for _ in weights)
        return grad_x, None, *F.grouped_mm(grad_TF.t(), x_TD.contiguous(), offs=ends).unbind()
