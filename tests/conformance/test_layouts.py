"""Every layout equals one process: losses, every gradient, gradient norms, and the parameters after two updates.

In fp64 to 1e-9 and in fp32 to 1e-5 of each tensor (losses and norms sharper), so that a wrong factor has nowhere to
hide. Rows count 5 to 95% of their tokens, so a mean of means is not the mean; clipping is at work; the vocabulary is
divided by no tp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import Architecture
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults
from tests.conformance.layouts import (
    BOUNDS,
    CLIP,
    KNOWN,
    LAYOUTS,
    LENGTH,
    PRODUCTS,
    ROWS,
    Case,
    assert_equal,
    compiled_steps,
    kept_wide,
    merged,
    plain_gradients,
    shared_dtypes,
    two_steps,
)
from tests.conformance.models import CASES, mixer_class
from tests.pool import Pool

KINDS = list(dict.fromkeys(kind for kind, _ in CASES))


def together(count: int) -> list[str]:
    """Every mixer in one of some hybrids, `count` at a time, joined by +: a fault of one shows in the gradients of all.

    Where nothing crosses a cut, rows have to be of one document to be cut: those are apart. Some come twice where the
    last ones would not fill the layers evenly.
    """
    apart = [[kind for kind in KINDS if (mixer_class(kind).context == "none") == none] for none in (False, True)]
    parts = [kinds[first : first + count] for kinds in apart for first in range(0, len(kinds), count)]
    return ["+".join(part + part[: -len(part) % count if count % len(part) else 0]) for part in parts]


PAIRS, FOURS = together(2), together(4)
Alone = Callable[..., dict[str, Any]]
MATRIX = pytest.mark.matrix


def faults(case: Case, name: str) -> list[str]:
    """Why this mixer's example cannot be trained in this layout."""
    world_size, parallel = KNOWN[name]
    architecture: Architecture = case.architecture()
    return layout_faults(
        parallel,
        world_size,
        architecture,
        seq_len=LENGTH,
        global_batch_size=ROWS,
        isolate_documents=case.isolated,
    )


def compare(pool: Pool, alone: Alone, case: Case, name: str, precision: str, **options: Any) -> None:
    world_size, parallel = KNOWN[name]
    if why := faults(case, name):
        kinds = case.kind.split("+")
        assert all(faults(replace(case, kind=kind), name) for kind in kinds), f"{kinds}: only one of them is refused"
        # What cannot be is refused, and only because heads, widths or blocks cannot be cut so.
        known = ("largest tp that fits this model is", "so a cut falls into a block")
        assert all(any(words in sentence for words in known) for sentence in why), why
        return
    found = pool.run(two_steps, world_size, case, parallel, precision, **options)
    assert_equal(found, alone(case, precision, **options), BOUNDS[precision])


IN_ALL = ("softmax", "lightning")
COVERING = ("tp4", "pp2 zbv", "tp2 x pp2", "tp2 x fsdp2", "cp4", "tp2 x cp2")
COVERED = ("cp2", "pp2 x cp2", "cp2 x fsdp2", "cp2 x pp2 x fsdp2")
FIRST = {
    "lightning": [name for name in LAYOUTS if name not in COVERED],
    "softmax": ["tp2 x pp2 x fsdp2", *COVERING],
}
ONE_BY_ONE = [
    (kind, name) for kind in KINDS for name in LAYOUTS if name in FIRST.get(kind, COVERING[2:4] + COVERING[5:])
]
CELLS = [
    *ONE_BY_ONE,
    *(
        pytest.param(kinds, name, marks=MATRIX)
        for kinds in FOURS
        for name in LAYOUTS
        if (kinds, name) not in ONE_BY_ONE
    ),
]
"""`make test` takes one mixer through the layouts and every other one through a part, which leaves no way of
cutting a layer untried; the matrix has all mixers in all layouts, and the products of cp that others cover."""


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_a_layout_equals_one_process(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    compare(pool, alone, Case.of(kind, name, "fp64"), name, "fp64")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["fsdp4", "hsdp2x2"])
def test_training_without_logits_is_training_with_them(pool: Pool, alone: Alone, name: str, tied: bool) -> None:
    """Where the head's weight is gathered for the loss, in micro-batches, and on one process; its gradient is all of
    it, or added to the embedding's."""
    case = Case("softmax", model={"tie_embeddings": tied})
    with_logits = alone(replace(case, fused_loss=False))
    assert_equal([alone(case)], with_logits, BOUNDS["fp64"])
    world_size, parallel = KNOWN[name]
    assert_equal(pool.run(two_steps, world_size, case, parallel, "fp64"), with_logits, BOUNDS["fp64"])


