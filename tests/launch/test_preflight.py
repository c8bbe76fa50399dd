"""The preflight, and every fault that it names, each provoked for real: on two hosts, or on this one's own address."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.preflight.machine import FLOORS, version_faults
from tests.launch.hosts import INTERFACE, ROOT, Host

SECONDS = 30
"""Within which every node has an answer."""
SHORT = ("--wait", "1")
MASTER, OTHER = "10.77.0.1", "10.77.0.2"


class Preflight:
    """Starts the preflight of nodes, and gathers how each ended: exit code and what it said."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "runs" / "first"
        self.began: list[tuple[subprocess.Popen[str], float]] = []

    def start(self, rank: int, *more: str, nodes: int = 2, prefix: Sequence[str] = (), cwd: Path = ROOT) -> Any:
        command = [sys.executable, "-m", "launch.preflight", "--nodes", str(nodes), "--node-rank", str(rank)]
        given = ["--master", MASTER, "--port", "29500", "--run-dir", str(self.run_dir), *more]
        process = subprocess.Popen(
            [*prefix, *command, *given], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.began.append((process, time.monotonic()))
        return process

    def on(self, host: Host, rank: int, *more: str, **settings: Any) -> Any:
        return self.start(rank, *more, prefix=("ip", "netns", "exec", host.name), **settings)

    def ends(self) -> list[tuple[int, str]]:
        found = []
        for process, began in self.began:
            said, complained = process.communicate(timeout=began + SECONDS - time.monotonic())
            found.append((process.returncode, said + complained))
        return found

    def refused(self) -> list[str]:
        """What the nodes said, all of which must refuse."""
        ends = self.ends()
        assert all(code == 2 for code, _ in ends), ends
        return [said for _, said in ends]


@pytest.fixture
def preflight(tmp_path: Path) -> Iterator[Preflight]:
    made = Preflight(tmp_path)
    yield made
    for process, _ in made.began:
        process.kill()
        process.communicate()


@pytest.fixture
def here(preflight: Preflight) -> Iterator[list[str]]:
    """Settings by which all nodes meet at this machine's own loop."""
    with socket.socket() as asker:
        asker.bind(("127.0.0.1", 0))
        port = asker.getsockname()[1]
    yield ["--master", "127.0.0.1", "--port", str(port)]


def test_two_hosts_that_can_train_together(two_hosts: list[Host], preflight: Preflight) -> None:
    for rank, host in enumerate(two_hosts):
        preflight.on(host, rank)
    assert preflight.ends() == [(0, f"{INTERFACE} {MASTER}\n"), (0, f"{INTERFACE} {OTHER}\n")]
    assert not preflight.run_dir.parent.exists(), "what was made to look at is gone"


def test_several_nodes_and_a_run_folder_that_is_there(here: list[str], preflight: Preflight) -> None:
    preflight.run_dir.mkdir(parents=True)
    (preflight.run_dir / "status.json").write_text("{}")
    for rank in (2, 1, 3, 0):
        preflight.start(rank, *here, nodes=4)
    assert [code for code, _ in preflight.ends()] == [0] * 4
    assert [path.name for path in preflight.run_dir.iterdir()] == ["status.json"]


def test_a_wrong_interface(two_hosts: list[Host], preflight: Preflight) -> None:
    preflight.on(two_hosts[0], 0)
    preflight.on(two_hosts[1], 1, "--interface", "ib7")
    for said in preflight.refused():
        assert f"there is no network interface ib7: this machine has lo (127.0.0.1), {INTERFACE} ({OTHER})." in said


def test_interfaces_by_which_nobody_comes(two_hosts: list[Host], preflight: Preflight) -> None:
    two_hosts[1].add_interface("spare0")
    preflight.on(two_hosts[0], 0, "--interface", "lo")
    preflight.on(two_hosts[1], 1, "--interface", "spare0")
    for said in preflight.refused():
        assert "node 0" in said and "the network interface lo (127.0.0.1) leads to this machine alone" in said
        assert "node 1" in said and "the network interface spare0 has no IPv4 address: this machine has lo" in said


def test_a_master_that_is_another_machine(two_hosts: list[Host], preflight: Preflight) -> None:
    for rank, host in enumerate(two_hosts):
        preflight.on(host, rank, *SHORT, "--master", OTHER)
    first, second = preflight.refused()
    assert f"the master's address {OTHER} is none of this machine's, which has lo (127.0.0.1)" in first
    assert f"{OTHER} refuses connections to port 29500: nothing listens there" in second


@contextmanager
def listening(host: Host, port: int) -> Iterator[None]:
    """A program on the host that has the port and says nothing."""
    program = (
        "import socket, time\n"
        f"taken = socket.create_server(('', {port}))\n"
        "print('listening', flush=True)\n"
        f"time.sleep({2 * SECONDS})\n"
    )
    command = ["ip", "netns", "exec", host.name, sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken(two_hosts: list[Host], preflight: Preflight) -> None:
    with listening(two_hosts[0], 29500):
        for rank, host in enumerate(two_hosts):
            preflight.on(host, rank, *SHORT)
        first, second = preflight.refused()
    assert "port 29500 is taken on this machine" in first and "or give another master port on all nodes" in first
    assert f"at {MASTER} port 29500 something answers that is no preflight of Headway" in second


def test_a_filter_before_the_master(two_hosts: list[Host], preflight: Preflight) -> None:
    two_hosts[0].drop("29500")
    for rank, host in enumerate(two_hosts):
        preflight.on(host, rank, *SHORT)
    first, second = preflight.refused()
    assert "of 2 nodes these are missing at 10.77.0.1 port 29500: node rank 1." in first
    assert "the master cannot be reached" in second
    assert "a filter between here and there drops packets for port 29500" in second


def test_a_filter_between_the_nodes(two_hosts: list[Host], preflight: Preflight) -> None:
    """The master's port is open, and those that gloo and NCCL choose are not."""
    two_hosts[0].drop("30000-65000")
    for rank, host in enumerate(two_hosts):
        preflight.on(host, rank)
    for said in preflight.refused():
        assert f"address {MASTER}) cannot be reached from here on a port of its choice" in said
        assert "Open it, and the ports above 1023 that gloo and NCCL choose, between all nodes." in said


@pytest.mark.parametrize(
    ("master", "sentence"),
    [
        ("10.99.0.1", "this machine has no route to 10.99.0.1"),
        ("no-such-host.invalid", "the name no-such-host.invalid does not resolve here"),
        (MASTER, "the machine is off, the address is not its own, or a filter drops all packets"),
    ],
)
def test_an_unreachable_master(two_hosts: list[Host], preflight: Preflight, master: str, sentence: str) -> None:
    if master == MASTER:
        two_hosts[0].pull_the_cable()
    preflight.on(two_hosts[1], 1, *SHORT, "--master", master)
    (said,) = preflight.refused()
    assert "the master cannot be reached" in said and sentence in said


def test_code_that_differs(here: list[str], preflight: Preflight, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, copy / floor, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "trainer" / "step.py").open("a") as file:
        file.write("# another line\n")
    preflight.start(0, *here)
    preflight.start(1, *here, cwd=copy)
    for said in preflight.refused():
        assert "for 1 reason" in said
        assert "the code of Headway differs: " in said and " on node 1 (host " in said


def test_who_has_which_version() -> None:
    found = version_faults(
        {
            "node 0": {"torch": "2.13.0", "Python": "3.11.7"},
            "node 1": {"torch": "2.12.0", "Python": "3.11.7"},
            "node 2": {"torch": "2.13.0", "Python": "3.11.7"},
        }
    )
    assert found == ["torch differs: 2.13.0 on node 0, node 2; 2.12.0 on node 1. All nodes must have the same."]


def test_a_run_folder_that_is_not_shared(here: list[str], preflight: Preflight, tmp_path: Path) -> None:
    preflight.start(0, *here)
    preflight.start(1, *here, "--run-dir", str(tmp_path / "elsewhere"))
    for said in preflight.refused():
        assert "node 1" in said and f"the run folder {tmp_path / 'elsewhere'}" in said
        assert "is not that of node 0" in said and "a file system that all nodes share" in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_written(here: list[str], preflight: Preflight, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for rank in range(2):
        preflight.start(rank, *here, "--run-dir", str(tmp_path / "file" / "run"))
    for said in preflight.refused():
        assert "node 0" in said and "cannot be written: Not a directory" in said


def test_a_node_that_does_not_come(here: list[str], preflight: Preflight) -> None:
    for rank in (0, 1):
        preflight.start(rank, *here, *SHORT, nodes=4)
    for said in preflight.refused():
        assert "after 1 s, of 4 nodes these are missing at 127.0.0.1 port" in said and ": node rank 2, 3." in said


def test_two_nodes_with_one_rank(here: list[str], preflight: Preflight) -> None:
    for rank in (0, 1, 1):
        preflight.start(rank, *here, *SHORT, nodes=3)
    first, *others = preflight.refused()
    assert "has node rank 1, which is that of node 1" in first and "node rank 2" in first
    assert any("ranks are 0 to 2" in said for said in others)


def test_a_master_that_stands_still(here: list[str], preflight: Preflight) -> None:
    master = preflight.start(0, *here, nodes=3)
    node = preflight.start(1, *here, nodes=3)
    time.sleep(1)
    master.send_signal(signal.SIGSTOP)
    _, said = node.communicate(timeout=SECONDS)
    assert node.returncode == 2
    assert "something answers that is no preflight of Headway, or stands still" in said


def test_a_node_that_was_started_long_before_another(here: list[str], preflight: Preflight) -> None:
    preflight.start(0, *here, nodes=3)
    patched = "from launch.preflight import meeting, __main__ as p; meeting.SECONDS_OF_A_VISIT = 3; "
    given = ["--nodes", "3", "--node-rank", "1", *here, "--run-dir", str(preflight.run_dir)]
    done = subprocess.run(
        [sys.executable, "-c", f"{patched} raise SystemExit(p.main())", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert "still waits for node rank 2. Start all nodes at the same time." in done.stderr


def test_whatever_hangs_there_is_an_end() -> None:
    program = (
        "import sys, time\n"
        "from launch.preflight import __main__ as preflight\n"
        "preflight.SECONDS = 0.5\n"
        "preflight.own_place = lambda *_: time.sleep(60)\n"
        "sys.exit(preflight.main('--nodes 2 --node-rank 1 --master x --port 1 --run-dir x'.split()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 2
    assert "has not ended within 0.5 s" in done.stderr
