"""Runs by DeepSpeed's engine: resume, the other engine, export, skipped steps, signals; and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from model.folders import step_folder
from model.hf import load
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults
from parallel.zero_config import ZeroConfig, _reads_asynchronously, engine_tables
from tests.conformance.models import architecture
from tests.pool import Pool
from tests.trainer.runs import (
    NotFinite,
    Signalled,
    assert_twins,
    curve,
    headway,
    status,
    stored,
    train,
    write_config,
    write_tokens,
)
from trainer.config import Refused, config_from_tables

CLOSE = 1e-5
"""Of losses and norms by the other engine, in fp32."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def config(folder: Path, prefix: str, stage: int | None = 2, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parallel = {"engine": "deepspeed", "zero_stage": stage} if stage else {}
    return write_config(folder, prefix, **({"parallel": parallel | sections.pop("parallel", {})} | sections))


def run(pool: Pool, world_size: int, path: Path, *overrides: str, patch: Any = None) -> Path:
    """Train; the run folder."""
    ended = pool.run(train, world_size, path, *overrides, patch=patch)
    assert [code for code, _ in ended] == [0] * world_size, ended
    return path.parent / "run"


def assert_close(ours: Path, theirs: Path) -> None:
    """Losses, norms and validation losses to rounding, and all that is counted exactly."""
    for mine, other in zip(curve(ours), curve(theirs), strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a == b or a == pytest.approx(b, rel=CLOSE), (mine, other)


OFFLOADED = {"offload_optimizer": "cpu", "offload_parameters": "cpu", "microbatches": 2}


@pytest.mark.parametrize(
    ("stage", "precision", "settings"),
    [
        (1, "bf16", {}),
        (2, "fp32", {"offload_optimizer": "cpu"}),
        (2, "bf16", {"microbatches": 2}),
        (3, "bf16", OFFLOADED),
    ],
)
def test_a_resumed_run_is_its_twin(
    pool: Pool, data: str, tmp_path: Path, stage: int, precision: str, settings: dict[str, Any]
) -> None:
    sections = {"run": {"precision": precision}, "data": {"validate_every_steps": 5}, "parallel": settings}
    twin = run(pool, 2, config(tmp_path / "twin", data, stage, **sections))
    path = config(tmp_path / "stopped", data, stage, **sections)
    for stop in ("3", "7", "10"):
        stopped = run(pool, 2, path, "--run.stop_at_step", stop)
    assert_twins(stopped, twin)


def test_a_signal_to_one_rank_stops_all(pool: Pool, data: str, tmp_path: Path) -> None:
    twin = run(pool, 2, config(tmp_path / "twin", data, 3))
    path = config(tmp_path / "stopped", data, 3)
    # In the fourth step, when gradients are there.
    stopped = run(pool, 2, path, patch=Signalled(signal.SIGTERM, 1, "parallel.spread", "gradient_norm", call=4))
    assert status(stopped)["state"] == "preempted"
    assert status(stopped)["step"] < 10
    run(pool, 2, path)
    assert_twins(stopped, twin)


@pytest.mark.parametrize(
    ("first", "second"),
    [((None, 2), (3, 2)), ((3, 2), (None, 1)), ((1, 2), (2, 4)), ((2, 4), (None, 2))],
    ids=["torch to ZeRO 3", "ZeRO 3 to torch", "ZeRO 1 on 2 to ZeRO 2 on 4", "ZeRO 2 on 4 to torch on 2"],
)
def test_either_engine_goes_on_from_the_other(
    pool: Pool, data: str, tmp_path: Path, first: tuple[int | None, int], second: tuple[int | None, int]
) -> None:
    whole = run(pool, 1, config(tmp_path / "whole", data, None))
    (stage, processes), (other_stage, other_processes) = first, second
    crossed = run(pool, processes, config(tmp_path / "crossed", data, stage), "--run.stop_at_step", "5")
    at_five = stored(crossed, 5)
    run(pool, other_processes, config(tmp_path / "crossed", data, other_stage))
    assert_close(crossed, whole)
    ours, theirs = stored(crossed, 10), stored(whole, 10)
    assert ours.keys() == theirs.keys() == at_five.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), rtol=1e-3, atol=1e-6), name
    moved = [name for name, tensor in ours.items() if not torch.equal(tensor, at_five[name])]
    assert len(moved) == len(ours) - sum(name.startswith("counters.skipped") for name in ours)


