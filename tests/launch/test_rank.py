"""A rank that a launcher starts which leaves it to find out the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.processes import this_process
from tests.launch.hosts import ROOT


def started(first: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of the trainer as a rank; it has to be one that needs no other ranks."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "GLOO_", "MASTER_"))}
    command = [sys.executable, "-m", "launch.rank", "--first", str(first), "nonsense"]
    return subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_the_first_rank_says_which_process_it_is(rank: str, says: bool, tmp_path: Path) -> None:
    first = tmp_path / "first"
    done = started(first, RANK=rank, MASTER_ADDR="127.0.0.1")
    assert (done.returncode, "'nonsense' is no command" in done.stderr) == (2, True), (
        "the command's own end is the rank's"
    )
    assert first.exists() == says
    assert not says or int(first.read_text()) > 1
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3"}, (1, 3)),
        ({"CROSS_RANK": "2", "CROSS_SIZE": "4"}, (2, 4)),
    ],
)
def test_a_process_knows_its_node_under_either_launcher(
    variables: dict[str, str], place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GROUP_RANK", "GROUP_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = this_process()
    assert (found.node, found.nodes) == place
