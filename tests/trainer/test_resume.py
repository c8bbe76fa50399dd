"""Stopped at any step, in any phase, and resumed, a run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from model.folders import newest_complete, step_folder, step_folders
from tests.pool import Pool
from tests.trainer.runs import (
    NotFinite,
    Signalled,
    assert_twins,
    events,
    status,
    stored,
    train,
    write_config,
    write_tokens,
)
from trainer.metrics import read_metrics


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


@pytest.fixture(scope="module")
def twins(pool: Pool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs at 1 and 2 processes."""
    found = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"twin-{world_size}")
        config = write_config(folder, prefix, data={"validate_every_steps": 5, "validation_batches": 2})
        results = pool.run(train, world_size, config)
        assert [code for code, _ in results] == [0] * world_size, "\n".join(said for _, said in results)
        found[world_size] = folder / "run"
    return found


@pytest.fixture
def config(prefix: str, tmp_path: Path) -> Path:
    """The twins' configuration, for a run of its own."""
    return write_config(tmp_path, prefix, data={"validate_every_steps": 5, "validation_batches": 2})


def resume(pool: Pool, world_size: int, config: Path, *overrides: str) -> None:
    results = pool.run(train, world_size, config, *overrides)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(said for _, said in results)


def test_the_uninterrupted_run(twins: dict[int, Path]) -> None:
    records = read_metrics(twins[1])
    assert [record["step"] for record in records] == list(range(1, 11))
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert [record["tokens"] for record in records] == [step * 8 * 32 for step in range(1, 11)]
    assert [record["step"] for record in records if "val_loss" in record] == [5, 10]
    assert status(twins[1]) == {
        "state": "finished",
        "step": 10,
        "checkpoint": "step-00000010",
        "reason": "all steps done",
    }
    assert [folder.name for folder in step_folders(twins[1])] == ["step-00000010", "step-00000008", "step-00000004"]


