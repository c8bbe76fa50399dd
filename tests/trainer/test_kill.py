"""kill -9: of a rank between saves, and of the writer at every stage of a save. Real processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.folders import newest_complete, step_folder
from tests.pool import Pool
from tests.trainer.runs import assert_twins, headway, status, train, write_config, write_tokens
from trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SECONDS = 120

# Stages of the second save, after which the process is killed: a statement to be run in it, and whether the newest
# complete checkpoint is then the second one.
STAGES = {
    "before the first byte": ("before(checkpoint.dcp, 'async_save')", False),
    "between shards and manifest": ("before(checkpoint, 'describe_files')", False),
    "between manifest and rename": ("before(checkpoint.os, 'replace')", False),
    "before the older one is deleted": ("before(checkpoint.CheckpointWriter, '_delete_old')", True),
    "while the older one is deleted": ("before(checkpoint.shutil, 'rmtree', where='step-00000001')", True),
}

SAVE_TWICE = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from trainer import checkpoint
from trainer.config import CheckpointConfig

def before(owner, name, where=""):
    plain = getattr(owner, name)
    def killed(*args, **kwargs):
        if where in str(args) and not str(args[0] if args else "").endswith(".partial") or not where:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(owner, name, killed)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = CheckpointConfig(keep_last=1)
writer = checkpoint.CheckpointWriter(Path(sys.argv[1]), config, lambda folder: {}, lambda *a, **k: None)
writer.save({"model": {"weight": torch.full((1000,), 1.0)}}, 1)
writer.wait()
exec(sys.argv[2])
writer.save({"model": {"weight": torch.full((1000,), 2.0)}}, 2)
writer.close()
sys.exit("nothing killed it")
"""


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_stage_of_a_save(tmp_path: Path, stage: str) -> None:
    statement, second_is_complete = STAGES[stage]
    command = [sys.executable, "-c", SAVE_TWICE, str(tmp_path), statement]
    done = subprocess.run(command, cwd=ROOT, timeout=SECONDS, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest, _ = newest_complete(tmp_path)
    assert newest == step_folder(tmp_path, 2 if second_is_complete else 1)


@pytest.mark.parametrize("moment", ["between saves", "during a save"])
def test_a_killed_rank_ends_the_others_and_the_run_continues(pool: Pool, tmp_path: Path, moment: str) -> None:
    prefix = write_tokens(tmp_path / "walk")
    (tmp_path / "twin").mkdir()
    twin = write_config(tmp_path / "twin", prefix)
    results = pool.run(train, 2, twin)
    assert [code for code, _ in results] == [0, 0], results
    config = write_config(tmp_path, prefix, schedule={"steps": 10, "warmup_steps": 2})
    run_dir = tmp_path / "run"
    kill_when = {"between saves": ("TrainingData.batch", 7), "during a save": ("CheckpointWriter._finish", 2)}[moment]
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(ROOT / "tests/trainer/killed_rank.py"), str(config), *map(str, kill_when)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - began < SECONDS / 2, "the other rank hung"
    assert newest_complete(run_dir)[0] == step_folder(run_dir, 4)
    assert status(run_dir)["state"] == "failed", "the first rank outlives the killed one and says so"
    assert 4 <= len(read_metrics(run_dir)) < 10
    results = pool.run(train, 2, config)
    assert [code for code, _ in results] == [0, 0], results
    assert_twins(run_dir, tmp_path / "twin" / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.matrix)])
def test_a_signal_to_one_rank_under_torchrun_ends_it_within_30_seconds(tmp_path: Path, number: signal.Signals) -> None:
    config = write_config(tmp_path, write_tokens(tmp_path / "walk"), schedule={"steps": 20_000})
    run_dir = tmp_path / "run"
    torchrun = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "trainer", "train", str(config)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < 3:
            assert time.monotonic() < deadline, "training did not begin"
            assert torchrun.poll() is None, "training ended by itself"
            time.sleep(0.1)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        ranks = [int(child) for child in children if b"trainer" in Path(f"/proc/{child}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(ranks[-1], number)
        assert torchrun.wait(timeout=30) == 0
    finally:
        if torchrun.poll() is None:
            torchrun.kill()
    found = status(run_dir)
    assert found["state"] == "preempted"
    assert found["checkpoint"] == f"step-{found['step']:08d}"
    assert len(read_metrics(run_dir)) == found["step"]
    assert newest_complete(run_dir)[0] == step_folder(run_dir, found["step"])


def test_the_console_command_refuses_in_sentences(tmp_path: Path) -> None:
    code, said = headway("train", str(tmp_path / "none.toml"))
    assert code == 2
    assert "does not exist" in said
