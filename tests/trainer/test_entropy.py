"""A run that is trained on attention entropies beside the cross-entropy: its records, its checkpoints, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pool import Pool
from tests.trainer.runs import assert_twins, stored, train, write_config, write_tokens
from trainer.metrics import read_metrics

NAME = "layers.1.mixer.entropy_threshold"
OBJECTIVE = {"entropy_weight": 0.2, "entropy_margin": 0.05, "entropy_threshold_lr": 0.05}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


def run(pool: Pool, prefix: str, folder: Path, *overrides: str, **sections: dict[str, Any]) -> Path:
    """Trained by two processes, each with half of the rows."""
    folder.mkdir(exist_ok=True)
    config = write_config(folder, prefix, **{"data": {"validate_every_steps": 5, "validation_batches": 2}} | sections)
    results = pool.run(train, 2, config, *overrides)
    assert [code for code, _ in results] == [0, 0], "\n".join(said for _, said in results)
    return folder / "run"


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.matrix)])
def test_it_resumes_bit_for_bit_with_its_thresholds(pool: Pool, prefix: str, tmp_path: Path, optimizer: str) -> None:
    sections = {"objective": OBJECTIVE, "optimizer": {"kind": optimizer, "lr": 0.01}}
    twin = run(pool, prefix, tmp_path / "twin", **sections)
    for step in ("3", "7", "10"):
        stopped = run(pool, prefix, tmp_path / "stopped", "--run.stop_at_step", step, **sections)
    assert_twins(stopped, twin)
    thresholds = stored(twin, 10)[f"beside.{NAME}"]
    assert thresholds.shape == (2,) and (thresholds != 0.5).all()
    assert stored(twin, 10)[f"optimizer.{NAME}.step"] == 10
    assert not [name for name in stored(twin, 10) if "layers.0" in name and "threshold" in name], "Lightning has none"


def test_records_have_it_under_its_own_name(pool: Pool, prefix: str, tmp_path: Path) -> None:
    plain = read_metrics(run(pool, prefix, tmp_path / "plain"))
    assert not [record for record in plain if {"entropy_loss", "total_loss"} & record.keys()]
    assert not [name for name in stored(tmp_path / "plain" / "run", 10) if name.startswith("beside.")]
    records = read_metrics(run(pool, prefix, tmp_path / "it", objective=OBJECTIVE))
    # The first step begins with the same weights.
    assert records[0]["loss"] == plain[0]["loss"]
    assert records[0]["entropy_loss"] > 0
    assert records[0]["grad_norm"] != plain[0]["grad_norm"]
    for record in records:
        assert record["total_loss"] == record["loss"] + record["entropy_loss"]
    assert records[-1]["entropy_loss"] < 0.5 * records[0]["entropy_loss"]


def test_it_may_begin_and_end_on_resume(pool: Pool, prefix: str, tmp_path: Path) -> None:
    """Where it is asked for: thresholds begin where they do; what a run without it finds of them is left unread."""
    allowed = ("--run.allow_change", "objective.entropy_weight")
    settings = OBJECTIVE | {"entropy_threshold_lr": 0.0}
    for weight, step in ((0.0, "3"), (0.2, "7"), (0.0, "10")):
        objective = settings | {"entropy_weight": weight}
        folder = run(pool, prefix, tmp_path / "it", *allowed, "--run.stop_at_step", step, objective=objective)
    assert torch.equal(stored(folder, 7)[f"beside.{NAME}"], torch.full((2,), 0.5))
    assert stored(folder, 7)[f"optimizer.{NAME}.step"] == 4
    assert f"beside.{NAME}" not in stored(folder, 10)
    with_it = [record["step"] for record in read_metrics(folder) if "entropy_loss" in record]
    assert with_it == [4, 5, 6, 7]


def test_a_threshold_may_be_frozen(pool: Pool, prefix: str, tmp_path: Path) -> None:
    folder = run(pool, prefix, tmp_path / "it", "--run.freeze", "*.entropy_threshold", objective=OBJECTIVE)
    assert torch.equal(stored(folder, 10)[f"beside.{NAME}"], torch.full((2,), 0.5))
    assert f"optimizer.{NAME}.step" not in stored(folder, 10)
