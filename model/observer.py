"""Whoever looks into the blocks during a forward pass, and how a loss that is found there enters backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.attention import AttentionMap
from model.routing import Routing


class Observer:
    """Is shown what happens inside of the blocks of one forward pass. This one looks at nothing."""

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        """Called by every mixer that has such weights. What it returns stands in for the queries from here on, so that
        a loss on the weights can enter backward here."""
        return weights.q_BNHd

    def routing(self, layer: int, found: Routing) -> Tensor:
        """Called by every layer that chooses units by a router. What it returns stands in for the scores."""
        return found.scores_BNU

    def residual(self, layer: int, x: Tensor) -> None:
        """Called by every block with what comes into it."""


class EnterBackward(torch.autograd.Function):
    """x, as it is. In backward, the derivative of a loss with respect to `quantity`, which was computed from x, begins
    here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantity: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        ctx.shape = quantity.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return grad, derivative.expand(ctx.shape), None
