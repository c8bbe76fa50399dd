"""Stages by cost, and what torch's schedules must not do behind our back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from model.stack import Block, Model
from parallel.config import ParallelConfig
from parallel.mesh import resolve_layout, stages_of_rank
from parallel.pipeline import cut_by_cost, layers_of_stages, stage_holders
from tests.conformance.layouts import LR, Case, build, share_of, updater_of
from tests.pool import Pool


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_other_cut_has_a_cheaper_costliest_stage(count: int) -> None:
    costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    first, last = 0.5, 7.0

    def peak(stages: list[range]) -> float:
        sums = [sum(costs[layer] for layer in stage) for stage in stages]
        return max(sum_ + first * (i == 0) + last * (i == count - 1) for i, sum_ in enumerate(sums))

    best = min(
        peak([range(a, b) for a, b in itertools.pairwise((0, *inner, len(costs)))])
        for inner in itertools.combinations(range(1, len(costs)), count - 1)
    )
    found = cut_by_cost(costs, count, first, last)
    assert peak(found) == best
    assert [layer for stage in found for layer in stage] == list(range(len(costs)))
    assert all(found)


def test_equal_layers_are_cut_evenly_and_a_head_counts() -> None:
    assert [len(stage) for stage in cut_by_cost([1.0] * 8, 4)] == [2, 2, 2, 2]
    assert [len(stage) for stage in cut_by_cost([1.0] * 8, 2, last=4.0)] == [6, 2]


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    layout = resolve_layout(ParallelConfig(pp=2), 2)
    plain, large = (
        layers_of_stages(Model(Case("softmax", model={"vocab_size": size}).architecture()), layout, 24)
        for size in (8, 5000)
    )
    assert [len(stage) for stage in plain] == [2, 2]
    assert [len(stage) for stage in large] == [3, 1]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "zbv"])
def test_every_stage_has_one_holder(schedule: Any) -> None:
    layout = resolve_layout(ParallelConfig(pp=4, pp_schedule=schedule), 4)
    held = [stages_of_rank(layout, rank) for rank in range(4)]
    assert sorted(stage for stages in held for stage in stages) == list(range(layout.num_stages))
    assert all(stage in held[rank] for stage, rank in enumerate(stage_holders(layout)))
    if schedule == "zbv":
        assert held[0] == [0, 7] and held[3] == [3, 4]


def blocks_run(schedule: Any) -> list[int]:
    """How many blocks ran, on this rank, in each of: step, evaluation, step, step, evaluation."""
    case = Case("softmax")
    model = build(case, ParallelConfig(pp=2, pp_schedule=schedule), "fp32")
    updater = updater_of(model, case)
    counts = [0]

    def count(*_: Any) -> None:
        counts[-1] += 1

    for stage in model.stages:
        for block in stage.layers.values():
            assert isinstance(block, Block)
            block.register_forward_pre_hook(count)
    for what in ("step", "evaluate", "step", "step", "evaluate"):
        if what == "step":
            updater.update(share_of(model, 1), 1, lr=LR)
        else:
            model.evaluating(True)
            model.evaluate(share_of(model, 2), updater.objective)
            model.evaluating(False)
        counts.append(0)
    return counts[:-1]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "zbv"])
def test_no_block_runs_that_was_not_asked_to(pool: Pool, schedule: Any) -> None:
    """Left to itself, torch finds shapes out by a hidden step on memory that nobody has written to."""
    for counts in pool.run(blocks_run, 2, schedule):
        assert counts == [2 * 4] * 5  # two layers, four micro-batches
