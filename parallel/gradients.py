"""The global gradient norm, and clipping by it. torch's own refuses parameters on different meshes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from parallel.data import local


def counts_here(tensor: Tensor) -> bool:
    """Whether this process is the one that counts its part of a tensor: of those that hold it alike, the first.

    A tensor that is no DTensor is taken to be whole on every rank.
    """
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    assert all(placement.is_shard() or placement.is_replicate() for placement in tensor.placements)
    alike = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in alike)


def gradient_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm over all gradients of all ranks. Collective.

    Squares are summed per parameter in fp32 or wider and added up in fp64, over all ranks in one reduction.

    Args:
        gradients: those that count here, so that each element of each logical parameter is counted once.

    Returns:
        fp64 scalar, equal on all ranks.
    """
    locals_ = [local(gradient) for gradient in gradients]
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if locals_:
        # With offload, some are on the CPU.
        norms = [norm.to(device) for norm in torch._foreach_norm(locals_)]
        squares += torch.stack(norms).double().square().sum()
    dist.all_reduce(squares)
    return squares.sqrt()


def clip_gradients(gradients: Iterable[Tensor], norm: float, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; 0 means no limit."""
    if limit <= 0 or norm <= limit:
        return
    locals_ = [local(gradient) for gradient in gradients]
    if locals_:
        torch._foreach_mul_(locals_, limit / norm)
