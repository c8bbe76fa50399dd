"""Memory that ends during training ends the run with what was planned, what was found, and what needs less."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from parallel.processes import Process
from parallel.spread import Spread
from parallel.watch import LostNode
from tests.pool import Pool
from tests.trainer.runs import status, train, write_config, write_tokens
from trainer.config import load_config
from trainer.planning.out_of_memory import OutOfMemory, explain, is_out_of_memory
from trainer.status import Status

FIGURE = r"\d+\.\d\d GiB"


def too_much(*_: Any) -> float:
    """An allocation that torch's CPU allocator refuses."""
    return torch.empty(2**55, dtype=torch.uint8).sum().item()


def memory_ends() -> Any:
    """Training in which there is too little of it."""
    return patch.object(Spread, "train", too_much)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    model = {"pattern": ["softmax"], "num_layers": 2}
    return write_config(tmp_path, write_tokens(tmp_path / "walk"), model=model)


def test_the_run_fails_with_figures_and_remedies(config_file: Path, pool: Pool) -> None:
    ((code, said),) = pool.run(train, 1, config_file, patch=memory_ends)
    assert code == 70
    last = said.strip().splitlines()[-1]
    found = status(config_file.parent / "run")
    assert found["state"] == "failed"
    assert found["reason"].startswith("rank 0, step 0: OutOfMemory: Memory has ended")
    for text in (last, found["reason"]):
        assert "can't allocate memory" in text
        assert re.search(rf"Rank 0 held {FIGURE} at its peak", text)
        assert re.search(rf"plan of this layout says {FIGURE}", text)
        remedies = text.partition("Less is needed with ")[2].split("; or ")
        assert [remedy.partition(":")[0] for remedy in remedies] == [
            "--parallel.microbatches 2",
            "--parallel.recompute selective",
            "--parallel.recompute full",
        ]
        assert all(re.search(FIGURE, remedy) for remedy in remedies)


def test_a_plan_that_cannot_be_made_leaves_the_remedies(config_file: Path) -> None:
    config = load_config(config_file, world_size=1)
    process = Process(rank=0, local_rank=0, world_size=1, device_type="cpu")
    said = explain(MemoryError("no room"), config, "fp32", process, seconds=0.01)
    assert "The plan is not complete: it was not done in 0.01 s." in said
    assert "--parallel.microbatches 2; or --parallel.recompute selective" in said
    # There is no run folder yet, so no configuration in it.
    said = explain(MemoryError("no room"), config, "fp32", process)
    assert "The plan is not complete: " in said
    assert "config.toml does not exist" in said
    assert "--parallel.microbatches 2; or --parallel.recompute selective" in said


def test_only_what_comes_of_memory_is_taken_for_it() -> None:
    try:
        try:
            too_much()
        except RuntimeError as error:
            raise RuntimeError("stage 1 failed") from error
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def rank(number: int) -> Process:
    return Process(number, number, 2, "cpu")


def test_the_first_rank_leaves_the_cause_that_another_has_written(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    first, other = Status(tmp_path, is_first=True), Status(tmp_path, is_first=False)
    first.set("running")
    other.step = 7
    other.fail(rank(1), OutOfMemory("much"), is_cause=True)
    assert status(tmp_path)["reason"] == "rank 1, step 7: OutOfMemory: much"
    first.fail(rank(0), RuntimeError("Connection closed by peer"))
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("failed", "rank 1, step 7: OutOfMemory: much")


def test_what_an_earlier_start_failed_of_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    Status(tmp_path, is_first=True).fail(rank(0), RuntimeError("then"))
    Status(tmp_path, is_first=True).fail(rank(0), RuntimeError("now"))
    assert status(tmp_path)["reason"] == "rank 0, step 0: RuntimeError: now"


def test_the_first_rank_that_speaks_a_moment_later_is_not_written_over(tmp_path: Path) -> None:
    """Two nodes whose cable is cut: the second finds the run "running", and only then the first says that it failed."""
    (tmp_path / "logs").mkdir()
    first, other = Status(tmp_path, is_first=True), Status(tmp_path, is_first=False)
    first.set("running")
    look = other._written

    def look_just_before_the_first_speaks() -> dict[str, Any]:
        found = look()
        if found["state"] == "running":
            first.fail(rank(0), LostNode("node 1 is lost.", 1))
        return found

    with patch.object(other, "_written", look_just_before_the_first_speaks):
        other.fail(replace(rank(1), local_rank=0, node=1, nodes=2), LostNode("node 0 is lost.", 0))
    assert status(tmp_path)["reason"] == "rank 0, step 0: LostNode: node 1 is lost."
