"""Weights per modality in every layout: every comparison is with one process, in which a modality's weights are only
what the mixers' and feed-forwards' own are.

Rows are of three modalities: the first half of them of one alone, so ranks, micro-batches and pieces of the sequence
have none of the second; and nobody has any of the third, whose gradients are zeros and not missing.
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

from model.feedforward.moe import ExpertRouter
from parallel.config import ParallelConfig
from tests.conformance.layouts import (
    BOUNDS,
    EXPERT_LAYOUTS,
    KNOWN,
    LAYOUTS,
    LR,
    ROWS,
    Case,
    build,
    merged,
    share_of,
    two_steps,
    updater_of,
    whole,
)
from tests.conformance.models import VOCAB
from tests.conformance.test_layout_checkpoints import assert_bit_equal, assert_continued, written_and_read
from tests.conformance.test_layouts import FOURS, compare
from tests.pool import Pool

Alone = Callable[..., dict[str, Any]]
MATRIX = pytest.mark.matrix
THREE = {"modalities": 3}
SANDWICH = {"norm_position": "sandwich_out"}
QUICK = ("fsdp2", "tp2", "pp2 zbv", "cp2 x fsdp2")
QUICK_EXPERTS = ("ep2", "ep2 x cp2 x fsdp2")
MORE = ("tp2, sequence whole", "pp2, recompute")
FP32 = ("tp2 x cp2", "pp2 x fsdp2", "tp2 x fsdp2")
RANGES = [[0, 20, 50, 61], [20, 45], [45, 50]]
PARTS: dict[str, list[str]] = {
    "qkv": ["qkv"],
    "o": ["o"],
    "feedforward": ["feedforward"],
    "norms": ["norms"],
    "none": [],
}


def untied(name: str, kinds: str = "softmax+lightning", precision: str = "fp64", **untie: Any) -> Case:
    return replace(Case.of(kinds, name, precision), untie=THREE | untie)


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=MATRIX) for x in (*LAYOUTS, *MORE)])
def test_towers_of_two_mixers(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, untied(name), name, "fp64")


@MATRIX
@pytest.mark.parametrize("name", ["tp2 x pp2", "tp2 x cp2", "tp4"])
@pytest.mark.parametrize("kinds", FOURS)
def test_towers_of_all_mixers(pool: Pool, alone: Alone, kinds: str, name: str) -> None:
    compare(pool, alone, untied(name, kinds), name, "fp64")


@pytest.mark.parametrize("name", ["tp2", "tp2, sequence whole"])
def test_biases_behind_a_norm_over_all_heads(pool: Pool, alone: Alone, name: str) -> None:
    """They are added when the ranks' outputs have been, each token its own."""
    case = replace(untied(name, "norm_linear"), num_layers=2, experts={})
    compare(pool, alone, case, name, "fp64")
    assert alone(case)["gradients"]["layers.0.mixer.o.towers.1.bias"].any()


@pytest.mark.parametrize("name", [x if x in QUICK_EXPERTS else pytest.param(x, marks=MATRIX) for x in EXPERT_LAYOUTS])
def test_towers_with_experts(pool: Pool, alone: Alone, name: str) -> None:
    """One modality has a mixture of experts in every layer, the others only in the last of each stage."""
    case = untied(name, "softmax", feedforwards={"1": "moe"})
    pattern = {"feedforward_pattern": ["moe", "gelu"]}
    compare(pool, alone, replace(case, model=pattern, experts=case.experts | {"bias_rate": 0.01}), name, "fp64")


@pytest.mark.parametrize("name", ["ep2 x tp2", pytest.param("ep2 x cp2 x fsdp2", marks=MATRIX)])
def test_experts_of_towers_balanced_over_the_global_batch(pool: Pool, alone: Alone, name: str) -> None:
    case = replace(untied(name, "softmax"), num_layers=2)
    compare(pool, alone, replace(case, experts=case.experts | {"balance_over": "global_batch"}), name, "fp64")


