"""Feed-forwards of which each works on rows of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.grouped import GroupedLinear, one_product_serves
from model.context import Context


class Several(nn.ModuleDict):
    """Feed-forwards by their numbers: rows `[T, D]` sorted by them, so many for each, `[T, D]`.

    One without rows runs on none: so its gradients are zeros and not missing, whoever is waiting for them.
    """

    def forward(self, x_TD: Tensor, sizes: list[int], contexts: Sequence[Context]) -> Tensor:
        """`contexts`: what each of them is told beside its rows."""
        experts = list(self.values())
        linear = [child for child in experts[0].children() if _is_map(child)]
        if all(one_product_serves(x_TD, child.weight) for child in linear) and _are_linear_maps(experts):
            return _joined(experts, sizes, x_TD.device)(x_TD, contexts[0])
        parts = x_TD.split(sizes)
        return torch.cat([expert(part, ctx) for expert, part, ctx in zip(experts, parts, contexts, strict=True)])


class Experts(Several):
    """Those of a mixture, by their global numbers: expert parallelism spreads them over processes."""


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is None


def _are_linear_maps(experts: list[nn.Module]) -> bool:
    """Whether all that these feed-forwards have is linear maps, without biases, directly below."""
    direct = {f"{name}.weight" for name, child in experts[0].named_children() if _is_map(child)}
    alike = len({type(expert) for expert in experts}) == 1
    return alike and direct == {name for name, _ in experts[0].named_parameters()}


class _Joined(nn.Module):
    """One linear map of each of several feed-forwards, for rows sorted by them."""

    def __init__(self, maps: list[nn.Linear], ends: Tensor):
        super().__init__()
        self.weights, self.ends = [each.weight for each in maps], ends

    def forward(self, x_TD: Tensor) -> Tensor:
        return GroupedLinear.apply(x_TD, self.ends, *self.weights)


def _joined(experts: list[nn.Module], sizes: list[int], device: torch.device) -> nn.Module:
    """These feed-forwards as one, in which each linear map is that of all of them: its formula is that of any."""
    ends = torch.tensor(sizes, device=device).cumsum(0).int()
    one = copy.copy(experts[0])
    one._modules = dict(one._modules)
    for name, child in one._modules.items():
        if isinstance(child, nn.Linear):
            one._modules[name] = _Joined([expert.get_submodule(name) for expert in experts], ends)
    return one
