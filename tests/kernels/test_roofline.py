"""What a kernel has to do at least, and its place under the roof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.stack import Model
from tests.conformance.models import built


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def row(operation: str, **more: Any) -> dict[str, Any]:
    shape = {"operation": operation, "arm": "headway", "length": 64, "batch": 2, "heads": 4, "width": 8}
    return shape | {"dtype": "bfloat16", "date": "2026-01-01", "forward_ms": 1.0, "both_ms": 3.0} | more


def attention_flops(kind: str) -> float:
    """Of a layer's attention alone at N = 64, as the model declares them for a token."""
    model: Model = built(
        {
            "model": {"d_model": 32, "num_layers": 1, "vocab_size": 7, "pattern": [kind], "positions": "none"},
            "mixers": {kind: {"num_heads": 4} | ({"lrpe_layers": []} if kind == "lightning" else {})},
            "feedforwards": {"sglu": {"d_ff": 8}},
        }
    )
    mixer = model.layers["0"].mixer
    return mixer.flops(64) - mixer.linear_flops()


@pytest.mark.parametrize(("operation", "kind"), [("lightning", "lightning"), ("gated attention", "softmax")])
def test_operations_are_those_that_models_declare(operation: str, kind: str) -> None:
    from roofline import work_of

    assert work_of(row(operation))["forward"].operations == 2 * 64 * attention_flops(kind)


def test_heads_that_do_not_run_are_no_work() -> None:
    from roofline import work_of

    whole, half = (work_of(row("gated attention", arm=arm))["both"].operations for arm in ("headway", "1/2"))
    assert half == whole / 2 > 0


def test_a_kernel_at_the_ceiling_is_all_of_it() -> None:
    from roofline import Ceilings, placed, work_of

    found = row("glu", width=128, heads=1)
    moved = work_of(found)["forward"].bytes
    assert moved == 3 * 2 * 64 * 128 * 2
    forward, both = placed([found], Ceilings(operations=1e12, bytes=moved / 1e-3))
    assert (forward["fraction"], forward["bound"]) == (1.0, "memory")
    assert both["fraction"] == pytest.approx(8 / 3 / 3, abs=1e-3)


def test_products_bound_what_has_many_operations_a_byte() -> None:
    from roofline import Ceilings

    ceilings = Ceilings(operations=100.0, bytes=10.0)
    from roofline import Work

    assert ceilings.shortest(Work(200.0, 10.0)) == (2.0, "operations")
    assert ceilings.shortest(Work(200.0, 30.0)) == (3.0, "memory")
