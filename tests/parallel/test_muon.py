"""Muon: its iteration, torch's own as a peer, and matrices that are cut in every way against whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from parallel import muon
from parallel.config import ParallelConfig
from parallel.data import fill, local
from parallel.mesh import build_mesh, resolve_layout
from parallel.muon import Holders, Muon, learning_rate_factor, orthogonalise
from parallel.spread import Spread
from tests.conformance.layouts import Case, build, merged, whole
from tests.pool import Pool
from trainer.config import OptimizerConfig
from trainer.optimizer import build_optimizer, set_learning_rate

CASE = Case("lightning", num_layers=2, optimizer="muon")


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48), (1, 8)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    before = matrix.clone()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert s[0] > 1.5 or min(shape) == 1
    inside = u.T @ orthogonalise(matrix, 5) @ vt.T
    assert torch.equal(matrix, before)
    off_diagonal = inside - inside.diagonal().diag()
    assert off_diagonal.abs().max() < 1e-12
    # A square matrix has singular values near 0, which grow 3.4-fold in an iteration, and are not there yet.
    grown = s / matrix.norm() > 0.01
    assert grown.sum() >= min(shape) - 2
    assert (inside.diagonal()[grown] > 0.65).all()
    assert (inside.diagonal() < 1.25).all()


def test_nothing_comes_of_nothing() -> None:
    assert torch.equal(orthogonalise(torch.zeros(3, 5), 5), torch.zeros(3, 5))


def test_an_update_is_as_large_as_one_of_adamw() -> None:
    """Whose root mean square is about 0.2 (arXiv 2502.16982, section 2.2)."""
    for shape in ((64, 64), (128, 32), (32, 128)):
        update = orthogonalise(torch.randn(shape), 5) * learning_rate_factor(torch.Size(shape), "match_rms_adamw")
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)
    assert learning_rate_factor(torch.Size((128, 32)), "original") == 2
    assert learning_rate_factor(torch.Size((32, 128)), "original") == 1


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """A gradient of a whole parameter; of low rank, beside noise, as gradients are."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    noise = 0.01 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise
    return torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator) + noise


def take_gradients(model: Spread, step: int) -> None:
    """This process's parts of the gradients of all parameters."""
    for parameter in model.parameters.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = {name: model.whole(name, p.grad) for name, p in model.parameters.items() if p.grad is not None}
    fill(gradients, lambda name: gradient(name, model.cuts.shapes[name], step))


def beside_torch(settings: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> what three steps make of a parameter, ours and torch's, in a bf16 run of one process."""
    config = OptimizerConfig(kind="muon", lr=0.02, weight_decay=0.3, **settings)
    model = build(CASE, ParallelConfig(), "bf16")
    optimizer = build_optimizer(model, config, frozen=[])
    assert isinstance(optimizer, Muon)
    theirs = {name: local(p).detach().clone().requires_grad_() for name, p in model.parameters.items()}
    rest = [{"params": [], "weight_decay": decay} for decay in (0.3, 0.0)]
    for name, parameter in theirs.items():
        if name not in optimizer.names:
            rest[name != "embedding.weight"]["params"].append(parameter)  # type: ignore[attr-defined]
    peers = [
        torch.optim.Muon(
            [theirs[name] for name in optimizer.names],
            lr=0.02,
            weight_decay=0.3,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr,
        ),
        torch.optim.AdamW(rest, lr=0.02, betas=config.betas, eps=config.eps, fused=True),
    ]
    for step in (1, 2, 3):
        for both in (optimizer, *peers):
            set_learning_rate(both, 0.01 * step)
        take_gradients(model, step)
        for name, parameter in theirs.items():
            parameter.grad = gradient(name, parameter.shape, step)
        for both in (optimizer, *peers):
            both.step()
    return {name: (local(model.parameters[name]).detach(), theirs[name].detach()) for name in theirs}


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": False, "momentum": 0.5}, {"adjust_lr": "original", "ns_steps": 3}]
)
def test_it_is_torchs_muon_where_that_computes_alike(pool: Pool, settings: dict[str, Any]) -> None:
    """That is, in bf16; bit for bit."""
    (found,) = pool.run(beside_torch, 1, settings)
    assert len(found) > 20
    for name, (ours, theirs) in found.items():
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), name