def test_an_export_is_that_of_torch(pool: Pool, data: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    only = {"model": {"pattern": ["softmax"]}}
    torch_s = run(pool, 2, config(tmp_path / "torch", data, None, **only))
    zero_s = run(pool, 2, config(tmp_path / "zero", data, 3, **only))
    tokens = torch.arange(20)[None]
    logits = []
    for folder in (torch_s, zero_s):
        code, said = headway("convert", "to-hf", str(folder), str(folder / "hf"), "--tokenizer", "none")
        assert code == 0, said
        model = AutoModelForCausalLM.from_pretrained(folder / "hf")
        logits.append(model(tokens).logits)
        assert torch.allclose(logits[-1], load(folder)[0](tokens), atol=1e-4)
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_that_three_processes_cannot_share_evenly(pool: Pool, data: str, tmp_path: Path, stage: int) -> None:
    sections: dict[str, Any] = {"data": {"global_batch_size": 6}, "schedule": {"steps": 4, "warmup_steps": 1}}
    torch_s = run(pool, 1, config(tmp_path / "torch", data, None, **sections))
    path = config(tmp_path / "zero", data, stage, **sections)
    ours = run(pool, 3, path, "--run.stop_at_step", "2")
    run(pool, 3, path)
    assert_close(ours, torch_s)


def test_experts_are_balanced_as_by_torch(pool: Pool, data: str, tmp_path: Path) -> None:
    """What is added to their scores is no gradient's, and moves after each update."""
    moe = {"num_experts": 4, "top_k": 2, "bias_rate": 0.01, "expert": "swiglu"}
    only: dict[str, Any] = {"feedforwards": {"moe": moe}, "model": {"feedforward_pattern": ["moe"]}}
    only["schedule"] = {"steps": 3, "warmup_steps": 1}
    folders = [run(pool, 2, config(tmp_path / f"{stage}", data, stage, **only)) for stage in (None, 3)]
    ours, theirs = (stored(folder, 3) for folder in folders)
    biases = [name for name in ours if name.startswith("model.") and name.endswith("selection_bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].abs().max() > 0.005, "it has hardly moved"


def test_a_process_alone_needs_no_launcher(pool: Pool, data: str, tmp_path: Path) -> None:
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = config(tmp_path / "zero", data, 3)
    command = [sys.executable, "-m", "trainer", "train", str(path), "--run.precision", "bf16"]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    theirs = run(pool, 1, config(tmp_path / "torch", data, None), "--run.precision", "bf16")
    assert_close(tmp_path / "zero" / "run", theirs)


def test_it_begins_with_the_weights_of_another(pool: Pool, data: str, tmp_path: Path) -> None:
    first = run(pool, 1, config(tmp_path / "first", data, None))
    ours, theirs = (
        run(pool, 2, config(tmp_path / name, data, stage, model={"init_from": str(first)}), "--run.stop_at_step", "2")
        for name, stage in (("ours", 3), ("theirs", None))
    )
    assert_close(ours, theirs)
    assert curve(ours)[0][1] < curve(first)[0][1] - 0.1


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        *((1, precision, offload) for precision, offload in (("bf16", "none"), ("bf16", "cpu"), ("fp32", "cpu"))),
        *(
            (stage, precision, offload)
            for stage in (2, 3)
            for precision, offload in (("fp32", "none"), ("bf16", "cpu"))
        ),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(
    pool: Pool, data: str, tmp_path: Path, stage: int, precision: str, offload: str
) -> None:
    """Neither masters nor moments notice; the run is torch's, which skips the same step."""
    sections: dict[str, Any] = {"schedule": {"steps": 5, "warmup_steps": 1}, "checkpoint": {"every_steps": 0}}
    sections["run"] = {"precision": precision}
    poisoned = NotFinite(1, (3,))
    torch_s = run(pool, 2, config(tmp_path / "torch", data, None, **sections), patch=poisoned)
    zero = config(tmp_path / "zero", data, stage, parallel={"offload_optimizer": offload}, **sections)
    ours = run(pool, 2, zero, patch=poisoned)
    assert [record[9] for record in curve(ours)] == [False, False, True, False, False]
    assert_close(ours, torch_s)
    for name, tensor in stored(ours, 5).items():
        assert tensor.isfinite().all(), name


def test_parameters_that_were_updated_less_often_are_refused(pool: Pool, data: str, tmp_path: Path) -> None:
    path = config(tmp_path / "run", data, None)
    run(pool, 1, path, "--run.stop_at_step", "3", "--run.freeze", "layers.0.*")
    run(pool, 1, path, "--run.stop_at_step", "5")
    path = config(tmp_path / "run", data, 2)
    for code, said in pool.run(train, 2, path):
        assert code == 2
        assert "has been updated" in said and 'engine = "torch"' in said, said


@pytest.mark.cluster
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizer_states_wait_on_a_disk(pool: Pool, data: str, tmp_path: Path, precision: str) -> None:
    """Large partitions are there and small ones are not; clipping is at work, a step is skipped, and it resumes."""
    if not _reads_asynchronously():
        pytest.skip("DeepSpeed's async_io does not build here: it needs libaio and its headers (libaio-dev)")
    # Compiled here, for minutes, so that no process waits for another that compiles.
    build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, timeout=1500)
    (tmp_path / "disk").mkdir()
    sections: dict[str, Any] = {
        "run": {"precision": precision},
        "model": {"d_model": 192},
        "feedforwards": {"swiglu": {"d_ff": 512}},
        "optimizer": {"grad_clip": 0.05},
        "schedule": {"steps": 6, "warmup_steps": 1},
    }
    poisoned = NotFinite(1, (2,))
    torch_s = run(pool, 2, config(tmp_path / "torch", data, None, **sections), patch=poisoned)
    on_disk = {"offload_optimizer": "nvme", "nvme_dir": str(tmp_path / "disk"), "microbatches": 2}
    path = config(tmp_path / "zero", data, 3, parallel=on_disk, **sections)
    ours = run(pool, 2, path, "--run.stop_at_step", "3", patch=NotFinite(1, (3,)))
    assert list((tmp_path / "disk").rglob("*.swp"))
    run(pool, 2, path)
    twin = run(pool, 2, config(tmp_path / "twin", data, 3, parallel=on_disk, **sections), patch=NotFinite(1, (3,)))
    assert_twins(ours, twin, step=6)
    assert [record[9] for record in curve(ours)] == [False, True, False, False, False, False]
    if precision == "fp32":
        assert_close(ours, torch_s)


# What is refused.


def zero_tables(tmp_path: Path, theirs: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    tables = tomllib.loads(write_config(tmp_path, "nowhere").read_text())
    tables["parallel"] = {"engine": "deepspeed"}
    if theirs is not None:
        (tmp_path / "ds.json").write_text(json.dumps(theirs))
        tables["parallel"]["deepspeed_config"] = str(tmp_path / "ds.json")
    for name, section in sections.items():
        tables[name] = tables.get(name, {}) | section
    return tables


def refusal(tables: dict[str, Any], world_size: int = 2) -> str:
    with pytest.raises(Refused) as refused:
        config_from_tables(tables, world_size=world_size)
    return str(refused.value)


def test_all_that_does_not_go_together_is_said_at_once(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_com": True, "offload_optimizer": {"device": "nvme"}},
        "optimizer": {"type": "Lamb", "params": {"lr": 0.5, "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupLR"},
        "zero_hpz_partition_size": 8,
    }
    tables = zero_tables(
        tmp_path,
        theirs,
        parallel={"zero_stage": 3, "tp": 2, "offload_optimizer": "cpu"},
        optimizer={"kind": "muon"},
        run={"precision": "fp32", "freeze": ["embedding.weight"]},
    )
    said = refusal(tables, world_size=4)
    for sentence in (
        'parallel.tp = 2 with engine = "deepspeed" (ZeRO 3)',
        'optimizer.kind = "muon"',
        'run.freeze = ["embedding.weight"]',
        "train_batch_size = 12, but data.global_batch_size = 8.",
        "gradient_accumulation_steps = 2, but parallel.microbatches = 1.",
        "gradient_clipping = 0.5, but optimizer.grad_clip = 1.0.",
        'bf16.enabled = true, but run.precision = "fp32".',
        "zero_optimization.stage = 2, but parallel.zero_stage = 3.",
        'zero_optimization.offload_optimizer.device = "nvme", but parallel.offload_optimizer = "cpu".',
        "the nearest key is overlap_comm",
        'optimizer.type = "Lamb", but optimizer.kind = "muon".',
        "optimizer.params.lr = 0.5, but optimizer.lr = 0.01.",
        "optimizer.params.betas = [0.9, 0.999], but optimizer.betas = [0.9, 0.95].",
        "scheduler: [schedule] decides that",
        "zero_hpz_partition_size = 8 is nothing that is handed on",
    ):
        assert sentence in said, f"{sentence}\n---\n{said}"
    assert said.count("\n  - ") == 15


def test_a_json_that_agrees_is_taken(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale_window": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 1234,
            "stage3_prefetch_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
        },
        "wall_clock_breakdown": False,
    }
    tables = zero_tables(tmp_path, theirs, parallel={"microbatches": 2})
    found = config_from_tables(tables, world_size=2)
    assert found.parallel.zero_stage == 0
    zero = ZeroConfig(3, "cpu", theirs=theirs)
    told = engine_tables(zero, "fp32", 2, 2)
    assert told["zero_optimization"]["reduce_bucket_size"] == 1234
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "stage3_prefetch_bucket_size" not in told["zero_optimization"]
    assert not {"scheduler", "optimizer", "fp16", "train_batch_size"} & told.keys()
    assert told["gradient_clipping"] == 0.0


def test_a_json_is_used(pool: Pool, data: str, tmp_path: Path) -> None:
    """A small bucket and a threshold under which parameters are kept change no number of the curve."""
    theirs = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_size": 700, "stage3_param_persistence_threshold": 600, "sub_group_size": 900}
    theirs.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 1.0}))
    torch_s = run(pool, 2, config(tmp_path / "torch", data, None))
    path = config(tmp_path / "zero", data, None, parallel={"engine": "deepspeed", "deepspeed_config": str(theirs)})
    ours = run(pool, 2, path, "--run.stop_at_step", "5")
    run(pool, 2, path)
    assert_close(ours, torch_s)
    assert len(stored(ours, 10)) == len(stored(torch_s, 10))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    tables = zero_tables(tmp_path, {})
    tables["parallel"]["deepspeed_config"] = str(tmp_path / "none.json")
    assert "none.json" in refusal(tables) and "cannot be read" in refusal(tables)
    (tmp_path / "none.json").write_text("[1]")
    assert "expected an object" in refusal(tables)
    (tmp_path / "none.json").write_text("{")
    assert "is not JSON" in refusal(tables)