def trained_and_computed(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an update comes to on one process, and the same by the equations: of each modality, P_i and f_i are means
    over its tokens in a sequence, or in the batch, and a loss is that of the predictions of which it is the target."""
    model = build(case, ParallelConfig(), "fp64")
    plain, batch, untie = model.stages[0], share_of(model, 1), model.architecture.untie
    assert untie is not None
    if untie.by_ids:
        modalities, of_targets = untie.of_tokens(batch.tokens), untie.of_tokens(batch.targets)
        batch = replace(batch, modalities=modalities, target_modalities=of_targets)
    assert batch.modalities is not None and batch.target_modalities is not None
    routed: list[tuple[str, int, Tensor, Tensor]] = []
    hooks = []
    for name, module in plain.named_modules():
        if isinstance(module, ExpertRouter):
            said = name, int(name.split(".towers.")[1].split(".")[0])
            hooks.append(module.register_forward_hook(lambda m, args, out, said=said: routed.append((*said, *out))))
    logits = plain(batch.tokens, documents=batch.documents, positions=batch.positions, modalities=batch.modalities)
    nats = F.cross_entropy(logits[batch.counted], batch.targets[batch.counted], reduction="none")
    balance = z_loss = torch.zeros((), dtype=torch.float64)
    settings, moves = case.experts, {}
    for name, modality, scores, ranked in routed:
        chosen = F.one_hot(ranked.sort(-1, descending=True).indices[:, : settings["top_k"]], scores.shape[-1]).sum(1)
        rows = (batch.modalities == modality).nonzero()[:, 0]
        together = settings.get("balance_over") == "global_batch"
        parts = [rows >= 0] if together else [rows == row for row in range(ROWS)]
        for part in parts:
            if part.any():
                p, f = scores[part].softmax(-1).mean(0), chosen[part].double().mean(0)
                factor = settings["balance_weight"] * scores.shape[-1] / settings["top_k"]
                balance = balance + factor * (p * f).sum() / len(parts)
        z_loss = z_loss + settings["z_loss_weight"] * scores.logsumexp(-1).square().sum() / batch.tokens.numel()
        loads = chosen.sum(0).double()
        moves[f"{name}.selection_bias"] = settings["bias_rate"] * (loads.mean() - loads).sign()
    (nats.mean() + balance + z_loss).backward()
    norm = sum(p.grad.square().sum().item() for p in plain.parameters() if p.grad is not None) ** 0.5
    of_each = [nats[batch.target_modalities[batch.counted] == m] for m in range(3)]
    wanted = {"loss": nats.mean().item(), "auxiliary": [balance.item(), z_loss.item()], "norm": norm, "moves": moves}
    wanted["losses"] = [found.mean().item() if len(found) else None for found in of_each]
    wanted["tokens"] = [len(found) for found in of_each]
    for hook in hooks:
        hook.remove()
    plain.zero_grad()
    outcome = updater_of(model, case).update(share_of(model, 1), 1, lr=LR)
    found = {"loss": outcome.loss, "auxiliary": [*outcome.auxiliary.values()], "norm": outcome.grad_norm}
    found["losses"] = [outcome.by_modality[f"modality/{m}/loss"] for m in range(3)]
    found["tokens"] = [outcome.by_modality[f"modality/{m}/tokens"] for m in range(3)]
    found["moves"] = whole(model, {name: p for name, p in model.parameters.items() if name in moves})
    return found, wanted


@pytest.mark.parametrize(
    ("over", "ranges"),
    [("sequence", []), ("global_batch", []), ("sequence", RANGES)],
    ids=["sequence", "global batch", "by ids"],
)
def test_training_is_on_the_equations(pool: Pool, over: str, ranges: list[list[int]]) -> None:
    """Of four routers in two layers; without ranges, there is a modality of which there is nothing."""
    case = replace(untied("fsdp2", "softmax", feedforwards={"1": "moe"}, ranges=ranges), num_layers=2)
    experts = case.experts | {"balance_over": over, "bias_rate": 0.01, "router_init_std": 0.5}
    case = replace(case, model={"feedforward_pattern": ["moe", "gelu"]}, experts=experts)
    ((found, wanted),) = pool.run(trained_and_computed, 1, case)
    if not ranges:
        assert found["losses"].pop() is wanted["losses"].pop() is None
    for what in ("loss", "losses", "tokens", "auxiliary", "norm"):
        assert found[what] == pytest.approx(wanted[what], rel=1e-11), what
    assert len(wanted["moves"]) == 4 and min(wanted["tokens"][:2]) > 20
    for name, move in wanted["moves"].items():
        assert torch.equal(found["moves"][name], move), name
        assert move.any() or (not ranges and ".towers.2." in name), name


@pytest.mark.parametrize("name", ["tp2", pytest.param("tp2 x cp2 x pp2", marks=MATRIX)])
def test_norms_on_what_is_added(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, replace(untied(name), model=SANDWICH | {"norm": "layernorm"}), name, "fp64")


@MATRIX
@pytest.mark.parametrize("name", ["tp2 x cp2", "pp2 x fsdp2"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_by_itself(pool: Pool, alone: Alone, part: str, name: str) -> None:
    compare(pool, alone, untied(name, parts=PARTS[part]), name, "fp64")


@pytest.mark.parametrize("name", ["tp2 x pp2", pytest.param("cp2 x fsdp2", marks=MATRIX)])
def test_ids_say_the_modality(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, untied(name, ranges=RANGES), name, "fp64")


@MATRIX
@pytest.mark.parametrize("name", FP32)
def test_towers_in_fp32(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, untied(name, precision="fp32"), name, "fp32")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optimizer": "muon", "model": {"tie_embeddings": False}}, "tp2 x fsdp2"),
        pytest.param({"reparam": {"kind": "sigma", "qkv_grouping": "qk+v"}}, "tp2 x fsdp2", marks=MATRIX),
    ],
)
def test_each_tower_is_a_matrix(pool: Pool, alone: Alone, settings: dict[str, Any], name: str) -> None:
    case = replace(untied(name, "softmax"), num_layers=2, **settings)
    compare(pool, alone, case, name, "fp64")
    if "reparam" in settings:
        assert "layers.0.mixer.qk.towers.1.spectral_gain" in alone(case)["beside"]


def test_an_absent_modality_has_gradients_of_zero(pool: Pool, alone: Alone) -> None:
    """And no part in the norm; each rank has them, with nothing to say."""
    gradients = alone(untied("fsdp2"))["gradients"]
    third = {name: gradient for name, gradient in gradients.items() if ".towers.2." in name}
    assert len(third) == len([name for name in gradients if ".towers.0." in name]) > 30
    assert not any(gradient.any() for gradient in third.values())
    second = [gradient for name, gradient in gradients.items() if name.endswith("mixer.q.towers.1.weight")]
    assert len(second) == 4 and all(gradient.any() for gradient in second)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("tp2 x pp2", marks=MATRIX)])
def test_a_frozen_tower(pool: Pool, alone: Alone, name: str) -> None:
    """Not in the gradients, and not in decay; gradients go on through it."""
    frozen = ("*.towers.0.*", "embedding.*", "final_norm.*")
    case = untied(name, "softmax")
    compare(pool, alone, case, name, "fp64", frozen=frozen)
    found = alone(case, frozen=frozen)
    assert not [n for n in found["gradients"] if ".towers.0." in n]
    assert found["gradients"]["layers.0.mixer.q.towers.1.weight"].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["tp2 x pp2", pytest.param("tp2 x fsdp2", marks=MATRIX)])
def test_rows_of_frozen_ids(pool: Pool, alone: Alone, name: str, tied: bool) -> None:
    """Whoever holds which rows: no gradient, no decay, no part in the norm; the others are trained."""
    case = replace(untied(name, "softmax"), num_layers=2, model={"tie_embeddings": tied}, kept_ids=((0, 7), (20, 50)))
    compare(pool, alone, case, name, "fp64")
    free = alone(replace(case, kept_ids=()))
    whole = ("embedding.*",) if tied else ("embedding.*", "head.*")
    found, begun = alone(case), alone(case, frozen=whole)["parameters"]
    kept = torch.tensor([*range(7), *range(20, 50)])
    other = torch.tensor([*range(7, 20), *range(50, VOCAB)])
    for matrix in ["embedding.weight"] if tied else ["embedding.weight", "head.weight"]:
        assert torch.equal(found["parameters"][matrix][kept], begun[matrix][kept])
        assert (found["parameters"][matrix][other] != begun[matrix][other]).all()
        assert not found["gradients"][matrix][kept].any() and found["gradients"][matrix][other].any()
    assert found["norms"][0] < free["norms"][0]


@pytest.mark.parametrize("name", ["tp2 x fsdp2", pytest.param("pp2", marks=MATRIX)])
def test_bf16_stays_near(pool: Pool, alone: Alone, name: str) -> None:
    world_size, parallel = KNOWN[name]
    case = untied(name)
    results = pool.run(two_steps, world_size, case, parallel, "bf16")
    for found in results:
        assert found["losses"] == pytest.approx(alone(case)["losses"], rel=0.02)
        assert found["by_modality"] == pytest.approx(alone(case)["by_modality"], rel=0.03)
    assert {value.dtype for value in merged(results, "parameters").values()} == {torch.float32}


@MATRIX
def test_compiled_blocks_with_towers(pool: Pool, alone: Alone) -> None:
    """The compiler's graph breaks where rows go to their towers; what is computed is the same."""
    case = replace(untied("fsdp2", "softmax", "fp32"), num_layers=1, model={"feedforward_pattern": ["gelu"]})
    case = replace(case, experts={})
    compare(pool, alone, case, "fsdp2", "fp32", compiled=True)


@pytest.mark.parametrize(("by", "then"), [("tp2 x pp2", "fsdp2"), pytest.param("ep2", "ep2 on cp2", marks=MATRIX)])
def test_checkpoints_cross(pool: Pool, tmp_path: Path, by: str, then: str) -> None:
    case = untied("pp2", "softmax", feedforwards={"1": "moe"})
    wanted = written_and_read(pool, case, tmp_path / "alone", "alone", "alone", "fp64")
    found = written_and_read(pool, case, tmp_path / "crossed", by, then, "fp64")
    assert_continued(found, wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(("name", "precision"), [("tp2", "fp32"), pytest.param("ep2 x tp2", "bf16", marks=MATRIX)])
def test_a_run_continues_bit_for_bit(pool: Pool, tmp_path: Path, name: str, precision: str) -> None:
    assert_bit_equal(pool, untied(name, "softmax"), tmp_path, name, precision)
