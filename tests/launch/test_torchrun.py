"""launch/torchrun.sh on one node: what it passes on, and what it ends with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.agent import ending
from launch.run_folder import run_folder
from tests.launch.hosts import ROOT, free_ports, wait_until
from tests.trainer.runs import status, write_config, write_tokens
from trainer.metrics import read_metrics

SECONDS = 120
SCRIPT = str(ROOT / "launch/torchrun.sh")


def torchrun_script(*argv: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PROCESSES": "1"} | variables
    return subprocess.Popen(
        [SCRIPT, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*argv: str, **variables: str) -> tuple[int, str]:
    process = torchrun_script(*argv, **variables)
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, said


def test_a_signal_to_the_script_leaves_a_checkpoint_and_a_later_refusal_ends_with_2(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_tokens(tmp_path / "walk"), schedule={"steps": 20_000})
    run_dir = tmp_path / "run"
    process = torchrun_script(str(config))
    try:
        wait_until(lambda: len(read_metrics(run_dir)) >= 3, SECONDS, "three steps")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, said
    found = status(run_dir)
    assert found["state"] == "preempted"
    assert found["checkpoint"] == f"step-{found['step']:08d}"

    code, said = ended(str(config), "--optimizer.lr", "1e-3")
    assert "accept with --run.allow_change optimizer.lr" in said
    assert code == 2, "the older status says preempted, which is not how this start ended"
    assert status(run_dir) == found


@pytest.mark.parametrize(("settings", "code"), [((), 70), (("--preempted", "75"), 75)])
def test_a_stop_before_there_are_ranks(settings: tuple[str, ...], code: int) -> None:
    """The second node never comes: what is stopped is a patient preflight."""
    alone = ("--nodes", "2", "--node-rank", "0", "--master", "127.0.0.1", "--port", str(free_ports(1)[0]))
    process = torchrun_script(*alone, "--wait", "1", "--patience", "600", *settings, "configs/quickstart.toml")
    try:
        assert process.stdout is not None
        said = ""
        while "The preflight is tried again" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said + rest


@pytest.mark.parametrize(
    ("argv", "variables", "sentence"),
    [
        ([], {}, "No CONFIG.toml is given"),
        (["--node", "2", "c.toml"], {}, "--node is no setting"),
        (["--nodes", "none", "c.toml"], {}, "--nodes none: expected a number"),
        (["--nodes"], {}, "--nodes has no value"),
        (["--patience", "long", "c.toml"], {}, "--patience long: expected a whole number"),
        (["none.toml"], {}, "none.toml cannot be read"),
        (["--nodes", "2", "--node-rank", "0", "configs/quickstart.toml"], {}, "--master is missing"),
        (["configs/quickstart.toml"], {"NODES": "2", "MASTER_ADDR": "10.0.0.1"}, "--node-rank is missing"),
    ],
)
def test_what_is_missing_is_refused(argv: list[str], variables: dict[str, str], sentence: str) -> None:
    code, said = ended(*argv, **variables)
    assert (code, sentence in said) == (2, True), said


def test_a_scheduler_may_signal_any_process(tmp_path: Path) -> None:
    """Slurm signals every process of a job: of SIGUSR1 torchrun alone would die, and leave its ranks behind."""
    config = write_config(tmp_path, write_tokens(tmp_path / "walk"), schedule={"steps": 20_000})
    run_dir = tmp_path / "run"
    process = torchrun_script(str(config))
    started: list[psutil.Process] = []
    try:
        wait_until(lambda: len(read_metrics(run_dir)) >= 3, SECONDS, "three steps")
        started = psutil.Process(process.pid).children(recursive=True)
        os.kill(started[0].pid, signal.SIGUSR1)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        for left_behind in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                left_behind.kill()
    assert process.returncode == 0, said
    assert status(run_dir)["state"] == "preempted"


def test_help() -> None:
    code, said = ended("--help")
    assert code == 0
    assert "launch/torchrun.sh [SETTING ...] CONFIG.toml" in said


def test_the_run_folder_is_the_one_that_training_takes(tmp_path: Path) -> None:
    config = write_config(tmp_path, "none")
    assert run_folder(config, []) == str(tmp_path / "run")
    assert run_folder(config, ["--run.dir", "a", "--schedule.steps", "3", "--run.dir=b"]) == "b"
    assert run_folder(config, ["--run.dir=b", "--run.dir", "a"]) == "a"
    config.write_text("[run]\nseed = 1\n")
    with pytest.raises(ValueError, match="names no run folder"):
        run_folder(config, [])


@pytest.mark.parametrize(("codes", "expected"), [([70], 70), ([-15, 2], 2), ([-9, 70], 70), ([1], 70)])
def test_the_ending_of_ranks(codes: list[int], expected: int) -> None:
    assert ending(codes) == expected
