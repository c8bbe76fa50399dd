"""`headway train`, `eval` and `generate` with the options a user reaches for."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.folders import find_checkpoint, newest_complete, step_folder
from model.hf import load
from model.mixers.softmax import Softmax
from model.shards import TensorReader
from tests.pool import Pool
from tests.trainer.runs import begin_with, events, headway, status, stored, train, write_config, write_tokens
from trainer.metrics import read_metrics

ROOT = Path(__file__).parents[2]


class OwnMixer(Softmax):
    """A user's own mixer, found by its import path."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


@pytest.fixture(scope="module")
def trained(pool: Pool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    results = pool.run(train, 2, write_config(folder, prefix))
    assert [code for code, _ in results] == [0, 0], results
    return folder / "run"


def trained_anew(pool: Pool, folder: Path, prefix: str, *overrides: str, world_size: int = 1) -> Path:
    results = pool.run(train, world_size, write_config(folder, prefix), *overrides)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(said for _, said in results)
    return folder / "run"


def test_the_run_folder_holds_what_is_promised(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.toml", "status.json", "metrics.jsonl", "checkpoints", "logs"} <= names
    step = newest_complete(trained)[0]
    assert step is not None
    assert {".metadata", "config.toml", "manifest.json", "__0_0.distcp", "__1_0.distcp"} == {
        path.name for path in step.iterdir()
    }
    files = json.loads((step / "manifest.json").read_text())["files"]
    assert set(files) == {".metadata", "config.toml", "__0_0.distcp", "__1_0.distcp"}


def test_only_the_newest_checkpoints_are_kept(pool: Pool, prefix: str, tmp_path: Path) -> None:
    keep = ("--checkpoint.every_steps", "1", "--checkpoint.keep_last", "2", "--checkpoint.keep_every", "4")
    run_dir = trained_anew(pool, tmp_path, prefix, *keep)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (4, 8, 9, 10)
    ]


def test_loading_gives_the_trained_model(trained: Path) -> None:
    model, config = load(trained)
    assert config["schedule"]["steps"] == 10
    whole = stored(trained, 10)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[f"model.{name}"]), name
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 64)


def test_evaluation_agrees_with_the_model_itself(trained: Path, prefix: str, tmp_path: Path) -> None:
    from trainer.data.indexed import open_pair

    code, said = headway("eval", str(trained), "--data", prefix, "--out", str(tmp_path / "scores.json"))
    assert code == 0, said
    (row,) = json.loads((tmp_path / "scores.json").read_text())
    model, _ = load(trained, dtype=torch.float64)
    data = open_pair(prefix)
    nats, tokens, offset = 0.0, 0, 0
    for document in range(data.documents):
        ids = torch.from_numpy(data.document(document).astype("int64"))
        # Rows of 32 cut the joined documents; each piece is scored as a sequence of its own.
        cuts = [0, *[place for place in range(1, len(ids)) if (offset + place) % 32 == 0]]
        for start, stop in zip(cuts, [*cuts[1:], len(ids) - 1], strict=True):
            if stop > start:
                logits = model(ids[None, start:stop])[0].log_softmax(-1)
                nats -= logits[range(stop - start), ids[start + 1 : stop + 1]].sum().item()
                tokens += stop - start
        offset += len(ids)
    assert row["tokens"] == tokens
    assert row["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert row["bits_per_byte"] is None


def test_evaluation_beside_ngrams(trained: Path, tmp_path: Path) -> None:
    code, said = headway("eval", str(trained), "--baselines", "--out", str(tmp_path / "scores.json"))
    assert code == 0, said
    rows = {row["name"]: row for row in json.loads((tmp_path / "scores.json").read_text())}
    assert set(rows) == {"walk", "unigram", "bigram"}
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert rows["bigram"]["nats_per_token"] < rows["unigram"]["nats_per_token"]


def test_generation_needs_a_tokenizer(trained: Path) -> None:
    code, said = headway("generate", str(trained), "--prompt", "x")
    assert code == 2
    assert "give --tokenizer" in said


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_what_is_no_model_is_refused(command: str, tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "none", "does not exist"), (tmp_path, "neither a run folder")):
        code, said = headway(command, str(folder))
        assert code == 2
        assert words in said


def test_frozen_parameters_stay_bit_equal(pool: Pool, prefix: str, trained: Path, tmp_path: Path) -> None:
    run_dir = trained_anew(pool, tmp_path, prefix, "--run.freeze", '["layers.0.*", "embedding.*"]', world_size=2)
    (tmp_path / "start").mkdir()
    start = trained_anew(pool, tmp_path / "start", prefix, "--run.stop_at_step", "1", "--optimizer.lr", "0")
    before, after = stored(start, 1), stored(run_dir, 10)
    for name in before:
        if name.startswith("model."):
            frozen = name.startswith(("model.layers.0.", "model.embedding."))
            assert torch.equal(before[name], after[name]) == frozen, name
    assert not [name for name in after if name.startswith("optimizer.layers.0.")]