def test_other_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(zero_tables(tmp_path, run={"precision": "fp64"}, reparam={"kind": "sigma"}))
    assert 'run.precision = "fp64"' in said and 'reparam.kind = "sigma"' in said
    said = refusal(zero_tables(tmp_path, parallel={"offload_parameters": "cpu", "dp_replicate": 2}))
    assert "needs zero_stage = 3, and it is 2" in said and "parallel.dp_replicate = 2" in said
    said = refusal(zero_tables(tmp_path, parallel={"offload_optimizer": "nvme"}))
    assert 'needs zero_stage = 3, and it is 2: take "cpu"' in said and "needs parallel.nvme_dir" in said
    said = refusal(zero_tables(tmp_path, run={"compile": True}, parallel={"zero_stage": 3}))
    assert "take compile = false, or zero_stage = 2" in said
    said = refusal(zero_tables(tmp_path, parallel={"engine": "torch", "zero_stage": 1, "offload_optimizer": "cpu"}))
    assert 'parallel.zero_stage = 1 is DeepSpeed\'s: set parallel.engine = "deepspeed"' in said
    assert "parallel.offload_optimizer" in said
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = ParallelConfig(engine="deepspeed")
    (said,) = layout_faults(config, 2, architecture("softmax"), seq_len=8, global_batch_size=4)
    assert "DeepSpeed is not installed" in said


def test_a_plan_says_what_it_does_not_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, "nowhere", 3)
    assert headway("plan", str(path), "--world", "4") == (0, "")
    assert "The layout is legal: ZeRO 3 over 4 processes." in capsys.readouterr().out
    assert headway("plan", str(path), "--world", "4", "--json")[0] == 0
    assert json.loads(capsys.readouterr().out)["zero_stage"] == 3
    code, said = headway("plan", str(path), "--world", "3")
    assert code == 2 and "cannot be cut" in said


def test_it_is_written_where_a_run_stands(pool: Pool, data: str, tmp_path: Path) -> None:
    """Attention statistics, validation and checkpoints are as torch's."""
    sections = {"metrics": {"diagnose_every_steps": 5}, "data": {"validate_every_steps": 5}}
    torch_s = run(pool, 2, config(tmp_path / "torch", data, None, **sections))
    ours = run(pool, 2, config(tmp_path / "zero", data, 3, **sections))
    assert_close(ours, torch_s)
    assert step_folder(ours, 8).is_dir()
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (ours, torch_s)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    keys = [key for key in lines[0][4] if "entropy" in key]
    assert keys
    for key in keys:
        assert lines[0][4][key] == pytest.approx(lines[1][4][key], rel=1e-4), key
