"""Fixtures that every test may use."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels are run by Python then. It is asked once, where a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.pool import Pool

# Triton's kernels run in Python here; it reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Gloo workers, at most eight, forked for each case."""
    return Pool(8, tmp_path_factory.mktemp("pool"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))
