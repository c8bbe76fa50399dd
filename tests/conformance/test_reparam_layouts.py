"""Reparametrised matrices are the same in every layout: one logical matrix has one norm, one gain, one gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.layouts import BOUNDS, LAYOUTS, Case, Optimizer
from tests.conformance.test_layout_checkpoints import assert_bit_equal, assert_continued, written_and_read
from tests.conformance.test_layouts import COVERING, KINDS, Alone, compare
from tests.pool import Pool

MATRIX = pytest.mark.matrix
SIGMA = {"kind": "sigma"}
FIRST = {
    "softmax": ("tp4", "cp2 x fsdp2", "tp2 x pp2 x fsdp2"),
    "lightning": ("tp2 x fsdp2", "pp2 zbv"),
    "minimax": ("tp2 x pp2",),
}
CELLS = [
    pytest.param(kind, name, marks=[] if name in FIRST.get(kind, ()) else MATRIX)
    for kind in KINDS
    for name in (LAYOUTS if kind == "lightning" else dict.fromkeys((*FIRST.get(kind, ()), "tp2 x pp2", "tp2 x cp2")))
]
"""It is done to parameters, and no mixer knows of it: one goes through all layouts, the others through a few."""


def reparametrised(kind: str, name: str, precision: str, optimizer: Optimizer = "adamw", **settings: Any) -> Case:
    return replace(Case.of(kind, name, precision), reparam=SIGMA | settings, optimizer=optimizer)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_a_layout_equals_one_process(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    """Losses, norms, gradients of W and of gains, parameters, gains, norms and vectors after two updates."""
    compare(pool, alone, reparametrised(kind, name, "fp64"), name, "fp64")


@MATRIX
@pytest.mark.parametrize("name", COVERING)
def test_a_layout_equals_one_process_in_fp32(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, reparametrised("softmax", name, "fp32"), name, "fp32")


@MATRIX
@pytest.mark.parametrize(
    "name", ["accumulate 4", "recompute", "tp2, sequence whole", "tp2 x hsdp2x2", "tp2 x pp2 interleaved"]
)
def test_a_product_equals_one_process(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, reparametrised("softmax", name, "fp64"), name, "fp64")


OTHERS: dict[str, dict[str, Any]] = {
    "q and k together": {"qkv_grouping": "qk+v"},
    "q, k and v one, gains of 1": {"qkv_grouping": "fused", "gain_init": "one"},
    "the head, too": {"targets": ["layers.*", "head.weight"]},
    "one vector, no decay": {"vectors": 1, "decay": False},
    "sigma held constant": {"through_sigma": False},
}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        pytest.param(what, name, marks=[] if (what, name) == (*list(OTHERS)[1:2], "tp2 x fsdp2") else MATRIX)
        for what in OTHERS
        for name in ("tp2 x fsdp2", "tp2 x pp2")
    ],
)
def test_other_settings(pool: Pool, alone: Alone, what: str, name: str) -> None:
    case = replace(reparametrised("softmax", name, "fp64", **OTHERS[what]), model={"tie_embeddings": False})
    compare(pool, alone, case, name, "fp64")


@MATRIX
def test_matrices_of_each_expert_are_joined_apart(pool: Pool, alone: Alone) -> None:
    case = reparametrised("bam", "tp2 x fsdp2", "fp64", qkv_grouping="fused")
    compare(pool, alone, case, "tp2 x fsdp2", "fp64")
    gains = {name for name in alone(case, "fp64")["beside"] if name.startswith("layers.0.mixer")}
    experts = {f"layers.0.mixer.experts.{e}.{matrix}.spectral" for e in range(3) for matrix in ("qkv", "o")}
    assert {name.rpartition("_")[0] for name in gains} == experts | {"layers.0.mixer.router.spectral"}


@pytest.mark.parametrize("name", ["tp2 x fsdp2", pytest.param("tp2 x pp2 x fsdp2", marks=MATRIX)])
def test_with_muon_a_layout_equals_one_process(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, reparametrised("lightning", name, "fp64", "muon"), name, "fp64")


@pytest.mark.parametrize("name", ["pp2", pytest.param("tp2 x fsdp2", marks=MATRIX)])
def test_beside_frozen_matrices(pool: Pool, alone: Alone, name: str) -> None:
    """A stage in which no matrix is trained; and in the other, one matrix fewer, and one gain."""
    frozen = ("layers.[01].*", "embedding.*", "layers.3.mixer.q.weight", "layers.3.mixer.k.spectral_gain")
    compare(pool, alone, reparametrised("softmax", name, "fp64"), name, "fp64", frozen=frozen)


@pytest.mark.parametrize(
    ("by", "then"),
    [
        ("tp2 x pp2", "fsdp2"),
        pytest.param("alone", "tp2 x pp2 x fsdp2", marks=MATRIX),
        pytest.param("tp4", "tp2 x hsdp2x2", marks=MATRIX),
    ],
)
def test_a_checkpoint_continues_in_another_layout(pool: Pool, tmp_path: Path, by: str, then: str) -> None:
    case = Case("lightning", reparam=SIGMA)
    wanted = written_and_read(pool, case, tmp_path / "wanted", "alone", "alone", "fp64")
    assert any(name.endswith("spectral_u") for name in wanted[0]["beside"])
    found = written_and_read(pool, case, tmp_path / "found", by, then, "fp64")
    assert_continued(found, wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(
    ("name", "precision"), [("tp2 x pp2", "fp32"), pytest.param("tp2 x pp2 x fsdp2", "bf16", marks=MATRIX)]
)
def test_in_the_same_layout_it_continues_bit_for_bit(pool: Pool, tmp_path: Path, name: str, precision: str) -> None:
    assert_bit_equal(pool, Case("lightning", reparam=SIGMA | {"gain_init": "one"}), tmp_path, name, precision)
