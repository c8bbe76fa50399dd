"""Two hosts with addresses of their own, where this machine lets them be made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.launch import hosts


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[list[hosts.Host]]:
    """10.77.0.1 and 10.77.0.2; skipped, with the reason, where they cannot be made."""
    if reason := _why_not():
        pytest.skip(reason)
    with hosts.two_hosts(tmp_path) as made:
        yield made


@cache
def _why_not() -> str:
    return hosts.why_not()
