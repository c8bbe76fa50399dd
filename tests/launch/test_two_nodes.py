"""`headway train` on two hosts with addresses of their own, by launch/torchrun.sh; and hosts that are lost."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from model.folders import newest_complete
from tests.launch.hosts import Host, Started, torchrun, wait_until
from tests.pool import Pool
from tests.trainer.runs import curve, status, train, write_config, write_tokens
from trainer.metrics import read_metrics

SECONDS_TO_START = 120
SECONDS_TO_END = 60


def node_named(index: int, host: Host, ranks: str) -> str:
    """How messages call a node."""
    return f"node {index} (host {socket.gethostname()}, address {host.address}, {ranks})"


def start(hosts: list[Host], processes: int, config: Path, steps: int) -> list[Started]:
    """A run on both hosts that has made so many steps."""
    runs = torchrun(hosts, processes, config)
    run_dir = config.parent / "run"

    def has_begun() -> bool:
        for run in runs:
            assert run.process.poll() is None, f"{run.path.stem} ended with {run.process.returncode}:\n{run.said}"
        return len(read_metrics(run_dir)) >= steps

    wait_until(has_begun, SECONDS_TO_START, "the first steps")
    return runs


def endless(folder: Path, **sections: dict[str, object]) -> Path:
    """A configuration that nobody sees the end of."""
    return write_config(folder, write_tokens(folder / "walk"), schedule={"steps": 20_000}, **sections)


def test_two_nodes_repeat_one_and_a_killed_node_ends_the_other(
    pool: Pool, two_hosts: list[Host], tmp_path: Path
) -> None:
    (tmp_path / "twin").mkdir()
    twin = endless(tmp_path / "twin")
    results = pool.run(train, 4, twin, "--run.stop_at_step", "6")
    assert [code for code, _ in results] == [0] * 4, results

    runs = start(two_hosts, 2, endless(tmp_path), steps=6)
    # One host or two: the same processes add the same numbers in the same order.
    assert curve(tmp_path / "run")[:6] == curve(tmp_path / "twin" / "run")

    two_hosts[1].kill_all()
    assert runs[0].ends_within(SECONDS_TO_END) == 70
    lost = node_named(1, two_hosts[1], "ranks 2-3") + " has closed its connections"
    assert lost in runs[0].said
    found = status(tmp_path / "run")
    assert found["state"] == "failed"
    assert found["reason"].startswith("rank 0, step ") and lost in found["reason"]


@pytest.mark.matrix
def test_a_killed_first_node_ends_the_other_which_writes_the_status(two_hosts: list[Host], tmp_path: Path) -> None:
    # Nodes are numbered as they are started, not in the order of their addresses.
    two_hosts.reverse()
    runs = start(two_hosts, 1, endless(tmp_path, checkpoint={"every_steps": 2, "keep_last": 1}), steps=5)
    two_hosts[0].kill_all()
    assert runs[1].ends_within(SECONDS_TO_END) == 70
    lost = node_named(0, two_hosts[0], "rank 0")
    assert lost in runs[1].said
    found = status(tmp_path / "run")
    assert found["state"] == "failed"
    assert found["reason"].startswith("rank 1, step ") and lost in found["reason"]
    newest, _ = newest_complete(tmp_path / "run")
    assert newest is not None and found["checkpoint"] is not None, "what the first rank wrote of checkpoints stays"


@pytest.mark.matrix
def test_a_pulled_cable_ends_both_nodes(two_hosts: list[Host], tmp_path: Path) -> None:
    """No connection is closed: only the missing signs of life tell."""
    runs = start(two_hosts, 1, endless(tmp_path, parallel={"node_timeout": 8.0}), steps=3)
    two_hosts[1].pull_the_cable()
    for run, other, rank in ((runs[0], 1, "rank 1"), (runs[1], 0, "rank 0")):
        assert run.ends_within(SECONDS_TO_END) == 70
        assert f"{node_named(other, two_hosts[other], rank)} has given no sign of life for 8 seconds" in run.said
    found = status(tmp_path / "run")
    assert found["state"] == "failed"
    assert node_named(1, two_hosts[1], "rank 1") in found["reason"], "the first rank has the last word"
