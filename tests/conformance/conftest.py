"""What every layout is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests.conformance.layouts import Case, two_steps
from tests.pool import Pool

ALONE = ParallelConfig()


@pytest.fixture(scope="session")
def alone(pool: Pool) -> Callable[..., dict[str, Any]]:
    """What one process comes to, computed once for each case."""
    known: dict[str, dict[str, Any]] = {}

    def run(case: Case, precision: str = "fp64", **options: Any) -> dict[str, Any]:
        key = f"{case} {precision} {options}"
        if key not in known:
            known[key] = pool.run(two_steps, 1, case, ALONE, precision, **options)[0]
            assert all(norm > 0.5 for norm in known[key]["norms"]), "the clipping was idle"
        return known[key]

    return run
