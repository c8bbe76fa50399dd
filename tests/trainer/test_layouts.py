"""`headway train` in tensor- and pipeline-parallel layouts: the same run as on one process, from start to export."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from model.folders import step_folder
from tests.checkpoints import stored_weights
from tests.pool import Pool
from tests.trainer.conversions import done
from tests.trainer.runs import Signalled, assert_twins, begin_with, status, stored, train, write_config, write_tokens
from trainer.metrics import read_metrics

VOCAB = 67  # more than the data has, and divided by no tp

TP_PP = ("--parallel.tp", "2", "--parallel.pp", "2")
CP = ("--parallel.cp", "2")
ZBV = ("--parallel.pp", "2", "--parallel.pp_schedule", "zbv")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


def config_in(folder: Path, prefix: str, **model: Any) -> Path:
    folder.mkdir(exist_ok=True)
    model = {
        "d_model": 16,
        "num_layers": 4,
        "vocab_size": VOCAB,
        "pattern": ["lightning", "softmax"],
        "tie_embeddings": True,
    } | model
    data = {"validate_every_steps": 5, "validation_batches": 2}
    return write_config(folder, prefix, model=model, data=data)


def go(pool: Pool, world_size: int, config: Path, *overrides: str, **options: Any) -> None:
    results = pool.run(train, world_size, config, *overrides, **options)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(said for _, said in results)


@pytest.fixture(scope="module")
def twin(pool: Pool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never stopped."""
    config = config_in(tmp_path_factory.mktemp("twin"), prefix)
    go(pool, 1, config)
    return config.parent / "run"


def assert_same_curve(run_dir: Path, twin: Path, within: float = 1e-3) -> None:
    """Losses, nats: at most 1e-5 apart at the first step and `within` at any; likewise on held-out documents."""
    ours, theirs = read_metrics(run_dir), read_metrics(twin)
    assert len(ours) == len(theirs) == 10
    for key in ("loss", "val_loss"):
        apart = [abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True) if key in b]
        assert max(apart) <= within, (key, apart)
    assert abs(ours[0]["loss"] - theirs[0]["loss"]) <= 1e-5
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, TP_PP),
        (4, ZBV),
        (4, CP),
        pytest.param(4, ("--parallel.tp", "2", *CP), marks=pytest.mark.matrix),
        pytest.param(4, ("--parallel.tp", "2"), marks=pytest.mark.matrix),
        pytest.param(2, ("--parallel.pp", "2", "--parallel.recompute", "full"), marks=pytest.mark.matrix),
    ],
)
def test_the_curve_is_that_of_one_process(
    pool: Pool, twin: Path, prefix: str, tmp_path: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    config = config_in(tmp_path, prefix)
    go(pool, world_size, config, *layout)
    assert_same_curve(tmp_path / "run", twin)
    assert status(tmp_path / "run")["state"] == "finished"


def test_one_run_through_three_layouts(pool: Pool, twin: Path, prefix: str, tmp_path: Path) -> None:
    """Saved in tp2 x pp2, resumed in cp2 x fsdp2, then in one process."""
    config = config_in(tmp_path, prefix)
    go(pool, 4, config, *TP_PP, "--run.stop_at_step", "3")
    go(pool, 4, config, *CP, "--run.stop_at_step", "6")
    go(pool, 1, config)
    assert_same_curve(tmp_path / "run", twin)
    ours, theirs = stored(tmp_path / "run", 10), stored(twin, 10)
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert ours["model.embedding.weight"].shape == (VOCAB, 16)


@pytest.mark.parametrize(
    "layout",
    [TP_PP, pytest.param(ZBV, marks=pytest.mark.matrix), pytest.param(CP, marks=pytest.mark.matrix)],
    ids=["tp2 x pp2", "zbv", "cp2 x fsdp2"],
)
def test_stopped_and_resumed_in_one_layout_it_is_equal_bit_for_bit(
    pool: Pool, prefix: str, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """Stopped by a signal to the last rank, in the data."""
    straight, stopped = config_in(tmp_path / "straight", prefix), config_in(tmp_path / "stopped", prefix)
    go(pool, 4, straight, *layout)
    patch = Signalled(signal.SIGTERM, 3, "trainer.data.training", "TrainingData.batch", 3)
    go(pool, 4, stopped, *layout, patch=patch)
    assert status(stopped.parent / "run")["state"] == "preempted"
    go(pool, 4, stopped, *layout)
    assert_twins(stopped.parent / "run", straight.parent / "run")


def test_an_export_straight_from_a_layout(pool: Pool, prefix: str, tmp_path: Path, in_this_process: None) -> None:
    """The whole vocabulary and no row more; read back, it is the checkpoint; and a layout begins with it."""
    config = config_in(tmp_path, prefix)
    go(pool, 4, config, *TP_PP, "--run.stop_at_step", "2")
    out, back = tmp_path / "hf", tmp_path / "back"
    done("convert", "to-hf", str(tmp_path / "run"), str(out))
    done("convert", "from-hf", str(out), str(back))
    written = stored_weights(step_folder(tmp_path / "run", 2))
    for name, tensor in stored_weights(back).items():
        assert torch.equal(tensor, written[name]), name
    (tmp_path / "next").mkdir()
    again = config_in(tmp_path / "next", prefix)
    begin_with(again, out)
    go(pool, 4, again, *TP_PP, "--run.stop_at_step", "1", "--optimizer.lr", "0")
    begun = stored(tmp_path / "next" / "run", 1)
    for name, tensor in written.items():
        assert torch.equal(begun[f"model.{name}"], tensor), name


def test_an_illegal_layout_is_refused_for_all_its_reasons(pool: Pool, prefix: str, tmp_path: Path) -> None:
    config = config_in(tmp_path, prefix)
    asked = (
        "--parallel.tp",
        "4",
        "--parallel.pp",
        "4",
        "--parallel.pp_schedule",
        "zbv",
        "--parallel.microbatches",
        "3",
    )
    results = pool.run(train, 2, config, *asked, "--parallel.recompute", "full")
    assert [code for code, _ in results] == [2, 2]
    said = results[0][1]
    for words in (
        "for 8 reasons",
        "but 2 processes were started",
        "mixers.lightning.num_heads = 2: the largest tp that fits this model is 2",
        "makes 8 stages, more than model.num_layers = 4: take pp of at most 2",
        "microbatches = 3 leaves stages",
        'recompute = "full" with pp_schedule = "zbv"',
    ):
        assert words in said, said
    assert not (tmp_path / "run").exists()
