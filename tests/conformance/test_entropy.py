"""The penalty on attention entropies in whole models: equal to the paper's algorithm by plain autograd, and the same in
every layout: losses, penalties, norms, every gradient, and parameters and thresholds after two updates.

Margins are such that some heads of some sequences lie inside and others outside of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.context import Context
from model.entropy import EntropyPenalty
from model.mixers.softmax import Softmax
from model.objective import NextToken
from parallel.config import ParallelConfig
from parallel.entropy import threshold_name
from tests.conformance.layouts import (
    BOUNDS,
    CLIP,
    KNOWN,
    LENGTH,
    ROWS,
    Case,
    assert_equal,
    build,
    depth,
    share_of,
    two_steps,
    updater_of,
)
from tests.conformance.models import random_batch
from tests.conformance.test_layout_checkpoints import assert_bit_equal, assert_continued, written_and_read
from tests.model.test_entropy import Largest
from tests.pool import Pool

Alone = Callable[..., dict[str, Any]]
MATRIX = pytest.mark.matrix
MEAN = EntropyPenalty(0.5, margin=0.07, threshold=0.3, queries_at_once=7)
PENALTIES = {
    "mean": MEAN,
    "mean, seen": replace(MEAN, threshold=0.7, margin=0.17, normaliser="seen"),
    "sum": replace(MEAN, weight=0.003, threshold=0.5, margin=0.2, reduction="per_query_sum"),
    "sum, seen": replace(MEAN, weight=0.003, threshold=0.75, margin=0.2, reduction="per_query_sum", normaliser="seen"),
}
CASE = Case("softmax", entropy=MEAN, model={"init_std": 0.3})
HYBRID = Case("softmax+lightning+lightning+softmax", entropy=MEAN, model={"init_std": 0.3})
"""Of four layers, the first and the last have attention weights."""


def eager_step(case: Case) -> dict[str, Any]:
    """Algorithm 1 by plain autograd: cross-entropy and full maps of the whole batch, queries and keys from the mixers'
    inputs; the penalties in loops over heads and sequences."""
    model = build(replace(case, entropy=None), ParallelConfig(), "fp64").stages[0]
    penalty, batch = case.entropy, random_batch(ROWS, LENGTH, seed=1, isolated=case.isolated)
    assert penalty is not None
    maps: dict[int, Tensor] = {}

    def note(mixer: Any, args: tuple[Any, ...]) -> None:
        maps[mixer.site.layer] = full_map(mixer, args[0], args[1])

    blocks = [block for block in model.layers.values() if isinstance(block.mixer, Softmax)]
    for block in blocks:
        block.mixer.register_forward_pre_hook(note)
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    loss = F.cross_entropy(logits[batch.counted], batch.targets[batch.counted])
    thetas, layers, insides = {}, [], set()
    for block in blocks:
        weights_BHNN = maps[block.layer]
        theta = torch.full((weights_BHNN.shape[1],), penalty.threshold, dtype=torch.float64, requires_grad=True)
        heads = []
        for h in range(len(theta)):
            found = [of_one_sequence(weights_BHNN[b, h], theta[h], penalty) for b in range(ROWS)]
            insides |= {bool(value == 0) for values in found for value in values}
            total = torch.cat(found).sum()
            heads.append(total / ROWS if penalty.reduction == "mean" else total)
        layers.append(torch.stack(heads).mean())
        thetas[threshold_name(block.layer)] = theta
    assert insides == {True, False}, "all are inside of the margin, or all are outside"
    auxiliary = penalty.weight * torch.stack(layers).mean()
    (loss + auxiliary).backward()
    gradients = {name: p.grad for name, p in [*model.named_parameters(), *thetas.items()]}
    return {"loss": loss.item(), "auxiliary": auxiliary.item(), "gradients": gradients}


def full_map(mixer: Softmax, x: Tensor, ctx: Context) -> Tensor:
    q_BNHd, (k_BNGd, _) = mixer.turned(mixer._queries(x), ctx), mixer._keys_values(x, ctx)
    k_BNHd = k_BNGd.repeat_interleave(q_BNHd.shape[2] // k_BNGd.shape[2], dim=2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q_BNHd, k_BNHd) / mixer.head_dim**0.5
    place = torch.arange(x.shape[1])
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (mixer.config.window or x.shape[1]))
    if ctx.documents is not None:
        seen = seen & (ctx.documents[:, None, :, None] == ctx.documents[:, None, None, :])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def of_one_sequence(weights_NN: Tensor, theta: Tensor, penalty: EntropyPenalty) -> Tensor:
    """The penalty of a head in a sequence, or those of its queries: `[1]` or `[N]`."""
    levels, most = [], math.log(len(weights_NN)) if penalty.normaliser == "length" else 1.0
    for row in weights_NN:
        seen = row[row > 0]
        entropy = -(seen * seen.log()).sum()
        if penalty.normaliser == "length":
            levels.append(entropy)
        elif len(seen) > 1:
            levels.append(entropy / math.log(len(seen)))
    values = torch.stack(levels)
    apart = (values.mean()[None] if penalty.reduction == "mean" else values) - theta * most
    return torch.where(apart.abs() > penalty.margin * most, apart.square(), 0.0)


EAGER = {name: replace(CASE, entropy=penalty) for name, penalty in PENALTIES.items()} | {
    "grouped queries, window, QK-norm": replace(CASE, example=1, entropy=replace(MEAN, threshold=0.4, margin=0.09)),
    "rows of one document": replace(CASE, isolated=False, entropy=replace(MEAN, threshold=0.5, margin=0.13)),
    "hybrid": HYBRID,
}


@pytest.mark.parametrize("name", EAGER)
def test_training_is_on_the_algorithm(pool: Pool, alone: Alone, name: str) -> None:
    """Value and every gradient, of queries, keys, thresholds and all below them, before and after clipping."""
    case = EAGER[name]
    (wanted,) = pool.run(eager_step, 1, case)
    found = alone(case)
    norm = sum(gradient.square().sum().item() for gradient in wanted["gradients"].values()) ** 0.5
    assert found["losses"][0] == pytest.approx(wanted["loss"], rel=1e-12)
    assert found["auxiliary"][0] == pytest.approx(wanted["auxiliary"], rel=1e-11)
    assert found["norms"][0] == pytest.approx(norm, rel=1e-11)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for key, gradient in wanted["gradients"].items():
        torch.testing.assert_close(found["gradients"][key], gradient * (CLIP / norm), rtol=1e-8, atol=1e-11)
        if "threshold" in key:
            assert gradient.any(), "every threshold has something to learn here"


@pytest.fixture(scope="module")
def alone(pool: Pool) -> Alone:
    """What one process comes to, computed once for each case."""
    known: dict[str, dict[str, Any]] = {}

    def run(case: Case, precision: str = "fp64", **options: Any) -> dict[str, Any]:
        key = f"{case} {precision} {options}"
        if key not in known:
            known[key] = pool.run(two_steps, 1, case, ParallelConfig(), precision, **options)[0]
            assert all(norm > CLIP for norm in known[key]["norms"]), "the clipping was idle"
            assert all(value > 1e-3 for value in known[key]["auxiliary"]), "nothing was penalised"
        return known[key]

    return run


def compare(pool: Pool, alone: Alone, case: Case, name: str, precision: str = "fp64", **options: Any) -> None:
    world_size, parallel = KNOWN[name]
    case = replace(case, num_layers=depth(name, precision))
    found = pool.run(two_steps, world_size, case, parallel, precision, **options)
    assert_equal(found, alone(case, precision, **options), BOUNDS[precision])


FIRST = ("tp2", "pp2 zbv", "cp2", "recompute")
CELLS = [
    *("fsdp2", "fsdp4", "hsdp2x2", "tp2", "tp4", "pp2", "pp4 interleaved", "pp2 zbv", "cp2", "cp4"),
    *("tp2 x cp2", "tp2 x pp2 x fsdp2", "cp2 x pp2 x fsdp2", "accumulate 4", "recompute"),
    *("tp2, selective recomputation", "tp2, sequence whole", "pp2, recompute", "cp2, recompute"),
    *("cp4, selective recomputation", "hsdp2x2, recompute", "tp2 x pp2 zbv x fsdp2", "tp2 x replicate2"),
]


@pytest.mark.parametrize("name", [name if name in FIRST else pytest.param(name, marks=MATRIX) for name in CELLS])
def test_a_layout_equals_one_process(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, CASE, name)


@MATRIX
@pytest.mark.parametrize("name", ["tp2 x cp2", "tp2 x pp2 x fsdp2", "cp2, recompute"])
@pytest.mark.parametrize("penalty", [name for name in PENALTIES if name != "mean"])
def test_other_penalties_in_a_layout(pool: Pool, alone: Alone, penalty: str, name: str) -> None:
    compare(pool, alone, replace(CASE, entropy=PENALTIES[penalty]), name)


@pytest.mark.parametrize("name", ["tp2 x pp2 x fsdp2", *(pytest.param(n, marks=MATRIX) for n in ("pp2 zbv", "cp4"))])
def test_layers_without_attention_weights_do_not_count(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, HYBRID, name)


@MATRIX
@pytest.mark.parametrize("name", ["tp2 x pp2", "cp2"])
def test_heads_of_experts_have_thresholds_of_their_own(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, replace(CASE, kind="bam"), name)


@MATRIX
@pytest.mark.parametrize("name", ["fsdp2", "tp2", "pp2 zbv", "tp2 x cp2"])
def test_a_layout_equals_one_process_in_fp32(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, replace(CASE, model={}), name, "fp32")


@pytest.mark.parametrize("name", ["pp2", pytest.param("pp2 zbv x fsdp2", marks=MATRIX)])
def test_thresholds_of_frozen_layers_learn(pool: Pool, alone: Alone, name: str) -> None:
    """No gradient goes through the first layers, but their penalties count; a threshold may be frozen by its name."""
    frozen = ("embedding.*", "layers.[01].*norm*", "layers.[01].mixer.[qkvo].*", "layers.[01].feedforward.*")
    frozen += ("layers.3.mixer.entropy_threshold",)
    found = alone(CASE, frozen=frozen)
    assert found["gradients"]["layers.0.mixer.entropy_threshold"].any()
    assert (found["parameters"]["layers.3.mixer.entropy_threshold"] == MEAN.threshold).all()
    compare(pool, alone, CASE, name, frozen=frozen)


def test_bf16_stays_near(pool: Pool, alone: Alone) -> None:
    wanted = alone(replace(CASE, model={}))
    for found in pool.run(two_steps, 2, replace(CASE, model={}), ParallelConfig(), "bf16"):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=0.02)
        assert found["auxiliary"] == pytest.approx(wanted["auxiliary"], rel=0.05)
        assert {p.dtype for p in found["beside"].values()} == {torch.float32}


def evaluated_and_trained(case: Case) -> dict[str, Any]:
    """A step and a validation, with and without the penalty; in validation, entropies cannot be had."""
    seen: dict[str, Any] = {"evaluated": [], "losses": [], "auxiliary": [], "total": [], "observers": []}
    for model in (build(c, ParallelConfig(), "fp64") for c in (case, replace(case, entropy=None))):
        updater = updater_of(model, case)
        outcome = updater.update(share_of(model, 1), 1, lr=0.0)
        with patch("parallel.entropy.query_entropies", side_effect=AssertionError("entropies in validation")):
            seen["evaluated"].append(model.evaluate(share_of(model, 100), updater.objective))
        seen["losses"].append(outcome.loss)
        seen["auxiliary"].append(outcome.auxiliary)
        seen["total"].append(outcome.total_loss)
        seen["observers"] += [stage.observer for stage in model.stages]
    return seen


def test_the_cross_entropy_is_reported_alone_and_validation_knows_no_other(pool: Pool) -> None:
    (seen,) = pool.run(evaluated_and_trained, 1, CASE)
    assert seen["evaluated"][0] == seen["evaluated"][1]
    assert seen["losses"][0] == seen["losses"][1]
    assert seen["observers"] == [None, None]
    assert list(seen["auxiliary"][0]) == ["entropy_loss"] and seen["auxiliary"][1] == {}
    assert seen["total"] == [seen["losses"][0] + seen["auxiliary"][0]["entropy_loss"], seen["losses"][1]]


def largest_made(case: Case, recompute: Literal["none", "full"], n: int) -> int:
    """Elements of the largest tensor that a step on one row of so many tokens makes."""
    model = build(case, ParallelConfig(recompute=recompute), "fp32")
    batch = random_batch(1, n, isolated=False)
    with Largest() as largest:
        model.train(batch, NextToken(), 1.0)
    return largest.elements


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_tensor_is_a_map_of_all_heads(pool: Pool, recompute: str) -> None:
    """Of four heads and 512 tokens it would have 2^20 elements; the logits have 2^15."""
    case = replace(CASE, num_layers=2, entropy=replace(MEAN, queries_at_once=16))
    (elements,) = pool.run(largest_made, 1, case, recompute, 512)
    assert elements == 4 * 16 * 512


def thresholds_after(case: Case, lr: float) -> tuple[list[Tensor], list[dict[str, Any]]]:
    model = build(case, ParallelConfig(), "fp64")
    updater = updater_of(model, case)
    updater.update(share_of(model, 1), 1, lr=lr)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in updater.optimizer.param_groups]
    return [theta.detach() for theta in model.beside.values()], groups


def test_thresholds_have_their_own_learning_rate_and_no_decay(pool: Pool) -> None:
    """A step of Adam is as long as its learning rate, three times the others' here."""
    ((thetas, groups),) = pool.run(thresholds_after, 1, CASE, 0.01)
    for theta in thetas:
        torch.testing.assert_close((theta - MEAN.threshold).abs(), torch.full_like(theta, 0.03), rtol=1e-3, atol=0)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.1), (0.01, 0.0), (0.03, 0.0)]


# Checkpoints.


@pytest.mark.parametrize("name", ["tp2 x pp2", pytest.param("cp2 x fsdp2", marks=MATRIX)])
def test_it_continues_bit_for_bit(pool: Pool, tmp_path: Path, name: str) -> None:
    """Thresholds and their moments, too."""
    assert_bit_equal(pool, replace(CASE, num_layers=depth(name, "fp64")), tmp_path, name, "fp32")


@pytest.mark.parametrize(
    ("by", "then"),
    [("fsdp2", "tp2 x pp2"), pytest.param("tp2 x cp2", "fsdp2", marks=MATRIX)],
)
def test_it_continues_in_another_layout(pool: Pool, tmp_path: Path, by: str, then: str) -> None:
    wanted = written_and_read(pool, CASE, tmp_path / "alone", "alone", "alone", "fp64")
    assert "layers.0.mixer.entropy_threshold.exp_avg" in wanted[0]["moments"]
    assert_continued(written_and_read(pool, CASE, tmp_path / "moved", by, then, "fp64"), wanted, BOUNDS["fp64"])
