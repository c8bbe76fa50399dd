"""Rows sorted by group, and linear maps of which each group has its own: what mixtures of experts are made of."""

from __future__ import annotations

from collections.abc import Sequence
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
        grad = grad[inverse]
        if ctx.copies > 1:
            grad = grad.unflatten(0, (len(grad) // ctx.copies, ctx.copies)).sum(1)
        return grad, None, None, None


def permuted(x_RD: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order, `x[order]`; `inverse` undoes it."""
    return Gather.apply(x_RD, order, inverse, 1)


def inverse_of(order: Tensor) -> Tensor:
    """The order that undoes this one."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class Groups:
    """Which tokens of `[B, N]` are of which group, and how they are sorted by it: once for all that will use it.

    Attributes:
        sizes: how many tokens each group has.
        order: int64 `[T]`, the places of the tokens of group 0 in their order, then those of group 1, and so on; None
            where tokens are sorted as they are.
        ends: int32 `[G]`, one beyond the last row of each group.
    """

    def __init__(self, numbers_BN: Tensor, count: int):
        """`numbers_BN`, int64: each token's group, of so many."""
        self.shape = numbers_BN.shape
        numbers_T = numbers_BN.flatten()
        counts_G = F.one_hot(numbers_T, count).sum(0)
        self.sizes = group_sizes(counts_G, len(numbers_T))
        self.ends = counts_G.cumsum(0).int()
        self.order: Tensor | None = None
        if sum(size > 0 for size in self.sizes) > 1:
            self.order = numbers_T.argsort(stable=True)
            self._inverse = inverse_of(self.order)
        self._last: tuple[Tensor, Tensor] | None = None

    def rows_of(self, group: int) -> Tensor:
        """The places, among all T, of a group's tokens."""
        begin = sum(self.sizes[:group])
        rows = slice(begin, begin + self.sizes[group])
        if self.order is None:
            return torch.arange(rows.start, rows.stop, device=self.ends.device)
        return self.order[rows]

    def sort(self, x: Tensor) -> Tensor:
        """`[B, N, ...]` -> `[T, ...]`, by group. What is sorted several times in a row is sorted once."""
        assert x.shape[:2] == self.shape, f"{tuple(x.shape)} are not the tokens {tuple(self.shape)} that were grouped"
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        rows = x.flatten(0, 1)
        if self.order is not None:
            rows = permuted(rows, self.order, self._inverse)
        self._last = (x, rows)
        return rows

    def restore(self, rows: Tensor) -> Tensor:
        """`[T, ...]`, by group, -> `[B, N, ...]`. Sorted again, it is these rows."""
        x = rows if self.order is None else permuted(rows, self._inverse, self.order)
        x = x.unflatten(0, self.shape)
        self._last = (x, rows)
        return x

    def forget(self) -> None:
        """Hold on to nothing."""
        self._last = None


def each_its_own(maps: Sequence[torch.nn.Linear], x_TD: Tensor, groups: Groups) -> Tensor:
    """Linear maps, each for the rows of its group: `[T, F]`. A map without rows has gradients of zero, not none."""
    if all(each.bias is None and one_product_serves(x_TD, each.weight) for each in maps):
        return GroupedLinear.apply(x_TD, groups.ends, *(each.weight for each in maps))
    return torch.cat([each(rows) for each, rows in zip(maps, x_TD.split(groups.sizes), strict=True)])


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
