"""Data-parallel layouts equal one process: loss, every gradient, and the parameters after two optimizer steps.

Compared in fp64, where a wrong factor cannot hide behind rounding. Rows count 5 to 95% of their tokens, so a mean of
means is not the mean.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from model.objective import NextToken
from model.stack import Model
from parallel.config import ParallelConfig
from parallel.data import initialise, spread
from parallel.mesh import Layout, build_mesh, resolve_layout
from parallel.recompute import recompute_blocks
from tests.conformance.models import CASES, architecture, random_batch
from tests.pool import Pool
from trainer.config import OptimizerConfig
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

ROWS, LENGTH = 8, 24
KINDS = list(dict.fromkeys(kind for kind, _ in CASES))
LAYOUTS = {
    "accumulate 4": (1, ParallelConfig(microbatches=4)),
    "fsdp 2": (2, ParallelConfig()),
    "replicate 2": (2, ParallelConfig(dp_replicate=2, dp_shard=1)),
    "fsdp 4, accumulate 2": (4, ParallelConfig(microbatches=2)),
    "hsdp 2 x 2, accumulate 2, recompute": (4, ParallelConfig(dp_replicate=2, microbatches=2, recompute="full")),
}


def build(kind: str, parallel: ParallelConfig, world_size: int, bf16: bool = False) -> tuple[Model, Layout]:
    layout = resolve_layout(parallel, world_size)
    with torch.device("meta"):
        model = Model(architecture(kind, init_std=0.2))
    if not bf16:
        model.double()
    recompute_blocks(model, parallel.recompute)
    model = spread(model, build_mesh(layout, "cpu"), bf16=bf16)
    initialise(model, seed=3, device=torch.device("cpu"))
    return model, layout


def updater_of(model: Model, layout: Layout, rank: int) -> Updater:
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01, grad_clip=0.5), frozen=[])
    return Updater(
        model,
        optimizer,
        NextToken(),
        layout,
        device=torch.device("cpu"),
        grad_clip=0.5,
        seed=0,
        rank=rank,
        stop=StopRequest(),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def two_steps(kind: str, parallel: ParallelConfig, world_size: int, bf16: bool = False) -> dict[str, Any]:
    """Losses and norms of two steps, the gradients of the first, and the parameters at the end."""
    rank = torch.distributed.get_rank()
    model, layout = build(kind, parallel, world_size, bf16)
    updater = updater_of(model, layout, rank)
    share = ROWS // layout.data_parallel
    seen: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}}
    plain_step = updater.optimizer.step

    def noting_step() -> None:
        if not seen["gradients"]:
            seen["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters()}
        plain_step()

    updater.optimizer.step = noting_step  # type: ignore[method-assign, assignment]
    for step in (1, 2):
        batch = random_batch(ROWS, LENGTH, seed=step)
        rows = slice(rank * share, (rank + 1) * share)
        mine = replace(batch, **{name: tensor[rows] for name, tensor in vars(batch).items()})
        outcome = updater.update(mine, step, lr=0.01)
        seen["losses"].append(outcome.loss)
        seen["norms"].append(outcome.grad_norm)
    return seen | {"parameters": {name: whole(p) for name, p in model.named_parameters()}}


@pytest.fixture(scope="module")
def alone(pool: Pool) -> dict[str, dict[str, Any]]:
    return {kind: pool.run(two_steps, 1, kind, ParallelConfig(), 1)[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(pool: Pool, alone: dict[str, dict[str, Any]], kind: str, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    wanted = alone[kind]
    for rank, found in enumerate(pool.run(two_steps, world_size, kind, parallel, world_size)):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-12), f"loss on rank {rank}"
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-11), f"gradient norm on rank {rank}"
        for what in ("gradients", "parameters"):
            for parameter, value in wanted[what].items():
                torch.testing.assert_close(
                    found[what][parameter], value, rtol=1e-9, atol=1e-11, msg=lambda m, p=parameter: f"{p}: {m}"
                )


def test_the_clipping_was_not_idle(alone: dict[str, dict[str, Any]]) -> None:
    assert all(norm > 0.5 for seen in alone.values() for norm in seen["norms"])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_and_keeps_fp32_masters(pool: Pool, alone: dict[str, dict[str, Any]], kind: str) -> None:
    (found, _) = pool.run(two_steps, 2, kind, ParallelConfig(), 2, True)
    assert found["losses"] == pytest.approx(alone[kind]["losses"], rel=0.02)
    assert {value.dtype for value in found["parameters"].values()} == {torch.float32}
    assert {value.dtype for value in found["gradients"].values()} == {torch.float32}


def kept_wide(kind: str) -> set[str]:
    """Names of parameters that forward sees in fp32 under bf16."""
    model, _ = build(kind, ParallelConfig(), 2, bf16=True)
    seen = set()

    def note(module: torch.nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.float32:
                seen.add(f"{prefix}.{name}".lstrip("."))

    for prefix, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, prefix=prefix: note(m, prefix))
    batch = random_batch(2, 8)
    model(batch.tokens)
    return seen


def test_angles_stay_fp32_under_bf16(pool: Pool) -> None:
    assert pool.run(kept_wide, 2, "lightning")[0] == {"layers.0.mixer.lrpe.theta"}


def save_and_read_back(kind: str, folder: str, world_size: int, write: bool) -> dict[str, Any]:
    """Train one step and write, or read and train one step more."""
    from trainer.checkpoint import CheckpointWriter, Counters, load_training_state, training_state
    from trainer.config import CheckpointConfig

    rank = torch.distributed.get_rank()
    model, layout = build(kind, ParallelConfig(), world_size)
    updater = updater_of(model, layout, rank)
    run_dir = Path(folder)
    step = 1
    if not write:
        counters = load_training_state(run_dir / "checkpoints" / "step-00000001", model, updater.optimizer)
        assert counters == Counters(step=1, samples=ROWS, tokens=ROWS * LENGTH, skipped=3, skipped_in_a_row=2)
        step = 2
    share = ROWS // layout.data_parallel
    batch = random_batch(ROWS, LENGTH, seed=step)
    rows = slice(rank * share, (rank + 1) * share)
    mine = replace(batch, **{name: tensor[rows] for name, tensor in vars(batch).items()})
    loss = updater.update(mine, step, lr=0.01).loss
    if write:
        writer = CheckpointWriter(run_dir, CheckpointConfig(), lambda _: {}, lambda *_, **__: None)
        state = training_state(
            model, updater.optimizer, Counters(1, ROWS, ROWS * LENGTH, skipped=3, skipped_in_a_row=2)
        )
        writer.save(state, 1)
        # What is changed after the call must not reach the file.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        writer.close()
    return {"loss": loss, "parameters": {name: whole(p) for name, p in model.named_parameters()}}


@pytest.mark.parametrize(("written_by", "read_by"), [(4, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_continues_in_another_layout(
    pool: Pool, alone: dict[str, dict[str, Any]], tmp_path: Path, kind: str, written_by: int, read_by: int
) -> None:
    pool.run(save_and_read_back, written_by, kind, str(tmp_path), written_by, True)
    found = pool.run(save_and_read_back, read_by, kind, str(tmp_path), read_by, False)[0]
    assert found["loss"] == pytest.approx(alone[kind]["losses"][1], rel=1e-12)
    for name, value in alone[kind]["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=1e-9, atol=1e-11)
