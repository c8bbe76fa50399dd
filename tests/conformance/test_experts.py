"""Mixtures of experts in whole models: their losses by plain autograd, and experts spread over processes.

Every comparison is with one process that has all experts: losses, every gradient, gradient norms, and the parameters
after two updates, the numbers that balance without a gradient among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.feedforward.moe import MoE
from model.observer import Observer
from model.routing import Routing
from parallel.config import ParallelConfig
from tests.conformance.layouts import (
    BOUNDS,
    CLIP,
    EXPERT_LAYOUTS,
    EXPERTS,
    KNOWN,
    ROWS,
    Case,
    assert_equal,
    build,
    merged,
    share_of,
    two_steps,
    updater_of,
    whole,
)
from tests.conformance.models import random_batch
from tests.conformance.test_layout_checkpoints import assert_bit_equal, assert_continued, written_and_read
from tests.conformance.test_layouts import compare
from tests.pool import Pool

Alone = Callable[..., dict[str, Any]]
MATRIX = pytest.mark.matrix
FIRST_HAS_EXPERTS = {"feedforward_pattern": ["moe", "gelu"]}
"""So every stage of a pipeline of two has a layer with experts, and one without."""
QUICK = ("ep2", "ep2 x tp2", "ep2 x pp2", "ep2 x cp2 x fsdp2")
OTHER: dict[str, dict[str, Any]] = {
    "one of four, sigmoid, a shared one, selection": MoE.examples[1]["moe"] | {"shared": "sglu", "expert": "gelu"},
    "three of eight, selection": MoE.examples[2]["moe"],
    "some without tokens": {"num_experts": 8, "top_k": 1, "gate_norm": "none", "router_init_std": 3.0},
    "over the global batch": {"balance_over": "global_batch"},
}


def spread_case(name: str, kinds: str = "softmax+lightning", precision: str = "fp64", **experts: Any) -> Case:
    case = Case.of(kinds, name, precision)
    return replace(case, model=FIRST_HAS_EXPERTS, experts=case.experts | experts)


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=MATRIX) for x in EXPERT_LAYOUTS])
def test_experts_are_spread(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, spread_case(name), name, "fp64")


@MATRIX
@pytest.mark.parametrize("name", QUICK)
def test_experts_are_spread_in_fp32(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, spread_case(name, precision="fp32"), name, "fp32")


@MATRIX
@pytest.mark.parametrize("kinds", ["moh+sigmoid", "minimax+norm_linear"])
def test_experts_beside_other_mixers(pool: Pool, alone: Alone, kinds: str) -> None:
    compare(pool, alone, spread_case("ep4 on cp2 x fsdp2 x tp2", kinds), "ep4 on cp2 x fsdp2 x tp2", "fp64")


@MATRIX
@pytest.mark.parametrize("name", ["ep2 x tp2", "ep2 x cp2 x fsdp2"])
def test_experts_beside_those_of_attention(pool: Pool, alone: Alone, name: str) -> None:
    """Blocks as in BAM: both on the same normed input."""
    case = replace(spread_case(name, "bam", top_k=1, gate_norm="none"), num_layers=2)
    compare(pool, alone, replace(case, model=FIRST_HAS_EXPERTS | {"residual": "parallel"}), name, "fp64")


@pytest.mark.parametrize("name", ["ep2 x tp2", pytest.param("ep2 x cp2 x fsdp2", marks=MATRIX)])
@pytest.mark.parametrize("settings", OTHER)
def test_other_experts_are_spread(pool: Pool, alone: Alone, settings: str, name: str) -> None:
    case = replace(spread_case(name, "softmax", **OTHER[settings]), num_layers=2)
    compare(pool, alone, case, name, "fp64")


@pytest.mark.parametrize("name", ["ep2 x tp2", pytest.param("ep2 x hsdp2x2", marks=MATRIX)])
def test_each_expert_is_a_matrix_to_muon(pool: Pool, alone: Alone, name: str) -> None:
    case = replace(spread_case(name, "softmax"), num_layers=2, optimizer="muon")
    compare(pool, alone, replace(case, model=FIRST_HAS_EXPERTS | {"tie_embeddings": False}), name, "fp64")


@pytest.mark.parametrize("name", ["ep2 x fsdp2", pytest.param("ep4 on cp2 x fsdp2 x tp2", marks=MATRIX)])
def test_each_expert_is_a_matrix_to_sigma_reparam(pool: Pool, alone: Alone, name: str) -> None:
    case = replace(spread_case(name, "softmax"), num_layers=2, reparam={"kind": "sigma"})
    compare(pool, alone, case, name, "fp64")
    assert "layers.0.feedforward.experts.3.up.spectral_gain" in alone(case)["beside"]


def test_some_experts_are_frozen(pool: Pool, alone: Alone) -> None:
    frozen = ("layers.0.feedforward.experts.[03].*", "layers.0.feedforward.router.*")
    case = replace(spread_case("ep2", "softmax", bias_rate=0.01), num_layers=2)
    compare(pool, alone, case, "ep2", "fp64", frozen=frozen)
    found = alone(case, frozen=frozen)
    assert "layers.0.feedforward.experts.0.up.weight" not in found["gradients"]
    assert not found["parameters"]["layers.0.feedforward.router.selection_bias"].any()


@pytest.mark.parametrize("name", ["ep2 x tp2", pytest.param("ep2 x pp2", marks=MATRIX)])
def test_bf16_stays_near(pool: Pool, alone: Alone, name: str) -> None:
    world_size, parallel = KNOWN[name]
    # Where scores are nearly alike, rounding chooses another expert: few do, and the gates say that it matters little.
    case = spread_case(name, bias_rate=0.01)
    results = pool.run(two_steps, world_size, case, parallel, "bf16")
    for found in results:
        assert found["losses"] == pytest.approx(alone(case)["losses"], rel=0.02)
        assert found["auxiliary"] == pytest.approx(alone(case)["auxiliary"], rel=0.05)
    assert {value.dtype for value in merged(results, "parameters").values()} == {torch.float32}


CROSSINGS = [("ep2 x tp2", "fsdp2"), ("alone", "ep2 x pp2"), ("ep4", "ep2 x cp2 x fsdp2"), ("tp4 x fsdp2", "ep4")]


@pytest.mark.parametrize(("by", "then"), [*CROSSINGS[:2], *(pytest.param(*x, marks=MATRIX) for x in CROSSINGS[2:])])
def test_checkpoints_cross(pool: Pool, tmp_path: Path, by: str, then: str) -> None:
    case = spread_case("ep2 x pp2", "softmax", bias_rate=0.01)
    wanted = written_and_read(pool, case, tmp_path / "alone", "alone", "alone", "fp64")
    assert "layers.2.feedforward.experts.3.down.weight.exp_avg" in wanted[0]["moments"]
    found = written_and_read(pool, case, tmp_path / "crossed", by, then, "fp64")
    assert_continued(found, wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(
    ("name", "precision"), [("ep2 x tp2", "fp32"), pytest.param("ep2 x cp2 x fsdp2", "bf16", marks=MATRIX)]
)
def test_a_run_continues_bit_for_bit(pool: Pool, tmp_path: Path, name: str, precision: str) -> None:
    assert_bit_equal(pool, spread_case(name, "softmax", bias_rate=0.01), tmp_path, name, precision)


class _Scores(Observer):
    def __init__(self) -> None:
        self.found: list[Routing] = []

    def routing(self, layer: int, found: Routing) -> Tensor:
        self.found.append(found)
        return found.scores_BNU


def eager_step(case: Case, step: int = 1) -> dict[str, Any]:
    """coefficient E / (K N) sum_i P_i c_i and coefficient mean logsumexp^2 of each layer, by their equations."""
    model = build(case, ParallelConfig(), "fp64").stages[0]
    batch = random_batch(ROWS, 24, seed=step, isolated=case.isolated)
    model.observer = looking = _Scores()
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    loss = F.cross_entropy(logits[batch.counted], batch.targets[batch.counted])
    balance, z_loss = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for found in looking.found:
        sigmoid = case.experts.get("score") == "sigmoid"
        p = found.scores_BNU.sigmoid() if sigmoid else found.scores_BNU.exp()
        p, chosen = p / p.sum(-1, keepdim=True), found.chosen_BNU.double()
        if case.experts.get("balance_over") == "global_batch":
            p, chosen = p.flatten(0, 1)[None], chosen.flatten(0, 1)[None]
        rows, tokens, experts = p.shape
        for row in range(rows):
            sums, counts = p[row].sum(0), chosen[row].sum(0)
            factor = experts / (case.experts["top_k"] * tokens**2)
            balance = balance + case.experts["balance_weight"] * factor * (sums * counts).sum() / rows
        z_loss = z_loss + case.experts["z_loss_weight"] * found.scores_BNU.exp().sum(-1).log().square().mean()
    (loss + balance + z_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "auxiliary": [balance.item(), z_loss.item()], "gradients": gradients}


@pytest.mark.parametrize("over", ["sequence", "global_batch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_training_is_on_the_equations(pool: Pool, alone: Alone, score: str, over: str) -> None:
    case = spread_case("ep2", "softmax", score=score, balance_over=over, router_init_std=0.5)
    (wanted,), found = pool.run(eager_step, 1, case), alone(case)
    assert len(wanted["auxiliary"]) == 2 and wanted["auxiliary"][0] > EXPERTS["balance_weight"]
    assert found["losses"][0] == pytest.approx(wanted["loss"], rel=1e-12)
    assert found["auxiliary"][:2] == pytest.approx(wanted["auxiliary"], rel=1e-12)
    norm = sum(gradient.square().sum().item() for gradient in wanted["gradients"].values()) ** 0.5
    assert found["norms"][0] == pytest.approx(norm, rel=1e-11)
    for parameter, gradient in wanted["gradients"].items():
        torch.testing.assert_close(found["gradients"][parameter], gradient * (CLIP / norm), rtol=1e-8, atol=1e-12)


def moved_numbers(case: Case, parallel: ParallelConfig, lr: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The numbers that choose, after each of two updates; and what a counting look at each batch has found."""
    model = build(case, parallel, "fp64")
    updater = updater_of(model, case)
    numbers, counts = [], []
    for step in (1, 2):
        looking = _Scores()
        model.observe(share_of(model, step), looking)
        counts.append(looking.found[0].chosen_BNU.flatten(0, 1).sum(0))
        updater.update(share_of(model, step), step, lr=lr)
        numbers.append(whole(model, dict(model.parameters))["layers.0.feedforward.router.selection_bias"])
    return numbers, counts


def test_numbers_move_against_the_load_once_an_update(pool: Pool) -> None:
    """Though there are several micro-batches, and blocks run again in backward."""
    case = replace(spread_case("ep2", "softmax", bias_rate=0.01), num_layers=2)
    parallel = ParallelConfig(microbatches=4, recompute="full")
    ((numbers, counts),) = pool.run(moved_numbers, 1, case, parallel, 0.0)
    wanted = torch.zeros(4, dtype=torch.float64)
    for number, count in zip(numbers, counts, strict=True):
        wanted = wanted + 0.01 * (count.double().mean() - count).sign()
        assert torch.equal(number, wanted)
    assert not torch.equal(counts[0], counts[1]) and numbers[0].abs().sum() > 0


@MATRIX
def test_compiled_blocks_with_experts(pool: Pool, alone: Alone) -> None:
    """Their rows go by values, so the compiler's graph breaks there; what it computes is the same."""
    case = replace(spread_case("ep2", "softmax", precision="fp32"), num_layers=1)
    case = replace(case, model={"feedforward_pattern": ["moe"]})
    found = pool.run(two_steps, 2, case, KNOWN["ep2"][1], "fp32", compiled=True)
    assert_equal(found, alone(case, "fp32"), BOUNDS["fp32"])
