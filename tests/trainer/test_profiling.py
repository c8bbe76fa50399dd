"""`run.profile_steps` and `run.kernels`: traces of the steps asked for, and no other numbers for it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from kernels import dispatch
from tests.pool import Pool
from tests.trainer.runs import curve, train, write_config, write_tokens
from trainer.config import Refused, load_config
from trainer.resume import make_plan


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


def run(pool: Pool, config: Path, *overrides: str, world_size: int = 2) -> Path:
    results = pool.run(train, world_size, config, *overrides)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(said for _, said in results)
    return config.parent / "run"


def traces(run_dir: Path) -> dict[str, list[int]]:
    """Of each trace of a run, the steps that it holds by name."""
    found = {}
    for path in sorted((run_dir / "logs").glob("trace-*")):
        with gzip.open(path, "rt") as stream:
            events = json.load(stream)["traceEvents"]
        names = [match[1] for event in events if (match := re.fullmatch(r"step (\d+)", event.get("name", "")))]
        assert any("mm" in event.get("name", "") for event in events), "no matrix product was traced"
        found[path.name] = sorted({int(name) for name in names})
    return found


def test_the_steps_asked_for_are_traced_by_every_rank_and_nothing_else_changes(
    pool: Pool, prefix: str, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("plain", "traced")]
    for folder in folders:
        folder.mkdir()
    plain = run(pool, write_config(folders[0], prefix))
    traced = run(pool, write_config(folders[1], prefix), "--run.profile_steps", "[3, 5]")
    assert curve(traced) == curve(plain)
    assert traces(plain) == {}
    assert traces(traced) == {f"trace-rank0000{rank}-steps-3-5.json.gz": [3, 4, 5] for rank in range(2)}


def test_a_run_that_stops_in_between_leaves_what_it_traced(pool: Pool, prefix: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, prefix, run={"profile_steps": [3, 5], "dir": str(tmp_path / "run")})
    run(pool, config, "--run.stop_at_step", "4", world_size=1)
    assert traces(tmp_path / "run") == {"trace-rank00000-steps-3-4.json.gz": [3, 4]}
    run(pool, config, world_size=1)
    assert traces(tmp_path / "run") == {
        "trace-rank00000-steps-3-4.json.gz": [3, 4],
        "trace-rank00000-steps-5-5.json.gz": [5],
    }


def form_of_lightning(config: Path, *overrides: str) -> tuple[int, str, str | None]:
    """Train on a rank of the pool: how that ended, and which form of an operation was asked for meanwhile."""
    code, said = train(config, *overrides)
    return code, said, dispatch._WISHES.get("lightning")


def test_kernels_are_as_the_configuration_asks(pool: Pool, prefix: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, prefix)
    short = ("--schedule.steps", "1", "--schedule.warmup_steps", "0")
    ((code, said, form),) = pool.run(form_of_lightning, 1, config, "--run.kernels", "lightning=torch", *short)
    assert (code, form) == (0, "torch"), said


def test_faults_are_told_with_the_others(tmp_path: Path) -> None:
    wrong = {
        "profile_steps": ([5, 3], "run.profile_steps = [5, 3] must be two numbers"),
        "kernels": (["sorting=torch", "glu=cuda"], "run.kernels = ['sorting=torch', 'glu=cuda']"),
    }
    config = write_config(tmp_path, "nowhere", run={key: value for key, (value, _) in wrong.items()})
    with pytest.raises(Refused) as refused:
        load_config(config, ["--run.dir", str(tmp_path / "run")])
    for _, sentence in wrong.values():
        assert sentence in str(refused.value)
    assert "begins with no operation" in str(refused.value) and "does not end in a form" in str(refused.value)


def test_a_form_that_cannot_run_here_is_refused_before_anything_is_built(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    wishes = ["--run.kernels", '["lightning=triton", "attention=torch", "glu=triton"]']
    config = load_config(write_config(tmp_path, prefix), [*wishes, "--run.dir", str(tmp_path / "elsewhere")])
    with pytest.raises(Refused) as refused:
        make_plan(config)
    assert "lightning was asked for, and cannot run" in str(refused.value) and "for 2 reasons" in str(refused.value)
    assert "attention" not in str(refused.value) and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("steps", ["[0, 3]", "[3]", "3", "[1, 2, 3]", "[4, 2]"])
def test_steps_that_cannot_be_traced(steps: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, "nowhere")
    with pytest.raises(Refused, match=r"run\.profile_steps = .* must be two numbers"):
        load_config(config, ["--run.profile_steps", steps])
