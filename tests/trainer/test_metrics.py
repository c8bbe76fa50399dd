"""Records: one per step, whatever kills the run; and what the console says of them."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from trainer.metrics import MetricsConfig, MetricsLog, iter_metrics, read_metrics
from trainer.progress import Progress


def record(step: int, **more) -> dict:
    return {"step": step, "loss": 3.0 - step / 100, "grad_norm": 0.5, "tokens": step * 10, "lr": 1e-3} | {
        "step_time": 0.1,
        "tokens_per_second": 100.0,
        "mfu": None,
        "skipped": False,
        **more,
    }


def write(run: Path, steps: range, *, resumed_step: int = 0, sinks: tuple[str, ...] = ("jsonl",)) -> None:
    with MetricsLog(run, sinks, resumed_step=resumed_step) as log:
        for step in steps:
            log.write(record(step))


def steps_of(run: Path) -> list[int]:
    return [one["step"] for one in read_metrics(run)]


def test_one_object_per_step_as_it_was_given(tmp_path):
    with MetricsLog(tmp_path, ["jsonl"], resumed_step=0) as log:
        log.write(record(1))
        log.write(record(2, val_loss=2.5, **{"val_loss/books": 2.4}))
        assert steps_of(tmp_path) == [1, 2], "each step is on disk before the log is closed"
    first, second = read_metrics(tmp_path)
    assert first == record(1)
    assert second["val_loss/books"] == 2.4


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsLog(tmp_path, ["jsonl"], resumed_step=0) as log:
        log.write(record(1, loss=math.nan, grad_norm=math.inf, balance=np.float32("-inf"), lr=np.float64(0.5)))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (one,) = read_metrics(tmp_path)
    assert one["loss"] is one["grad_norm"] is one["balance"] is None
    assert one["lr"] == 0.5


def test_resume_cuts_back_to_the_resumed_step(tmp_path):
    write(tmp_path, range(1, 11))
    write(tmp_path, range(7, 9), resumed_step=6)
    assert steps_of(tmp_path) == list(range(1, 9))
    assert not list(tmp_path.glob("*.partial"))


def test_a_new_run_in_an_old_folder_starts_from_nothing(tmp_path):
    write(tmp_path, range(1, 5))
    write(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "tokens": 1}', "\x00\x00"])
def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path, torn):
    write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps_of(tmp_path) == [1, 2, 3]
    write(tmp_path, range(4, 6), resumed_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match="Line 2"):
        list(iter_metrics(tmp_path))


def test_no_file_means_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_kill_9_loses_nothing_that_was_written(tmp_path):
    script = (
        "import sys; from pathlib import Path; from trainer.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), ['jsonl'], resumed_step=0)\n"
        "for step in range(1, 10**6):\n"
        "    log.write({'step': step, 'loss': 1.0}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    told = 0
    while told < 200:
        told = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told


def test_steps_must_grow(tmp_path):
    with MetricsLog(tmp_path, ["jsonl"], resumed_step=4) as log, pytest.raises(AssertionError, match="in order"):
        log.write(record(4))


def test_tensorboard_has_every_step_once_after_resume(tmp_path):
    write(tmp_path, range(1, 11), sinks=("jsonl", "tensorboard"))
    write(tmp_path, range(7, 13), resumed_step=6, sinks=("jsonl", "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert set(events.Tags()["scalars"]) == set(record(1)) - {"step", "mfu"}, "null is not drawn"


def test_wandb_runs_offline_when_it_is_there(tmp_path, monkeypatch):
    logged, opened = [], {}

    class FakeRun:
        def log(self, numbers, step):
            logged.append((step, numbers))

        def finish(self):
            logged.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: opened.update(settings) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert MetricsConfig(sinks=["jsonl", "wandb"]).faults() == []
    write(tmp_path, range(1, 2), sinks=("jsonl", "wandb"))
    assert opened["mode"] == "offline" and opened["dir"] == str(tmp_path)
    assert logged[0][0] == 1 and logged[0][1]["loss"] == 2.99 and "mfu" not in logged[0][1]
    assert logged[-1] == "finished"


@pytest.mark.parametrize(
    ("sinks", "told"),
    [
        (["tensorboard"], "['jsonl', 'tensorboard'] works"),
        (["jsonl", "tensorbord"], 'the nearest is "tensorboard"'),
        (["jsonl", "jsonl"], "twice"),
    ],
)
def test_wrong_sinks_are_refused_in_a_sentence(tmp_path, sinks, told):
    (fault,) = MetricsConfig(sinks=sinks).faults()
    assert told in fault
    with pytest.raises(ValueError, match=r"metrics\.sinks"):
        MetricsLog(tmp_path, sinks, resumed_step=0)


def test_a_sink_that_is_not_installed_is_named_with_what_works(monkeypatch):
    monkeypatch.setattr("trainer.metrics._installed", lambda module: module != "wandb")
    (fault,) = MetricsConfig(sinks=["jsonl", "wandb"]).faults()
    assert "not installed" in fault and "['jsonl']" in fault


def test_the_default_config_has_no_fault_and_zero_is_one():
    assert MetricsConfig().faults() == []
    assert "1 (every step) or more" in MetricsConfig(log_every_steps=0).faults()[0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_the_first_the_last_and_every_validation(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("trainer.progress.time.monotonic", lambda: next(clock) * 0.01)
    stream = io.StringIO()
    with Progress(200, 1, log_every_steps=1, enabled=True, stream=stream) as progress:
        for step in range(1, 201):
            progress.update(record(step, val_loss=2.5 if step == 50 else None))
    told = stream.getvalue().splitlines()
    assert [line.split()[1] for line in told] == ["1/200", "50/200", "200/200"]
    assert "val" not in told[0] and "val 2.5000" in told[2] and "100 tokens/s" in told[0] and "ETA" in told[1]


def test_a_run_that_stops_early_shows_where(monkeypatch):
    stream = io.StringIO()
    with Progress(200, 101, log_every_steps=1, enabled=True, stream=stream) as progress:
        progress.update(record(101, mfu=0.4123))
        progress.update(record(102, loss=math.nan, skipped=True))
    told = stream.getvalue().splitlines()
    assert told[0].startswith("step 101/200") and "MFU 41.2%" in told[0]
    assert told[-1].startswith("step 102/200  skipped  loss not finite")


def test_the_peak_is_told_once_and_other_ranks_are_silent():
    stream = io.StringIO()
    Progress(10, 1, peak="989 TFLOP/s per device", stream=stream).close()
    assert stream.getvalue() == "MFU is relative to 989 TFLOP/s per device.\n"
    silent = io.StringIO()
    with Progress(10, 1, enabled=False, peak="989 TFLOP/s", stream=silent) as progress:
        progress.update(record(1))
        progress.note("hello")
    assert silent.getvalue() == ""


def test_a_terminal_gets_a_bar_and_notes_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(3, 1, log_every_steps=1, enabled=True, stream=stream) as progress:
        progress.update(record(1))
        progress.note("checkpoint [1] is written")
        for step in (2, 3):
            progress.update(record(step))
    assert "3/3" in stream.getvalue() and "loss 2.9700" in stream.getvalue()
    assert "checkpoint [1] is written" in stream.getvalue()


def test_importing_the_modules_is_light():
    script = "import sys, trainer.metrics, trainer.progress, trainer.commands.report\n"
    script += "print(sorted({'torch', 'tensorboard', 'rich', 'numpy', 'tyro'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    assert json.loads(told.stdout) == []