def test_what_is_frozen_may_change_on_resume(pool: Pool, prefix: str, tmp_path: Path) -> None:
    frozen = ("--run.freeze", "embedding.weight", "--run.stop_at_step", "4")
    run_dir = trained_anew(pool, tmp_path, prefix, *frozen, world_size=2)
    assert "optimizer.embedding.weight.step" not in stored(run_dir, 4)
    trained_anew(pool, tmp_path, prefix, "--run.freeze", "head.weight", world_size=2)
    after = stored(run_dir, 10)
    assert after["optimizer.embedding.weight.step"] == 6
    assert after["optimizer.layers.0.mixer.q.weight.step"] == 10
    assert "optimizer.head.weight.step" not in after


def test_the_optimizer_may_change_on_resume(pool: Pool, prefix: str, tmp_path: Path) -> None:
    """Matrices begin with a fresh momentum; what AdamW has updated all along goes on, and back again."""
    run_dir = trained_anew(pool, tmp_path, prefix, "--run.stop_at_step", "4", world_size=2)
    to_muon = ("--optimizer.kind", "muon", "--run.allow_change", "optimizer.kind")
    trained_anew(pool, tmp_path, prefix, *to_muon, "--run.stop_at_step", "7", world_size=2)
    middle = stored(run_dir, 7)
    assert middle["optimizer.embedding.weight.step"] == 7
    assert middle["optimizer.layers.0.mixer.q.weight.momentum_buffer"].abs().max() > 0
    assert "optimizer.layers.0.mixer.q.weight.step" not in middle
    trained_anew(pool, tmp_path, prefix, "--run.allow_change", "optimizer.kind", world_size=2)
    after = stored(run_dir, 10)
    assert after["optimizer.embedding.weight.step"] == 10
    assert after["optimizer.layers.0.mixer.q.weight.step"] == 3


def test_weights_from_another_run(pool: Pool, prefix: str, trained: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, prefix)
    begin_with(config, trained)
    results = pool.run(train, 2, config, "--run.stop_at_step", "1", "--optimizer.lr", "0")
    assert [code for code, _ in results] == [0, 0], results
    ours, theirs = stored(tmp_path / "run", 1), stored(trained, 10)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("model."))
    assert ours["counters.samples"] == 8
    assert read_metrics(tmp_path / "run")[0]["loss"] < read_metrics(trained)[0]["loss"] - 0.2
    ((code, said),) = pool.run(train, 1, config, "--run.dir", str(tmp_path / "b"), "--feedforwards.swiglu.d_ff", "40")
    assert code == 2
    assert "layers.1.feedforward.up.weight: [32, 16] in" in said
    assert "but [40, 16] in this model" in said


def test_a_users_own_mixer_trains_and_is_not_imported_unasked(pool: Pool, prefix: str, tmp_path: Path) -> None:
    kind = ("--mixers.softmax.kind", "tests.trainer.test_train:OwnMixer")
    run_dir = trained_anew(pool, tmp_path, prefix, *kind, "--run.stop_at_step", "2")
    code, said = headway("eval", str(run_dir), "--data", prefix)
    assert code == 2
    assert "--allow-code" in said
    assert headway("eval", str(run_dir), "--data", prefix, "--allow-code")[0] == 0


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions(pool: Pool, prefix: str, trained: Path, tmp_path: Path, precision: str) -> None:
    run_dir = trained_anew(pool, tmp_path, prefix, "--run.precision", precision, "--run.deterministic", "true")
    for ours, theirs in zip(read_metrics(run_dir), read_metrics(trained), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02 if precision == "bf16" else 1e-4)


def test_a_refused_layout_is_refused_by_every_rank(pool: Pool, prefix: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, prefix)
    results = pool.run(train, 2, config, "--parallel.tp", "2", "--parallel.cp", "3", "--data.global_batch_size", "7")
    assert [code for code, _ in results] == [2, 2]
    said = results[0][1]
    for words in ("cp = 3 does not divide", "= 6, but 2 processes"):
        assert words in said
    assert results[1][1] == ""
    assert not (tmp_path / "run").exists()


def test_what_only_the_first_rank_can_find_ends_the_others_too(pool: Pool, tmp_path: Path) -> None:
    config = write_config(tmp_path, str(tmp_path / "missing"))
    results = pool.run(train, 2, config)
    assert [code for code, _ in results] == [2, 2]
    assert str(tmp_path / "missing") in results[0][1]
    assert not (tmp_path / "run").exists()


