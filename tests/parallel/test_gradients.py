"""The gradient norm over parameters that are whole, cut, and replicated, on different meshes at once."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from parallel.gradients import clip_gradients, counts_here, gradient_norm
from tests.pool import Pool


def mixed_norm() -> tuple[float, float, float]:
    """(our norm, the norm of the whole gradients, the norm after clipping to 0.5)."""
    torch.manual_seed(0)
    wide = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("experts",))
    layouts = [
        (None, (5,)),
        ((wide, (Replicate(), Shard(0))), (7, 3)),  # uneven: 4 and 3 rows
        ((wide, (Shard(0), Shard(0))), (9, 2)),
        ((wide, (Shard(1), Replicate())), (2, 4)),
        ((flat, (Shard(0),)), (3, 6)),  # the last rank holds nothing
    ]
    parameters, whole = [], []
    for layout, shape in layouts:
        gradient = torch.randn(shape)
        whole.append(gradient.flatten())
        value = gradient.clone()
        if layout is not None:
            value = distribute_tensor(value, layout[0], layout[1])
        parameter = torch.nn.Parameter(torch.zeros_like(value))
        parameter.grad = value
        parameters.append(parameter)
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # frozen: no gradient
    gradients = [p.grad for p in parameters if p.grad is not None]
    counted = [gradient for gradient in gradients if counts_here(gradient)]
    cpu = torch.device("cpu")
    norm = gradient_norm(counted, cpu).item()
    clip_gradients(gradients, norm, 0.5)
    return norm, torch.cat(whole).double().norm().item(), gradient_norm(counted, cpu).item()


def test_every_element_counts_once_whatever_the_mesh(pool: Pool) -> None:
    for found, wanted, clipped in pool.run(mixed_norm, 4):
        assert found == pytest.approx(wanted, rel=1e-6)
        assert clipped == pytest.approx(0.5, rel=1e-6)


def test_no_clipping_below_the_limit_nor_without_one() -> None:
    gradient = torch.tensor([3.0, 4.0])
    for limit in (0.0, 5.0, 7.0):
        clip_gradients([gradient], 5.0, limit)
        assert gradient.tolist() == [3.0, 4.0]