def test_the_layout_does_not_change_the_curve(twins: dict[int, Path]) -> None:
    for one, two in zip(read_metrics(twins[1]), read_metrics(twins[2]), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopped_at_steps_and_resumed(pool: Pool, twins: dict[int, Path], config: Path, world_size: int) -> None:
    run_dir = config.parent / "run"
    for step in (3, 4, 7):
        resume(pool, world_size, config, "--run.stop_at_step", str(step))
        assert status(run_dir) | {"reason": ""} == {
            "state": "stopped",
            "step": step,
            "checkpoint": f"step-{step:08d}",
            "reason": "",
        }
    resume(pool, world_size, config)
    assert_twins(run_dir, twins[world_size])


# What is interrupted, on which rank, in which call of it, and after which step all stop. The ranks tell each other once
# a step, after backward: a signal that comes later in a step ends the next one.
PHASES = {
    "while it is planned": ("trainer.resume", "make_plan", 0, 1, 0),
    "while the model is built": ("trainer.run", "build_optimizer", 1, 1, 0),
    "in the data": ("trainer.data.training", "TrainingData.batch", 1, 3, 3),
    "in forward": ("model.stack", "Model.forward", 1, 3, 3),
    "in the update": ("parallel.spread", "clip_gradients", 0, 3, 4),
    "in validation": ("trainer.validation", "Validation._source_sums", 1, 1, 5),
    "in a save": ("trainer.checkpoint", "CheckpointWriter.save", 0, 1, 5),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    pool: Pool, twins: dict[int, Path], config: Path, phase: str
) -> None:
    module, name, rank, call, stopped_at = PHASES[phase]
    number = signal.SIGUSR1 if rank else signal.SIGTERM
    results = pool.run(train, 2, config, patch=Signalled(number, rank, module, name, call))
    run_dir = config.parent / "run"
    assert [code for code, _ in results] == [0, 0], results
    assert status(run_dir)["state"] == "preempted"
    assert status(run_dir)["step"] == stopped_at
    assert status(run_dir)["checkpoint"] == f"step-{stopped_at:08d}"
    assert len(read_metrics(run_dir)) == stopped_at if stopped_at else True
    assert newest_complete(run_dir)[0] == step_folder(run_dir, stopped_at)
    # A stop does not wait for a validation: where one was due after the last step, the resumed run makes up for it.
    assert all("val_loss" not in record for record in read_metrics(run_dir))
    resume(pool, 2, config)
    assert_twins(run_dir, twins[2])


def test_a_damaged_checkpoint_is_passed_over(pool: Pool, twins: dict[int, Path], config: Path) -> None:
    resume(pool, 2, config, "--run.stop_at_step", "8")
    run_dir = config.parent / "run"
    shard = next(step_folder(run_dir, 8).glob("__1_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    resume(pool, 2, config)
    (warning,) = [event["reason"] for event in events(run_dir, "warning") if "passed over" in event["reason"]]
    assert str(shard) in warning
    assert_twins(run_dir, twins[2])


def test_nothing_is_started_over_when_all_checkpoints_are_damaged(pool: Pool, config: Path) -> None:
    resume(pool, 1, config, "--run.stop_at_step", "4")
    run_dir = config.parent / "run"
    shard = next(step_folder(run_dir, 4).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    ((code, said),) = pool.run(train, 1, config)
    assert code == 2
    assert str(shard) in said
    assert "its manifest says" in said


def test_leftovers_of_an_interrupted_save_are_removed(pool: Pool, twins: dict[int, Path], config: Path) -> None:
    resume(pool, 1, config, "--run.stop_at_step", "4")
    run_dir = config.parent / "run"
    partial = run_dir / "checkpoints" / "step-00000008.partial"
    shutil.copytree(step_folder(run_dir, 4), partial)
    headless = step_folder(run_dir, 6)
    shutil.copytree(step_folder(run_dir, 4), headless)
    (headless / "manifest.json").unlink()
    resume(pool, 1, config)
    assert not partial.exists()
    assert not headless.exists()
    assert_twins(run_dir, twins[1])


def test_a_finished_run_says_so(pool: Pool, twins: dict[int, Path], prefix: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(twins[2], run_dir)
    before = (run_dir / "metrics.jsonl").read_text()
    config = write_config(tmp_path, prefix, data={"validate_every_steps": 5, "validation_batches": 2})
    results = pool.run(train, 2, config)
    assert [code for code, _ in results] == [0, 0]
    assert "is finished: 10 of 10 steps" in results[0][1]
    assert (run_dir / "metrics.jsonl").read_text() == before
    assert status(run_dir)["state"] == "finished"


def test_another_layout_continues_the_same_curve(pool: Pool, twins: dict[int, Path], config: Path) -> None:
    resume(pool, 2, config, "--run.stop_at_step", "3")
    resume(pool, 1, config, "--run.stop_at_step", "6", "--parallel.microbatches", "2")
    resume(pool, 4, config, "--parallel.dp_replicate", "2")
    for ours, theirs in zip(read_metrics(config.parent / "run"), read_metrics(twins[1]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)


def test_a_changed_configuration_is_refused_key_by_key(pool: Pool, config: Path) -> None:
    resume(pool, 1, config, "--run.stop_at_step", "4")
    changes = ("--optimizer.lr", "0.02", "--model.norm_eps", "1e-5")
    ((code, said),) = pool.run(train, 1, config, *changes)
    assert code == 2
    assert "optimizer.lr: 0.01 -> 0.02" in said
    assert "model.norm_eps: 1e-06 -> 1e-05" in said
    allowed = ("--run.allow_change", "optimizer.lr", "--run.allow_change", "model.norm_eps")
    resume(pool, 1, config, *changes, *allowed, "--run.stop_at_step", "5")
    assert read_metrics(config.parent / "run")[-1]["step"] == 5


def test_more_steps_than_the_order_was_fixed_for_are_refused(pool: Pool, prefix: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, prefix)
    resume(pool, 1, config, "--run.stop_at_step", "4")
    more = ("--schedule.steps", "12", "--run.allow_change", "schedule.steps")
    ((code, said),) = pool.run(train, 1, config, *more)
    assert code == 2
    assert "the order of this run's data was fixed for 80" in said
    fewer = ("--schedule.steps", "6", "--run.allow_change", "schedule.steps")
    resume(pool, 1, config, *fewer)
    assert status(tmp_path / "run")["step"] == 6


def test_other_data_under_the_same_name_is_refused(pool: Pool, tmp_path: Path) -> None:
    config = write_config(tmp_path, write_tokens(tmp_path / "walk"))
    resume(pool, 1, config, "--run.stop_at_step", "4")
    write_tokens(tmp_path / "walk", seed=1)
    ((code, said),) = pool.run(train, 1, config)
    assert code == 2
    assert "data.train[0] walk" in said


def test_an_update_that_is_not_finite_is_skipped_by_all(pool: Pool, config: Path) -> None:
    results = pool.run(train, 2, config, "--run.stop_at_step", "4", patch=NotFinite(1, (3,)))
    assert [code for code, _ in results] == [0, 0], results
    run_dir = config.parent / "run"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, False, True, False]
    assert lines[2]["loss"] is None
    counters = {name: int(value) for name, value in stored(run_dir, 4).items() if name.startswith("counters.")}
    assert counters == {
        "counters.step": 4,
        "counters.samples": 32,
        "counters.tokens": 1024,
        "counters.skipped": 1,
        "counters.skipped_in_a_row": 0,
    }
    assert stored(run_dir, 4)["optimizer.embedding.weight.step"] == 3


def test_too_many_skipped_updates_in_a_row_fail_the_run(pool: Pool, config: Path) -> None:
    limit = ("--optimizer.max_skipped_in_a_row", "2")
    results = pool.run(train, 2, config, *limit, patch=NotFinite(0, (2, 4, 5)))
    assert [code for code, _ in results] == [70, 70], results
    run_dir = config.parent / "run"
    assert status(run_dir)["state"] == "failed"
    assert "2 updates in a row" in status(run_dir)["reason"]
    assert len(read_metrics(run_dir)) == 5


def test_the_number_of_skipped_updates_in_a_row_survives_a_restart(pool: Pool, config: Path) -> None:
    limit = ("--optimizer.max_skipped_in_a_row", "3")
    pool.run(train, 1, config, *limit, "--run.stop_at_step", "3", patch=NotFinite(0, (2, 3)))
    change = ("--run.allow_change", "optimizer.max_skipped_in_a_row")
    ((code, _),) = pool.run(train, 1, config, *limit, *change, patch=NotFinite(0, (1,)))
    assert code == 70
    assert "3 updates in a row" in status(config.parent / "run")["reason"]
