"""The balance of routers in whole models: equal to its equation by plain autograd, and the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.entropy import EntropyPenalty
from model.observer import Observer
from model.routing import Routing, choose_units
from parallel.config import ParallelConfig
from tests.conformance.layouts import (
    BOUNDS,
    CLIP,
    LAYOUTS,
    LENGTH,
    PRODUCTS,
    ROWS,
    Case,
    assert_equal,
    build,
    compiled_steps,
    depth,
    share_of,
    two_steps,
    updater_of,
)
from tests.conformance.models import random_batch
from tests.pool import Pool

Alone = Callable[..., dict[str, Any]]
MATRIX = pytest.mark.matrix
WEIGHT = 0.7
"""So large that the balance has a good part in every gradient."""
LEARNED = Case("moh", model={"init_std": 0.3}, mixer={"balance_weight": WEIGHT})
GLOBAL = replace(LEARNED, mixer={"balance_weight": WEIGHT, "balance_over": "global_batch"})
NORM = replace(LEARNED, mixer={"balance_weight": WEIGHT, "router": "norm"})
GROUPS = replace(GLOBAL, example=2)
HYBRID = replace(LEARNED, kind="moh+lightning+softmax+moh")
"""Of four layers, two have a router."""
PENALTY = EntropyPenalty(0.5, margin=0.07, threshold=0.3)
BOTH = replace(LEARNED, entropy=PENALTY)
CASES = {"sequence": LEARNED, "global batch": GLOBAL, "norm": NORM, "groups": GROUPS, "hybrid": HYBRID}


class _Scores(Observer):
    def __init__(self) -> None:
        self.found: dict[int, Routing] = {}

    def routing(self, layer: int, found: Routing) -> Tensor:
        self.found[layer] = found
        return found.scores_BNU


def eager_step(case: Case, step: int = 1) -> dict[str, Any]:
    """beta times the mean over layers of U sum_i P_i f_i, in loops over sequences, beside the cross-entropy."""
    model = build(replace(case, mixer=case.mixer | {"balance_weight": 0.0}), ParallelConfig(), "fp64").stages[0]
    batch = random_batch(ROWS, LENGTH, seed=step, isolated=case.isolated)
    model.observer = looking = _Scores()
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    loss = F.cross_entropy(logits[batch.counted], batch.targets[batch.counted])
    layers = []
    for found in looking.found.values():
        p, chosen = found.scores_BNU.softmax(-1), found.chosen_BNU.double()
        units = p.shape[-1]
        over = case.mixer.get("balance_over", "sequence")
        groups = [(p[row], chosen[row]) for row in range(ROWS)]
        if over == "global_batch":
            groups = [(p.flatten(0, 1), chosen.flatten(0, 1))]
        terms = [units * sum(p_T[:, i].mean() * m_T[:, i].mean() for i in range(units)) for p_T, m_T in groups]
        layers.append(torch.stack(terms).mean())
    auxiliary = WEIGHT * torch.stack(layers).mean()
    (loss + auxiliary).backward()
    return {
        "loss": loss.item(),
        "auxiliary": auxiliary.item(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("name", CASES)
def test_training_is_on_the_equation(name: str, pool: Pool, alone: Alone) -> None:
    case = CASES[name]
    (wanted,), found = pool.run(eager_step, 1, case), alone(case)
    assert found["losses"][0] == pytest.approx(wanted["loss"], rel=1e-12)
    assert found["auxiliary"][0] == pytest.approx(wanted["auxiliary"], rel=1e-12)
    norm = sum(gradient.square().sum().item() for gradient in wanted["gradients"].values()) ** 0.5
    assert found["norms"][0] == pytest.approx(norm, rel=1e-11)
    for parameter, gradient in wanted["gradients"].items():
        torch.testing.assert_close(found["gradients"][parameter], gradient * (CLIP / norm), rtol=1e-8, atol=1e-12)


def values(case: Case) -> list[float]:
    """The weighted balance in two steps that change nothing."""
    model = build(case, ParallelConfig(microbatches=2), "fp64")
    updater = updater_of(model, case)
    return [updater.update(share_of(model, step), step, lr=0.0).auxiliary["head_balance_loss"] for step in (1, 2)]


@pytest.mark.parametrize("name", ["sequence", "global batch"])
def test_each_step_counts_what_its_own_batch_chooses(name: str, pool: Pool) -> None:
    wanted = [pool.run(eager_step, 1, CASES[name], step)[0]["auxiliary"] for step in (1, 2)]
    assert pool.run(values, 1, CASES[name])[0] == pytest.approx(wanted, rel=1e-12)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-5)


QUICK = {
    "sequence": ("tp2", "pp2 zbv", "hsdp2x2", "recompute"),
    "global batch": ("accumulate 4", "tp2 x pp2 x fsdp2"),
    "norm": ("tp2 x cp2",),
}
SLOW = {
    "sequence": ("cp2",),
    "global batch": ("cp2 x fsdp2",),
    "norm": ("tp2, sequence whole",),
    "groups": ("tp2 x fsdp2",),
    "hybrid": ("pp2 x fsdp2",),
}
MORE = ("fsdp4", "pp4 interleaved", "cp4", "tp2 x cp2 x pp2", "pp2, recompute", "cp2, recompute")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, layout) for name, layouts in QUICK.items() for layout in layouts),
        *(pytest.param(name, layout, marks=MATRIX) for name, layouts in SLOW.items() for layout in layouts),
        *(pytest.param(name, layout, marks=MATRIX) for name in ("global batch", "norm") for layout in MORE),
    ],
)
def test_a_layout_equals_one_process(name: str, layout: str, pool: Pool, alone: Alone) -> None:
    world_size, parallel = (LAYOUTS | PRODUCTS)[layout]
    case = replace(CASES[name], num_layers=depth(layout, "fp64"))
    found = pool.run(two_steps, world_size, case, parallel, "fp64")
    assert_equal(found, alone(case), BOUNDS["fp64"])
    assert all(result["auxiliary"] == pytest.approx(alone(case)["auxiliary"], rel=1e-11) for result in found)


@pytest.mark.parametrize("layout", ["tp2", pytest.param("tp2 x cp2 x pp2", marks=MATRIX)])
def test_beside_a_penalty_on_entropies(layout: str, pool: Pool, alone: Alone) -> None:
    """Two losses watch one forward pass."""
    world_size, parallel = LAYOUTS[layout]
    case = replace(BOTH, num_layers=depth(layout, "fp64"))
    assert len(alone(case)["auxiliary"]) == 4
    assert_equal(pool.run(two_steps, world_size, case, parallel, "fp64"), alone(case), BOUNDS["fp64"])


@MATRIX
def test_compiled_blocks_train_on_it(pool: Pool, alone: Alone, tmp_path: Path) -> None:
    """The graph breaks where what was chosen is counted, and nowhere else."""
    world_size, parallel = LAYOUTS["tp2"]
    case = replace(LEARNED, num_layers=2)
    found = pool.run(compiled_steps, world_size, case, parallel, "fp32", str(tmp_path))
    assert_equal(found, alone(case, "fp32"), BOUNDS["fp32"])
    assert all(len(result["breaks"]) <= 1 for result in found)


def test_chosen_at_random_it_is_one() -> None:
    """In the form of Megatron-LM: (U / K) sum_i P_i f_i."""
    units, chosen, tokens = 10, 3, 200_000
    scores = torch.randn(1, tokens, units, generator=torch.Generator().manual_seed(0))
    f = choose_units(scores, chosen).double().mean((0, 1))
    assert units / chosen * (scores.double().softmax(-1).mean((0, 1)) * f).sum().item() == pytest.approx(1, abs=1e-3)


def test_no_such_term_without_weight(pool: Pool, alone: Alone) -> None:
    assert alone(replace(LEARNED, mixer={"balance_weight": 0.0}))["auxiliary"] == []
