"""The global gradient norm, and clipping by it. torch's own refuses parameters on different meshes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, each element of each logical parameter counted once. Collective.

    Squares are summed per parameter in fp32 or wider and added up in fp64; parameters cut over the same mesh
    dimensions share one reduction. A parameter without a gradient (frozen, or not reached) counts as zero.

    Returns:
        fp64 scalar, equal on all ranks.
    """
    sums: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups, local = _cut_over(parameter.grad)
            sums.setdefault(groups, []).append(local)
    total: Tensor | float = 0.0
    for groups, locals_ in sums.items():
        norms = torch.stack(torch._foreach_norm(locals_)).double()
        squares = norms.square().sum()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total = total + squares
    return torch.as_tensor(total, dtype=torch.float64).sqrt()


def _cut_over(gradient: Tensor) -> tuple[tuple[dist.ProcessGroup, ...], Tensor]:
    """The groups over which this gradient is cut (not those over which it is replicated), and the local part."""
    if not isinstance(gradient, DTensor):
        return (), gradient
    mesh = gradient.device_mesh
    groups = tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(gradient.placements)
        if isinstance(placement, Shard) and mesh.size(dim) > 1
    )
    return groups, gradient.to_local()


def clip_gradients(parameters: Iterable[Tensor], norm: float, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; 0 means no limit."""
    if limit <= 0 or norm <= limit:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    locals_ = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(locals_, limit / norm)