def test_one_process_trains_on_the_mean_over_counted_tokens(pool: Pool, alone: Alone) -> None:
    """What all layouts are compared with is itself compared: with plain autograd, before and after clipping."""
    ((loss, gradients),) = pool.run(plain_gradients, 1, Case("softmax"))
    found = alone(Case("softmax"))
    norm = sum(gradient.square().sum().item() for gradient in gradients.values()) ** 0.5
    assert found["losses"][0] == pytest.approx(loss, rel=1e-12)
    assert found["norms"][0] == pytest.approx(norm, rel=1e-12)
    assert found["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found["gradients"][name], gradient * (CLIP / norm), rtol=1e-9, atol=1e-12)


FP32 = ("tp2 x pp2 x fsdp2", *COVERING)
"""In other layouts it would be other sums of the same numbers."""


@pytest.mark.matrix
@pytest.mark.parametrize("name", FP32)
@pytest.mark.parametrize("kinds", PAIRS)
def test_a_layout_equals_one_process_in_fp32(pool: Pool, alone: Alone, kinds: str, name: str) -> None:
    compare(pool, alone, Case.of(kinds, name, "fp32"), name, "fp32")


@pytest.mark.matrix
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("kinds", FOURS)
def test_a_product_equals_one_process(pool: Pool, alone: Alone, kinds: str, name: str) -> None:
    compare(pool, alone, Case.of(kinds, name, "fp64"), name, "fp64")


OTHERS = [(kind, example) for kind, example in CASES if example > 0]
OTHER_LAYOUTS = ["tp2", "cp2"]
"""Settings change what is cut along heads or along the sequence; stages and shards do not see them."""


@pytest.mark.matrix
@pytest.mark.parametrize("name", OTHER_LAYOUTS)
@pytest.mark.parametrize(("kind", "example"), OTHERS)
def test_other_settings_of_a_mixer(pool: Pool, alone: Alone, kind: str, example: int, name: str) -> None:
    """Grouped queries, odd head widths, windows, other activations; where tp cannot cut them, a refusal."""
    compare(pool, alone, Case(kind, example), name, "fp64")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("softmax", "cp4"),
        *(
            pytest.param(*cell, marks=pytest.mark.matrix)
            for cell in (("lightning", "cp4"), ("softmax", "tp2 x cp2 x pp2"), ("lightning", "tp2 x cp2 x pp2"))
        ),
    ],
)
def test_rows_of_one_document_are_cut(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    """Where rows are one document each, nothing masks what crosses the cuts."""
    compare(pool, alone, Case(kind, isolated=False), name, "fp64")


HYBRIDS = ["lightning+softmax+minimax+norm_linear", "diag_block+lightning+softmax+diag_block"]


@pytest.mark.parametrize("name", ["cp2", pytest.param("tp2 x cp2 x pp2", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("kinds", HYBRIDS)
def test_hybrids_are_cut(pool: Pool, alone: Alone, kinds: str, name: str) -> None:
    compare(pool, alone, Case.of(kinds, name, "fp64"), name, "fp64")


MUON_FIRST = [("softmax", "tp2 x fsdp2"), ("softmax", "pp2 zbv"), ("lightning", "hsdp2x2")]
MUON_MORE = ["cp2 x fsdp2", "tp2 x pp2 x fsdp2", "pp4 interleaved", "tp2 x hsdp2x2", "pp2 zbv x fsdp2"]


def muon_case(kind: str, name: str, precision: str) -> Case:
    """A model trained by Muon.

    In fp32 with smaller weights: gradients of eight layers of Lightning, which the deepest pipeline needs, are else as
    far as the bound from those of fp64 before any update, and whether a layout stays below it is chance.
    """
    model = {"init_std": 0.05} if precision == "fp32" else {}
    return replace(Case.of(kind, name, precision), model=model, optimizer="muon")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *MUON_FIRST,
        *(pytest.param(kind, name, marks=pytest.mark.matrix) for kind in IN_ALL for name in MUON_MORE),
        pytest.param("bam", "tp2 x fsdp2", marks=pytest.mark.matrix),
    ],
)
def test_muon_in_a_layout_equals_one_process(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    """Matrices cut by columns, by rows, into pieces, over stages, and held several times."""
    compare(pool, alone, muon_case(kind, name, "fp64"), name, "fp64")


@pytest.mark.matrix
@pytest.mark.parametrize("name", FP32)
@pytest.mark.parametrize("kind", IN_ALL)
def test_muon_in_a_layout_equals_one_process_in_fp32(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    compare(pool, alone, muon_case(kind, name, "fp32"), name, "fp32")


def test_muon_beside_frozen_parameters(pool: Pool, alone: Alone) -> None:
    """A stage without a matrix to train; and in the other, one matrix fewer."""
    case, frozen = muon_case("softmax", "pp2", "fp64"), ("layers.[01].*", "embedding.*", "layers.3.mixer.q.weight")
    compare(pool, alone, case, "pp2", "fp64", frozen=frozen)


MODELS: dict[str, dict[str, Any]] = {
    "a head of its own": {"tie_embeddings": False},
    "learned positions, layernorm": {"positions": "learned", "max_positions": LENGTH, "norm": "layernorm"},
    "norms without weights, no biases": {"norm": "srmsnorm", "bias": False, "positions": "none"},
    "parallel residual, scaled embedding": {"residual": "parallel", "embedding_scale": "sqrt"},
    "normalised residual": {"residual": "normalised", "residual_factors": {"it": (1.5, 0.7), "gelu": (0.9, 1.1)}},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["tp2 x pp2", pytest.param("tp2 x pp2 zbv x fsdp2", marks=pytest.mark.matrix)])
def test_other_models(pool: Pool, alone: Alone, model: str, name: str) -> None:
    compare(pool, alone, Case("softmax", model=MODELS[model]), name, "fp64")


@pytest.mark.parametrize("frozen", ["embedding.*", "layers.[01].*", "layers.3.*"])
@pytest.mark.parametrize("name", ["pp2", *(pytest.param(x, marks=MATRIX) for x in ("tp2 x fsdp2", "pp2 zbv x fsdp2"))])
def test_frozen_parameters(pool: Pool, alone: Alone, frozen: str, name: str) -> None:
    """A stage of which everything is frozen still hands gradients on; a tied embedding is frozen in both places."""
    patterns = (frozen, "embedding.*", "positions.*") if frozen.startswith("layers") else (frozen,)
    model = {"positions": "learned", "max_positions": LENGTH}
    compare(pool, alone, Case("softmax", model=model), name, "fp64", frozen=patterns)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("tp2 x pp2 x fsdp2", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_and_keeps_fp32_masters(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    results = pool.run(two_steps, world_size, Case(kind), parallel, "bf16")
    for found in results:
        assert found["losses"] == pytest.approx(alone(Case(kind))["losses"], rel=0.02)
        assert found["evaluated"] == pytest.approx(alone(Case(kind))["evaluated"], rel=0.02)
    for what in ("parameters", "gradients"):
        assert {value.dtype for value in merged(results, what).values()} == {torch.float32}


@pytest.mark.parametrize("parallel", [{}, {"cp": 2}], ids=["fsdp2", "cp2"])
def test_recomputation_in_bf16_changes_nothing(pool: Pool, parallel: dict[str, Any]) -> None:
    """Parameters that stay fp32 have hooks of their own inside of the blocks, and those run twice, differently."""
    case = Case("lightning", num_layers=2)
    found = {
        recompute: pool.run(two_steps, 2, case, ParallelConfig(recompute=recompute, **parallel), "bf16")[0]
        for recompute in ("none", "selective", "full")
    }
    for recompute in ("selective", "full"):
        assert found[recompute]["losses"] == found["none"]["losses"]
        assert found[recompute]["norms"] == found["none"]["norms"]
        for name, value in found["none"]["parameters"].items():
            assert torch.equal(found[recompute]["parameters"][name], value), name


@pytest.mark.matrix
@pytest.mark.parametrize(("kind", "name"), [("softmax", "tp2"), ("lightning", "cp2")])
def test_compiled_blocks_the_second_time_too(pool: Pool, alone: Alone, tmp_path: Path, kind: str, name: str) -> None:
    """With a warm cache, torch compiles a tensor-parallel model of DTensors into one with wrong gradients (on CPUs)."""
    world_size, parallel = LAYOUTS[name]
    case = Case(kind, num_layers=2)
    for time in ("first", "second"):
        found = pool.run(compiled_steps, world_size, case, parallel, "fp32", str(tmp_path))
        assert_equal(found, alone(case, "fp32"), BOUNDS["fp32"])
        assert all(result["breaks"] == {} for result in found)
        if time == "second":
            assert all(result["hits"] > 0 for result in found), "the cache was cold"


def test_angles_and_routers_stay_fp32_under_bf16(pool: Pool) -> None:
    assert pool.run(kept_wide, 2, "lightning")[0] == {"layers.0.mixer.lrpe.theta"}
    routers = ("route", "weigh_shared", "weigh_stages")
    wanted = {f"layers.{layer}.mixer.{router}.weight" for layer in (0, 1) for router in routers}
    assert pool.run(kept_wide, 2, "moh")[0] == wanted
    assert pool.run(kept_wide, 2, "bam")[0] == {f"layers.{layer}.mixer.router.weight" for layer in (0, 1)}


def test_rotary_tables_stay_fp32_under_bf16(pool: Pool) -> None:
    """FSDP casts what it finds in the inputs of a block, inside of the context too, unless it is told not to."""
    assert pool.run(shared_dtypes, 2, "softmax")[0] == {torch.float32}