def test_faults_of_every_kind_come_at_once(pool: Pool, prefix: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, str(tmp_path / "missing"))
    wrong = ("--optimizer.lr", "-1", "--run.sed", "3", "--parallel.dp_shard", "3", "--metrics.sinks", "csv")
    results = pool.run(train, 2, config, *wrong)
    assert [code for code, _ in results] == [2, 2]
    for words in ("optimizer.lr = -1", "run.seed", "= 3, but 2 processes", "metrics.sinks", str(tmp_path / "missing")):
        assert words in results[0][1]


def test_resume_never_does_not_overwrite(pool: Pool, prefix: str, trained: Path) -> None:
    config = write_config(trained.parent, prefix)
    ((code, said),) = pool.run(train, 1, config, "--run.resume", "never")
    assert code == 2
    assert "step-00000010" in said


def test_resuming_from_a_step_of_another_run(pool: Pool, prefix: str, trained: Path, tmp_path: Path) -> None:
    run_dir = trained_anew(pool, tmp_path, prefix, "--run.resume", str(step_folder(trained, 8)), world_size=2)
    assert read_metrics(run_dir) and [record["step"] for record in read_metrics(run_dir)] == [9, 10]
    ours, theirs = stored(run_dir, 10), stored(trained, 10)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_command_again_goes_on_and_does_not_begin_twice(
    pool: Pool, prefix: str, trained: Path, tmp_path: Path
) -> None:
    start = ("--run.resume", str(step_folder(trained, 4)), "--run.stop_at_step", "6")
    run_dir = trained_anew(pool, tmp_path, prefix, *start, world_size=2)
    trained_anew(pool, tmp_path, prefix, *start[:2], "--run.stop_at_step", "7", world_size=2)
    assert [event["step"] for event in events(run_dir, "resumed")] == [4, 6]
    # Back to an older step of its own: asked for once, and not again by a restart.
    back = ("--run.resume", str(step_folder(run_dir, 6)))
    trained_anew(pool, tmp_path, prefix, *back, "--run.stop_at_step", "8", world_size=2)
    results = pool.run(restarted, 2, tmp_path / "config.toml", *back)
    assert [code for code, _ in results] == [0, 0], results
    assert [event["step"] for event in events(run_dir, "resumed")] == [4, 6, 6, 8]
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(5, 11))


def restarted(config: Path, *overrides: str) -> tuple[int, str]:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        return train(config, *overrides)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo this must never run > /dev/null",)


def test_a_planted_payload_is_not_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"system, which no checkpoint of ours holds"):
        TensorReader(tmp_path).read_metadata()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_entries_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"weight": torch.zeros(2)}, "extra": {"a": Payload}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="BytesStorageMetadata, which no checkpoint of ours holds"):
        TensorReader(tmp_path).read_metadata()


def test_a_step_folder_whose_files_changed_is_refused(pool: Pool, prefix: str, tmp_path: Path) -> None:
    run_dir = trained_anew(pool, tmp_path, prefix, "--run.stop_at_step", "1")
    folder = step_folder(run_dir, 1)
    (folder / "config.toml").write_text((folder / "config.toml").read_text() + "\n# changed\n")
    with pytest.raises(ValueError, match=r"config\.toml has \d+ bytes, its manifest says"):
        find_checkpoint(run_dir)


def test_a_disk_that_fails_costs_a_checkpoint_and_not_the_run(pool: Pool, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000004").write_text("in the way of the folder")
    (tmp_path / "run" / "checkpoints" / "step-00000008.partial").write_text("in the way of the shards")
    run_dir = trained_anew(pool, tmp_path, prefix, world_size=2)
    assert [failure["step"] for failure in events(run_dir, "checkpoint_failed")] == [4, 8]
    assert status(run_dir)["state"] == "finished"
    assert newest_complete(run_dir)[0] == step_folder(run_dir, 10)


def test_a_disk_that_fails_stops_the_run_where_that_is_asked_for(pool: Pool, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000004.partial").write_text("in the way of the shards")
    results = pool.run(train, 2, write_config(tmp_path, prefix), "--checkpoint.on_failure", "stop")
    assert [code for code, _ in results] == [70, 70]
    assert "writing a checkpoint failed" in status(tmp_path / "run")["reason"]


@pytest.mark.matrix
def test_compiled_twice_from_one_cache_equals_eager(prefix: str, tmp_path: Path) -> None:
    """A resumed run is such a second compile, and inductor's cache has been wrong before."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    curves = []
    for name, compiled in (("eager", "false"), ("first", "true"), ("second", "true")):
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(folder, prefix)
        command = [sys.executable, "-m", "trainer", "train", str(config), "--run.compile", compiled]
        done = subprocess.run(
            [*command, "--run.stop_at_step", "4"],
            cwd=ROOT,
            env=environment,
            timeout=300,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        curves.append([(record["loss"], record["grad_norm"]) for record in read_metrics(folder / "run")])
    for compiled_curve in curves[1:]:
        for ours, eager in zip(compiled_curve, curves[0], strict=True):
            assert ours == pytest.approx(eager, rel=1e-5)
