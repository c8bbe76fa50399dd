"""`headway launch deepspeed` on two hosts: DeepSpeed's own launcher, pdsh and ssh, and two sshd."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.cli import main
from tests.launch import ssh_hosts
from tests.launch.hosts import Host, free_ports, wait_until
from tests.pool import Pool
from tests.trainer.runs import assert_twins, status, train, write_config, write_tokens
from trainer.metrics import read_metrics

pytestmark = pytest.mark.cluster

SECONDS_TO_START = 120
SECONDS_TO_END = 90


def skip_without_servers() -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (extra `deepspeed`)")
    if reason := ssh_hosts.why_not():
        pytest.skip(reason)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[ssh_hosts.Hosts]:
    """Two hosts at 127.0.0.1 and 127.0.0.2; skipped, with the reason, where they cannot be made."""
    skip_without_servers()
    (tmp_path / "hosts").mkdir()
    with ssh_hosts.ssh_hosts(tmp_path / "hosts") as made:
        yield made


@pytest.fixture
def apart(two_hosts: list[Host], tmp_path: Path) -> Iterator[ssh_hosts.Hosts]:
    """Two hosts with addresses of their own; skipped, with the reason, where they cannot be made."""
    skip_without_servers()
    (tmp_path / "hosts").mkdir()
    with ssh_hosts.ssh_hosts(tmp_path / "hosts", two_hosts) as made:
        yield made


class Start:
    """One start of a written script, and what it says."""

    def __init__(self, hosts: ssh_hosts.Hosts, script: Path, label: str):
        self.path = script.with_name(f"{label}.out")
        with self.path.open("w") as output:
            self.process = psutil.Popen(
                [*hosts.on_first, "bash", str(script)], env=hosts.environment, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self.path.read_text()

    def reaches(self, run_dir: Path, steps: int) -> None:
        """Waits for so many steps."""

        def has() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said}"
            return len(read_metrics(run_dir)) >= steps

        wait_until(has, SECONDS_TO_START, f"{steps} steps")

    def ends_within(self, seconds: float) -> int:
        """Its exit code; fails if it goes on."""
        try:
            return self.process.wait(seconds)
        except psutil.TimeoutExpired:
            raise AssertionError(f"not ended within {seconds} s:\n{self.said}") from None

    def end(self) -> None:
        for process in [*self.process.children(recursive=True), self.process] if self.process.is_running() else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def write_script(hosts: ssh_hosts.Hosts, folder: Path, config: Path, *overrides: str) -> Path:
    argv = [str(config), "--nodes", "2", "--processes", "2", "--hostfile", str(hosts.folder / "hostfile")]
    argv += ["--master", hosts.master, "--port", str(free_ports(1)[0]), "--out", "start.sh", "--overwrite"]
    with contextlib.chdir(folder):
        assert main(["launch", "deepspeed", *argv, *overrides]) == 0
    return folder / "start.sh"


def test_two_hosts_are_stopped_and_go_on_as_their_twin(pool: Pool, loopback: ssh_hosts.Hosts, tmp_path: Path) -> None:
    """A stop that is asked of the script leaves a checkpoint; the same again goes on, and ends equal, bit for bit."""
    (tmp_path / "twin").mkdir()
    schedule = {"steps": 150}
    twin = write_config(tmp_path / "twin", write_tokens(tmp_path / "walk"), schedule=schedule)
    results = pool.run(train, 4, twin)
    assert [code for code, _ in results] == [0] * 4, results

    config, run_dir = write_config(tmp_path, str(tmp_path / "walk"), schedule=schedule), tmp_path / "run"
    script = write_script(loopback, tmp_path, config)
    start = Start(loopback, script, "first")
    try:
        start.reaches(run_dir, 5)
        start.process.send_signal(signal.SIGTERM)
        assert start.ends_within(SECONDS_TO_END) == 0, start.said
    finally:
        start.end()
    found = status(run_dir)
    assert (found["state"], found["reason"]) == ("preempted", "signal SIGTERM")
    assert 5 <= found["step"] < 150
    assert found["checkpoint"] == f"step-{found['step']:08d}"
    assert not loopback.processes, "nothing goes on where it was stopped"

    again = Start(loopback, script, "second")
    try:
        assert again.ends_within(SECONDS_TO_START + SECONDS_TO_END) == 0, again.said
    finally:
        again.end()
    print(again.said[-1500:])
    assert status(run_dir)["state"] == "finished"
    assert_twins(run_dir, tmp_path / "twin" / "run", step=150)
    assert not list(tmp_path.glob(".first-rank*")), "what the script needs while it runs is gone"


def test_its_own_engine_runs_under_it(pool: Pool, loopback: ssh_hosts.Hosts, tmp_path: Path) -> None:
    """ZeRO 3 with offload; under torchrun it runs in docs/deepspeed.md."""
    engine = {"engine": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu"}
    (tmp_path / "twin").mkdir()
    twin = write_config(tmp_path / "twin", write_tokens(tmp_path / "walk"), parallel=engine)
    results = pool.run(train, 4, twin)
    assert [code for code, _ in results] == [0] * 4, results

    config = write_config(tmp_path, str(tmp_path / "walk"), parallel=engine)
    start = Start(loopback, write_script(loopback, tmp_path, config), "zero")
    try:
        assert start.ends_within(SECONDS_TO_START + SECONDS_TO_END) == 0, start.said
    finally:
        start.end()
    print(start.said[-1500:])
    assert_twins(tmp_path / "run", tmp_path / "twin" / "run")


def test_a_killed_rank_ends_all_hosts_with_70_and_a_refusal_with_2(apart: ssh_hosts.Hosts, tmp_path: Path) -> None:
    """The watch over nodes works without torchrun: the other host's message names the node that was lost."""
    config = write_config(tmp_path, write_tokens(tmp_path / "walk"), schedule={"steps": 20_000})
    run_dir = tmp_path / "run"
    start = Start(apart, write_script(apart, tmp_path, config), "killed")
    try:
        start.reaches(run_dir, 3)
        victims = [
            process
            for process in apart.servers[1].children(recursive=True)
            if process.environ().get("RANK") == "3" and "launch.rank" in process.cmdline()
        ]
        assert len(victims) == 1
        victims[0].kill()
        assert start.ends_within(SECONDS_TO_END) == 70, start.said
    finally:
        start.end()
    found = status(run_dir)
    assert found["state"] == "failed"
    assert "node 1 (host" in found["reason"] and "ranks 2-3" in found["reason"], found

    # The rank's own refusal, which status.json does not tell of.
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    refused = Start(apart, write_script(apart, tmp_path, config, "--data.train", "none"), "refused")
    try:
        assert refused.ends_within(SECONDS_TO_END) == 2, refused.said
    finally:
        refused.end()
    assert "none" in refused.said
    assert status(run_dir) == found
