"""Diagnostics of attention are those of one process, however the model is spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import model.diagnostics as model_diagnostics
from model.batch import Batch
from model.diagnostics import WINDOW, Diagnosis
from parallel.config import ParallelConfig
from parallel.diagnose import diagnose
from tests.conformance.layouts import LAYOUTS, PRODUCTS, Case, build
from tests.conformance.models import VOCAB, positions_of
from tests.pool import Pool

ROWS, LENGTH, QUERIES = 4, 192, 40
CHOSEN = {"num_heads": 4, "head_dim": 8, "shared_heads": 2, "active_heads": 1, "router": "norm"}
CASE = Case("moh+lightning+softmax+lightning", num_layers=4, model={"init_std": 0.3}, mixer=CHOSEN)
ALONE = ParallelConfig()
QUICK = ["tp2", "pp2 zbv", "cp2 x fsdp2"]
"""In the ordinary tests; together they have every way in which a model is spread."""
REST = [
    *("fsdp2", "hsdp2x2", "tp4", "pp2", "cp2", "tp2 x pp2", "tp2 x cp2", "pp2 x cp2", "pp4"),
    *("tp2, sequence whole", "cp2, recompute", "cp4, selective recomputation", "tp2 x cp2 x pp2"),
]


def packed_batch(isolated: bool = True) -> Batch:
    """Rows of a few documents, some with windows that lie across the middle; the last row is one document."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
    begins = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    for row, places in enumerate(([70], [10, 100], [3, 5, 69, 130], [])):
        begins[row, places] = 1
    documents = begins.cumsum(1)
    counted = torch.ones_like(documents, dtype=torch.bool)
    positions = positions_of(documents) if isolated else torch.arange(LENGTH).expand(ROWS, LENGTH)
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, documents if isolated else None, positions)


def diagnosed(case: Case, parallel: ParallelConfig, isolated: bool = True, num_queries: int | None = QUERIES) -> Any:
    """What the process finds, and what stands at its model afterwards. Collective."""
    model = build(case, parallel, "fp64")
    # Heads that nobody has trained have no sinks: what they give the first token is told apart at a lower bound.
    model_diagnostics.SINK = 0.05
    share = ROWS // model.layout.data_parallel
    first = model.mesh.data_rank * share
    found = diagnose(
        model, packed_batch(isolated).rows(slice(first, first + share)), rows=ROWS, num_queries=num_queries
    )
    left = [stage.observer for stage in model.stages] + [not stage.training for stage in model.stages]
    assert not any(left), "an observer, or evaluation, was left behind"
    return found


@pytest.fixture(scope="module")
def alone(pool: Pool) -> Any:
    known: dict[str, Diagnosis] = {}

    def run(*args: Any) -> Diagnosis:
        if str(args) not in known:
            known[str(args)] = pool.run(diagnosed, 1, args[0], ALONE, *args[1:])[0]
        return known[str(args)]

    return run


def assert_same(found: Diagnosis, wanted: Diagnosis) -> None:
    assert found.heads == wanted.heads
    assert found.sink_rate == wanted.sink_rate
    for name in ("residual_max", "first_norm_ratio", "sink_rates"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=0, equal_nan=True)
    for name, wanted_LH in wanted.by_head.items():
        torch.testing.assert_close(
            found.by_head[name],
            wanted_LH,
            rtol=1e-9,
            atol=1e-12,
            equal_nan=True,
            msg=lambda told, n=name: f"{n}: {told}",
        )


def compare(pool: Pool, alone: Any, name: str, *more: Any, case: Case = CASE) -> None:
    world_size, parallel = (LAYOUTS | PRODUCTS)[name]
    for found in pool.run(diagnosed, world_size, case, parallel, *more):
        assert_same(found, alone(case, *more))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.matrix) for name in REST)])
def test_a_layout_finds_what_one_process_finds(name: str, pool: Pool, alone: Any) -> None:
    compare(pool, alone, name)


def test_what_is_compared_is_worth_comparing(alone: Any) -> None:
    """Heads and layers differ, some heads have sinks and some none, and every kind of number is there."""
    found = alone(CASE)
    assert found.heads == [4, 0, 4, 0]
    assert 0 < found.sink_rate < 1
    for name, values_LH in found.by_head.items():
        numbers = values_LH[[0] if name == "load" else [0, 2]]
        assert numbers.isfinite().all(), name
        if name == "load":
            # Heads 0 and 1 are shared, one of the others runs for a token. They are kept in the order 0, 2, 1, 3.
            shared, routed = numbers.split(2, dim=1)
            assert shared.unique().tolist() == [1] and routed.sum() == 1 and len(routed.unique()) == 2
            continue
        if name not in ("mass", "sink_argmax"):
            assert len(numbers.unique()) == numbers.numel(), name
    assert torch.isfinite(found.first_norm_ratio).all() and (found.residual_max > 0).all()


@pytest.mark.parametrize("name", ["tp2", pytest.param("tp2 x cp2", marks=pytest.mark.matrix)])
def test_heads_of_experts_are_found_by_their_numbers(name: str, pool: Pool, alone: Any) -> None:
    """Twelve a layer, of which a rank has some of every expert."""
    case = Case("bam", example=3, num_layers=2, model={"init_std": 0.3})
    compare(pool, alone, name, case=case)
    found = alone(case)
    assert found.heads == [12, 12] and len(found.by_head["entropy"].unique()) == 24


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["cp2 x fsdp2", "tp2 x pp2"])
def test_rows_of_one_document_and_all_queries(name: str, pool: Pool, alone: Any) -> None:
    case = Case("softmax", example=1, num_layers=2, model={"init_std": 0.3})
    compare(pool, alone, name, False, None, case=case)
    assert WINDOW < LENGTH
