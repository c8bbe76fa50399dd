"""Reparametrised matrices are the same in every layout: one logical matrix has one norm, one gain, one gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.conformance.layouts import Case
from tests.conformance.test_layouts import CELLS, Alone, compare
from tests.pool import Pool

SIGMA = {"kind": "sigma"}


def reparametrised(kind: str, name: str, precision: str = "fp64", **settings: Any) -> Case:
    return replace(Case.of(kind, name, precision), reparam=SIGMA | settings)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_a_layout_equals_one_process(pool: Pool, alone: Alone, kind: str, name: str) -> None:
    compare(pool, alone, reparametrised(kind, name), name, "fp64")
