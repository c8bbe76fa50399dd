"""A checkpoint written in any layout is read in any: model and optimizer go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from tests.conformance.layouts import (
    BOUNDS,
    KNOWN,
    Bounds,
    Case,
    Optimizer,
    depth,
    differences,
    merged,
    train_and_write,
)
from tests.conformance.models import mixer_class
from tests.conformance.test_layouts import FOURS
from tests.pool import Pool

MATRIX = pytest.mark.matrix
Twin = Callable[..., list[Any]]
ALL = KNOWN | {"alone": (1, ParallelConfig())}
CROSSINGS = [
    ("tp2 x pp2", "fsdp2"),
    ("fsdp4", "tp2 x pp2"),
    ("tp2 x pp2 x fsdp2", "alone"),
    ("alone", "tp2 x pp2 x fsdp2"),
    ("tp2 x cp2 x pp2", "cp2 x fsdp2"),
    ("cp4", "tp2 x pp2"),
    ("pp2 zbv x fsdp2", "tp4"),
    ("tp2 x hsdp2x2", "pp2 zbv"),
    ("tp4 x fsdp2", "pp4"),
]

MUON_CROSSINGS = [
    ("tp2 x fsdp2", "alone"),
    ("alone", "tp2 x pp2 x fsdp2"),
    ("tp2 x hsdp2x2", "pp2 zbv"),
]

MUON_BIT_EQUAL = [("tp2 x fsdp2", "fp32"), ("pp2 zbv x fsdp2", "bf16")]

BIT_EQUAL = [
    ("tp2 x pp2", "fp32"),
    ("tp2 x pp2 x fsdp2", "bf16"),
    ("cp2 x fsdp2", "fp32"),
    ("tp2 x cp2 x pp2", "bf16"),
    ("pp2 zbv x fsdp2", "fp32"),
    ("tp2 x hsdp2x2", "bf16"),
    ("tp4", "fp32"),
    ("pp4 interleaved", "fp32"),
]


def case_of(kind: str) -> Case:
    """The same in every layout, so with rows of one document where sequences could not be cut otherwise."""
    return Case(kind, isolated=all(mixer_class(part).context != "none" for part in kind.split("+")))


def written_and_read(pool: Pool, case: Case, tmp_path: Path, by: str, then: str, precision: str) -> list[Any]:
    for name, steps, write in ((by, 1, True), (then, 2, False)):
        world_size, parallel = ALL[name]
        found = pool.run(train_and_write, world_size, case, parallel, precision, tmp_path, steps, write)
    return found


def assert_continued(found: list[Any], wanted: list[Any], bounds: Bounds) -> None:
    assert {tuple(result["losses"]) for result in found} == {tuple(found[0]["losses"])}
    assert found[0]["losses"] == pytest.approx(wanted[0]["losses"], rel=bounds.losses)
    assert found[0]["norms"] == pytest.approx(wanted[0]["norms"], rel=bounds.norms)
    for what, floor in (("parameters", 1e-3), ("moments", 1e-6)):
        for error, name in differences(merged(found, what), merged(wanted, what), floor):
            assert error <= bounds.tensors, f"{what}: {name}: {error:.1e}"
    for result in found:
        for error, name in differences(result["beside"], wanted[0]["beside"], 1e-3):
            assert error <= bounds.tensors, f"beside the model: {name}: {error:.1e}"


@pytest.fixture(scope="module")
def twin(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """The second of two steps of one process, for each mixer and optimizer."""

    @cache
    def run(kind: str, optimizer: Optimizer = "adamw") -> list[Any]:
        case = replace(case_of(kind), optimizer=optimizer)
        return written_and_read(pool, case, tmp_path_factory.mktemp(kind), "alone", "alone", "fp64")

    return run


@pytest.mark.parametrize(
    ("by", "then"), [*CROSSINGS[:5], *(pytest.param(*case, marks=MATRIX) for case in CROSSINGS[5:])]
)
@pytest.mark.parametrize("kind", ["lightning", *(pytest.param(kinds, marks=MATRIX) for kinds in FOURS)])
def test_a_checkpoint_continues_in_another_layout(
    pool: Pool, twin: Twin, tmp_path: Path, kind: str, by: str, then: str
) -> None:
    wanted = twin(kind)
    found = written_and_read(pool, case_of(kind), tmp_path, by, then, "fp64")
    assert_continued(found, wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(
    ("by", "then"), [MUON_CROSSINGS[0], *(pytest.param(*case, marks=MATRIX) for case in MUON_CROSSINGS[1:])]
)
def test_muon_continues_in_another_layout(pool: Pool, twin: Twin, tmp_path: Path, by: str, then: str) -> None:
    wanted = twin("lightning", "muon")
    assert any(name.endswith("q.weight.momentum_buffer") for name in wanted[0]["moments"])
    found = written_and_read(pool, Case("lightning", optimizer="muon"), tmp_path, by, then, "fp64")
    assert_continued(found, wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(
    ("name", "precision"),
    [BIT_EQUAL[0], BIT_EQUAL[2], *(pytest.param(*case, marks=MATRIX) for case in (BIT_EQUAL[1], *BIT_EQUAL[3:]))],
)
def test_in_the_same_layout_it_continues_bit_for_bit(pool: Pool, tmp_path: Path, name: str, precision: str) -> None:
    """Against a run that was never stopped: its second step follows its first in memory."""
    assert_bit_equal(pool, Case("lightning", num_layers=depth(name, "fp64")), tmp_path, name, precision)


@pytest.mark.parametrize(
    ("name", "precision"), [MUON_BIT_EQUAL[0], *(pytest.param(*case, marks=MATRIX) for case in MUON_BIT_EQUAL[1:])]
)
def test_muon_continues_bit_for_bit(pool: Pool, tmp_path: Path, name: str, precision: str) -> None:
    case = Case("lightning", num_layers=depth(name, "fp32"), optimizer="muon")
    assert_bit_equal(pool, case, tmp_path, name, precision)


def assert_bit_equal(pool: Pool, case: Case, tmp_path: Path, name: str, precision: str) -> None:
    """A run that was stopped between its two steps, and one that was not, in the same layout."""
    world_size, parallel = ALL[name]
    wanted = pool.run(straight_on, world_size, case, parallel, precision)
    found = written_and_read(pool, case, tmp_path, name, name, precision)
    assert found[0]["losses"] == wanted[0]["losses"]
    assert found[0]["norms"] == wanted[0]["norms"]
    ours, theirs = merged(found, "parameters"), merged(wanted, "parameters")
    assert ours.keys() == theirs.keys()
    for parameter, value in theirs.items():
        assert torch.equal(ours[parameter], value), parameter
    for result in found:
        for name, value in wanted[0]["beside"].items():
            assert torch.equal(result["beside"][name], value), name


def straight_on(case: Case, parallel: ParallelConfig, precision: str) -> dict[str, Any]:
    from tests.conformance.layouts import LR, beside, build, share_of, spoken, told, updater_of, whole

    model = build(case, parallel, precision)
    updater = updater_of(model, case)
    updater.update(share_of(model, 1, case.isolated), 1, lr=LR)
    outcome = updater.update(share_of(model, 2, case.isolated), 2, lr=LR)
    parameters = spoken(model, whole(model, dict(told(model))))
    return {
        "losses": [outcome.loss],
        "norms": [outcome.grad_norm],
        "parameters": parameters,
        "beside": beside(model),
    }