def steps_with_given_gradients(parallel: ParallelConfig) -> dict[str, Any]:
    """Muon's matrices after two steps, from one of the processes that hold them; and those orthogonalised here."""
    model = build(CASE, parallel, "fp32")
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon", lr=0.05), frozen=["layers.0.mixer.q.weight"])
    seen: list[torch.Size] = []
    plain = muon.orthogonalise

    def noting(matrix: Tensor, steps: int) -> Tensor:
        seen.append(matrix.shape)
        return plain(matrix, steps)

    muon.orthogonalise = noting  # only here: a worker has one case
    unused = model.parameters["layers.0.mixer.k.weight"]
    before = local(unused).detach().clone()
    for step in (1, 2):
        take_gradients(model, step)
        unused.grad = None  # as of what forward does not use
        optimizer.step()
    assert torch.equal(local(unused), before)
    assert isinstance(optimizer, Muon)
    matrices = whole(model, {name: model.parameters[name] for name in optimizer.names})
    speaks = not (model.mesh.data_rank or model.mesh.rank("tp"))
    return {"matrices": matrices if speaks else {}, "orthogonalised": seen}


@pytest.fixture(scope="module")
def one_process(pool: Pool) -> dict[str, Any]:
    return pool.run(steps_with_given_gradients, 1, ParallelConfig())[0]


CUT = {
    "pieces of unequal size": (3, ParallelConfig()),
    "replicas": (4, ParallelConfig(dp_replicate=2)),
    "replicas of whole matrices": (3, ParallelConfig(dp_replicate=3)),
    "shares": (2, ParallelConfig(tp=2)),
    "shares in pieces": (4, ParallelConfig(tp=2)),
    "shares in pieces of unequal size": pytest.param((6, ParallelConfig(tp=2)), marks=pytest.mark.matrix),
    "shares in pieces, replicas": pytest.param((8, ParallelConfig(tp=2, dp_replicate=2)), marks=pytest.mark.matrix),
}


@pytest.mark.parametrize("layout", CUT.values(), ids=CUT)
def test_a_matrix_that_is_cut_gets_the_update_of_the_whole_one(
    pool: Pool, one_process: dict[str, Any], layout: tuple[int, ParallelConfig]
) -> None:
    """The gradients being the same, so are the updates; each matrix is orthogonalised once, not all in one place."""
    found = pool.run(steps_with_given_gradients, layout[0], layout[1])
    matrices = merged(found, "matrices")
    assert matrices.keys() == one_process["matrices"].keys()
    for name, value in one_process["matrices"].items():
        # Updates are near 0.02. (Bit for bit, where products do not depend on where in memory a matrix lies.)
        torch.testing.assert_close(matrices[name], value, rtol=0, atol=1e-7, msg=lambda said, name=name: name + said)
    computed = [shape for result in found for shape in result["orthogonalised"]]
    assert sorted(computed) == sorted(one_process["orthogonalised"])
    assert max(len(result["orthogonalised"]) for result in found) < len(computed)


def handed_around(parallel: ParallelConfig, shape: tuple[int, int], dimension: int | None) -> None:
    """Gather, on each holder, a matrix of its own; and hand it out again."""
    mesh = build_mesh(resolve_layout(parallel, dist.get_world_size()), "cpu").tensors
    holders = Holders(mesh)
    matrices = torch.randn(holders.size, *shape, generator=torch.Generator().manual_seed(5))
    cut: Placement = Replicate() if dimension is None else Shard(dimension)
    pieces = torch.zeros(holders.pieces_shape(torch.Size(shape), dimension))
    for piece, matrix in zip(pieces, matrices, strict=True):
        held = distribute_tensor(matrix, mesh, [Replicate(), cut, Shard(0)])
        assert isinstance(held, DTensor)
        part = held.to_local()
        piece.copy_(F.pad(part, (0, 0, 0, len(piece) - len(part))))
    mine = holders.gather(pieces, torch.Size(shape), dimension)
    assert torch.equal(mine, matrices[holders.index])
    assert torch.equal(holders.hand_out(mine, dimension), pieces)


AROUND: list[tuple[int, ParallelConfig, tuple[int, int], int | None]] = [
    (4, ParallelConfig(), (9, 3), None),  # the last piece is empty
    (4, ParallelConfig(), (2, 3), None),  # two are
    (4, ParallelConfig(tp=2), (6, 5), 0),
    (4, ParallelConfig(tp=2), (5, 6), 1),
    (4, ParallelConfig(tp=2), (5, 7), None),
    (4, ParallelConfig(tp=4), (8, 3), 0),
]


@pytest.mark.parametrize(("world_size", "parallel", "shape", "dimension"), AROUND)
def test_pieces_come_together_and_go_apart(
    pool: Pool, world_size: int, parallel: ParallelConfig, shape: tuple[int, int], dimension: int | None
) -> None:
    pool.run(handed_around, world_size, parallel, shape, dimension)
