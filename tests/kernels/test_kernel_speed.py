"""The benchmark of kernels runs, at sizes that say nothing: checks, every arm or why not, and a line for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def measured(tmp_path: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    out = tmp_path / "kernels.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_speed.py"), "--device", "cpu", "--rounds", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "--out", str(out), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ran.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_operations_are_checked_and_timed(tmp_path: Path) -> None:
    said, rows = measured(tmp_path, "--only", "lightning", "gated attention", "sigmoid attention")
    checked = [row for row in rows if row.get("check")]
    timed = [row for row in rows if not row.get("check")]
    assert {row["operation"] for row in checked} == {"lightning", "gated attention", "sigmoid attention"}
    assert all(row["right"] and row["error"] < 2e-5 for row in checked), checked
    assert "nothing" in said.splitlines()[-1]
    for row in timed:
        assert ("reason" in row) != (row.get("both_ms", 0) > 0), row
        assert row["hardware"]["cores"] and row["versions"]["torch"] and row["date"]
    ran = {(row["operation"], row["arm"]) for row in timed if "reason" not in row}
    assert {("lightning", "headway"), ("lightning", "portable"), ("gated attention", "1/2")} <= ran
    # What computes the same gives the same.
    assert all(row["apart_from_ours"] < 1e-5 for row in timed if "apart_from_ours" in row)


def test_when_the_time_is_over_the_rest_is_named(tmp_path: Path) -> None:
    said, rows = measured(tmp_path, "--minutes", "0", "--only", "lightning")
    assert all(row.get("check") for row in rows)
    assert "left out for want of time: lightning length=16" in said


def test_what_is_wrong_is_seen_and_not_timed(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_speed

    import kernels.lightning

    plain = kernels.lightning.lightning_attention
    monkeypatch.setattr(
        kernels.lightning,
        "lightning_attention",
        lambda q, k, v, slopes, **more: plain(q, k, v, slopes * 1.01, **more),
    )
    out = tmp_path / "kernels.jsonl"
    argv = ["kernel_speed", "--device", "cpu", "--only", "lightning", "--out", str(out), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    assert kernel_speed.main() == 1
    assert "wrong, and not timed: lightning" in capsys.readouterr().out
    assert all(row["check"] and not row["right"] for row in map(json.loads, out.read_text().splitlines()))


def test_errors_are_those_of_outputs_and_gradients(scripts: None) -> None:
    from kernel_checks import errors

    x = torch.randn(7, requires_grad=True)
    found = errors([x], lambda x: x * 1.5, lambda x: x)["errors"]
    assert found == {"out": pytest.approx(0.5), "d0": pytest.approx(0.5)}
