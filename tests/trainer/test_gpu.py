"""The same code on a GPU: NCCL beside gloo, bf16 with fp32 masters, resumed bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.runs import assert_twins, status, write_config, write_tokens
from trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def torchrun(config: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "trainer"]
    # cuBLAS is deterministic only with a workspace of fixed size.
    environment = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    whole = [*command, "train", str(config), "--run.deterministic", "true", *overrides]
    subprocess.run(whole, cwd=ROOT, env=environment, timeout=300, check=True)


@pytest.mark.gpu
def test_a_gpu_trains_resumes_and_stays_near_the_cpu(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "walk")
    folders = {name: tmp_path / name for name in ("twin", "resumed", "cpu")}
    for folder in folders.values():
        folder.mkdir()
    bf16 = {"precision": "bf16"}
    configs = {
        name: write_config(folder, prefix, run=bf16 | {"dir": str(folder / "run")}) for name, folder in folders.items()
    }
    torchrun(configs["twin"])
    torchrun(configs["resumed"], "--run.stop_at_step", "3")
    torchrun(configs["resumed"])
    assert_twins(folders["resumed"] / "run", folders["twin"] / "run")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "trainer", "train", str(configs["cpu"]), "--run.precision", "fp32"]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=True)
    for ours, theirs in zip(read_metrics(folders["twin"] / "run"), read_metrics(folders["cpu"] / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)


@pytest.mark.gpu
def test_memory_that_ends_on_a_gpu_is_said_with_figures_and_remedies(tmp_path: Path) -> None:
    model = {"d_model": 2048, "num_layers": 8}
    config = write_config(tmp_path, write_tokens(tmp_path / "walk"), model=model, run={"dir": str(tmp_path / "run")})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with_little_memory = (
        "import sys, torch, trainer.cli; torch.cuda.set_per_process_memory_fraction(0.005); "
        "sys.exit(trainer.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", with_little_memory, "train", str(config)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=200, check=False, capture_output=True, text=True)
    assert ended.returncode == 70, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    print(last)
    for words in ("CUDA out of memory", "GiB of tensors at its peak, on a GPU of", "A plan of this layout says"):
        assert words in last
    assert status(tmp_path / "run")["state"] == "failed"
