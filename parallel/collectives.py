"""Collectives that gradients flow through. Each has its adjoint for backward.

They are torch's functional collectives, which torch.compile traces. A group goes by its name, as those want it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


def sum_over(x: Tensor, group: str) -> Tensor:
    """Sum over the ranks of a group, on each of them. No gradient."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def max_over(x: Tensor, group: str) -> Tensor:
    """Largest value over the ranks of a group, on each of them. No gradient."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "max", group))


def gather_pieces(x_Bn: Tensor, group: str, size: int) -> Tensor:
    """The pieces `[B, n, ...]` of the `size` ranks one behind the other along N. No gradient."""
    pieces = _ops.wait_tensor(_ops.all_gather_into_tensor(x_Bn.contiguous(), size, group))
    return pieces.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def sum_piece(x_BN: Tensor, group: str, size: int) -> Tensor:
    """Sum over the `size` ranks of a group, of which each gets its own piece `[B, N / size, ...]`. No gradient."""
    pieces = x_BN.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(pieces.flatten(0, 1), "sum", size, group))


def exchange(parts: Tensor, group: str, size: int) -> Tensor:
    """Part i of `[size, ...]` goes to rank i of the group; part i of the result came from there. No gradient."""
    return _ops.wait_tensor(_ops.all_to_all_single(parts.contiguous(), [1] * size, [1] * size, group))


class Gather(torch.autograd.Function):
    """Pieces of a sequence -> the whole. Backward sums what each rank says of it, and keeps a piece."""

    @staticmethod
    def forward(ctx: Any, x_Bn: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return gather_pieces(x_Bn, group, size)

    @staticmethod
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor, None, None]:
        return sum_piece(grad_BN, ctx.group, ctx.size), None, None


class Trade(torch.autograd.Function):
    """Cuts dimension `cut` into one part for each rank, and joins what comes from all along dimension `joined`.

    So a piece of the sequence, `[B, n, H, d]`, becomes a part of the heads,
    `[B, N, H / size, d]`. Backward trades back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, group: str, size: int) -> Tensor:
        ctx.back = (joined, cut, group, size)
        received = exchange(torch.stack(x.chunk(size, dim=cut)), group, size)
        return torch.cat(received.unbind(), dim=joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return Trade.apply(grad, *ctx.back), None, None, None, None


class ExchangeRows(torch.autograd.Function):
    """Rows `[R, D]`, so many in a row to each rank of a group -> those that come from each. Backward goes back."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
        ctx.back = (received, sent, group)
        return _ops.wait_tensor(_ops.all_to_all_single(x_RD.contiguous(), received, sent, group))

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return ExchangeRows.apply(grad_RD, *ctx.back), None, None, None


class SumPiece(torch.autograd.Function):
    """Summands of a whole sequence -> a piece of their sum. Backward gathers."""

    @staticmethod
    def forward(ctx: Any, x_BN: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return sum_piece(x_BN, group, size)

    @staticmethod
    def backward(ctx: Any, grad_Bn: Tensor) -> tuple[Tensor, None, None]:
        return gather_pieces(grad_Bn, ctx.group, ctx.size), None, None


class Enter(torch.autograd.Function):
    """The same on every rank -> the same, and each rank uses it for its own part. Backward sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """Summands -> their sum, on every rank. Backward hands the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_lists(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each of these tensors over a group, in place, in one collective for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view_as(tensor) for part, tensor in zip(parts, alike, strict=True)])
