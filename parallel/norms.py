"""The full-width norm of a mixer whose heads are spread over ranks, without a collective of its own.

Its factor is one number a token, and the output projection is linear: W (r O * U) = r W (O * U). So the projection's
partial sums and the partial sums of squares travel in one message, and the factor comes after
(TransNormerLLM with tensor parallelism: the derivation is in docs/parallelism.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.collectives import gather_pieces, sum_over, sum_piece
from parallel.region import Region


class DeferredNorm(nn.Module):
    """Weighs like the norm it stands for, and notes the sum of squares for the output projection to normalise by.

    Args:
        plain: SimpleRMSNorm or RMSNorm over the whole width; its weight, if any, is cut like the heads.
    """

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.width, self.eps = plain.width, plain.eps
        self.weight = getattr(plain, "weight", None)
        self.init_weights = plain.init_weights
        self._squares: Tensor | None = None

    def forward(self, x_BNe: Tensor) -> Tensor:
        wide = x_BNe.to(torch.promote_types(x_BNe.dtype, torch.float32))
        self._squares = wide.square().sum(-1, keepdim=True)
        return x_BNe if self.weight is None else x_BNe * self.weight

    def finish(self, partial_BND: Tensor, region: Region) -> Tensor:
        """This rank's summand of the output projection -> what the projection of the normed output is."""
        squares_BN1, self._squares = self._squares, None
        assert squares_BN1 is not None, "the norm comes before the output projection"
        out, squares = SumWithSquares.apply(partial_BND, squares_BN1, region)
        factor = torch.rsqrt(squares / self.width + self.eps)
        return (out.to(factor.dtype) * factor).to(out.dtype)


class SumWithSquares(torch.autograd.Function):
    """Both sums over the ranks of a region in one message; where the region cuts the sequence, a piece of them."""

    @staticmethod
    def forward(ctx: Any, partial_BND: Tensor, squares_BN1: Tensor, region: Region) -> tuple[Tensor, Tensor]:
        ctx.region = region
        message = torch.cat((partial_BND, _in_own_columns(squares_BN1, partial_BND.dtype, region)), dim=-1)
        if region.cuts_sequence:
            total = sum_piece(message, region.group, region.size)
        else:
            total = sum_over(message, region.group)
        width = partial_BND.shape[-1]
        return total[..., :width].contiguous(), total[..., width:].to(squares_BN1.dtype).sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_squares: Tensor) -> tuple[Tensor, Tensor, None]:
        region: Region = ctx.region
        if not region.cuts_sequence:
            return grad_out, grad_squares, None
        terms = exact_terms(grad_squares, grad_out.dtype)
        whole = gather_pieces(torch.cat((grad_out, *terms), dim=-1), region.group, region.size)
        width = grad_out.shape[-1]
        return whole[..., :width].contiguous(), whole[..., width:].to(grad_squares.dtype).sum(-1, keepdim=True), None


def exact_terms(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of a narrower type whose sum is x: one where x is no wider, three of bfloat16 for fp32."""
    terms = [x.to(dtype)]
    rest = x - terms[0]
    while len(terms) < 3 and x.dtype.itemsize > dtype.itemsize:
        terms.append(rest.to(dtype))
        rest = rest - terms[-1]
    return terms


def _in_own_columns(squares_BN1: Tensor, dtype: torch.dtype, region: Region) -> Tensor:
    """The statistic as columns of the message. In a narrower type each rank has columns of its own, zero elsewhere, so
    that nothing is rounded when the message is summed."""
    terms = torch.cat(exact_terms(squares_BN1, dtype), dim=-1)
    if terms.shape[-1] == 1:
        return terms
    columns = terms.new_zeros(*terms.shape[:-1], region.size, terms.shape[-1])
    columns[..., region.rank, :] = terms
    return columns.flatten(-2)
