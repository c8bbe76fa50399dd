"""Runs whose feed-forwards are mixtures of experts: what they record, resume, write and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from model.hf import load
from tests.pool import Pool
from tests.trainer.conversions import done
from tests.trainer.runs import assert_twins, train, write_config, write_tokens
from trainer.diagnostics import unchosen
from trainer.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("in_this_process")
MOE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert": "swiglu", "bias_rate": 0.001}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


def configured(folder: Path, data: str, moe: Mapping[str, Any] = {}, **sections: Any) -> Path:
    return write_config(folder, data, feedforwards={"moe": MOE | dict(moe)}, **sections)


def test_a_run_with_experts_on_two_processes(pool: Pool, data: str, tmp_path: Path) -> None:
    """Its curve is that of one process, its checkpoint whole, and its report shows who chose whom."""
    config, alone = configured(tmp_path, data, metrics={"diagnose_every_steps": 5}), tmp_path / "alone"
    results = pool.run(train, 2, config, "--parallel.ep", "2")
    assert [code for code, _ in results] == [0, 0], results
    ((code, said),) = pool.run(train, 1, config, "--run.dir", str(alone))
    assert code == 0, said
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(alone)
    for one, two in zip(ours, theirs, strict=True):
        # After updates, rounding may choose another expert for a token whose scores are nearly alike.
        bound = 1e-5 if one["step"] == 1 else 5e-3
        for key in ("loss", "expert_balance_loss", "router_z_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=bound), key
        assert one["total_loss"] == pytest.approx(one["loss"] + one["expert_balance_loss"] + one["router_z_loss"])
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5
    loads = ours[-1]["diagnostics"]["expert_load"]
    assert all(sum(row) == pytest.approx(2, rel=1e-4) for row in loads)
    assert ours[-1]["expert_load_min"] == pytest.approx(min(map(min, loads)), rel=1e-4)
    assert ours[-1]["expert_load_max"] == pytest.approx(max(map(max, loads)), rel=1e-4)
    done("report", str(tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="heat-experts"' in page and "Least load of an expert" in page
    # The numbers that choose have moved, and go out with the weights.
    done("convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "headway")
    trained, again = load(tmp_path / "run")[0], load(tmp_path / "hf")[0]
    assert trained.get_parameter("layers.0.feedforward.router.selection_bias").abs().max() > 0
    for name, parameter in trained.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    done("eval", str(tmp_path / "hf"), "--data", data, "--seq-len", "32")


def test_it_resumes_bit_for_bit_where_experts_are_spread(pool: Pool, data: str, tmp_path: Path) -> None:
    (tmp_path / "stopped").mkdir()
    twin, stopped = (configured(folder, data, parallel={"ep": 2}) for folder in (tmp_path, tmp_path / "stopped"))
    for config, steps in ((twin, ("10",)), (stopped, ("3", "10"))):
        for step in steps:
            results = pool.run(train, 2, config, "--run.stop_at_step", step)
            assert [code for code, _ in results] == [0] * 2, results
    assert_twins(tmp_path / "stopped" / "run", tmp_path / "run")


def test_an_expert_that_nobody_chooses_is_named(
    pool: Pool, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(
        tmp_path,
        data,
        {"router_init_std": 0.0, "bias_rate": 0.0},  # Of equal scores, the first.
        metrics={"diagnose_every_steps": 1},
        schedule={"steps": 1, "warmup_steps": 0},
        optimizer={"lr": 0.0},
    )
    ((code, said),) = pool.run(train, 1, config)
    assert code == 0, said
    (record,) = read_metrics(tmp_path / "run")
    assert record["diagnostics"]["expert_load"] == [[1, 1, 0, 0]] * 2 and record["expert_load_min"] == 0
    (sentence,) = unchosen(record)
    assert "chose experts 2, 3 of layer 0; 2, 3 of layer 1: raise balance_weight of the feed-forward" in sentence
    done("diagnose", str(tmp_path / "run"), "--rows", "2")
    printed = " ".join(capsys.readouterr().out.split())
    assert "chose experts 2, 3 of layer 0" in printed and "expert_load_min 0" in printed


def test_what_cannot_be_is_refused_at_once(pool: Pool, data: str, tmp_path: Path) -> None:
    config = configured(tmp_path, data, {"num_experts": 3})
    ((code, said), *_) = pool.run(train, 2, config, "--parallel.ep", "2", "--schedule.steps", "0")
    assert code == 2
    assert (
        "parallel.ep = 2 does not divide feedforwards.moe.num_experts = 3: the largest ep that fits this model is 1"
        in said
    )
    assert "schedule.steps = 0" in said
    assert not (tmp_path / "run").exists()
