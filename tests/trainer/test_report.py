"""The page about a run: complete, self-contained, safe, and there from the first step on."""

from __future__ import annotations

import json
import math
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from trainer.commands.report import report
from trainer.report import write_report
from trainer.report.chart import POINTS, Line, downsample, frame, smooth, ticks
from trainer.report.read import Series, read_run
from trainer.report.text import compact, duration, number, size

CONFIG = """\
[run]
dir = "runs/small"  # where it lives
seed = 17

[model]
pattern = ["lightning*7", "softmax"]
dim = 512

[mixers.lightning]
kind = "lightning"

[schedule]
steps = 2000
warmup_steps = 100
lr = 6e-4
"""

SAMPLE = """\
Once upon a time there was a small lighthouse at the end of a long road. Nobody had lit it for years, and the keeper's
daughter had begun to think that nobody would.

"Perhaps," she said, "it is only waiting to be asked."
"""


def record(step: int, steps: int, rng: random.Random) -> dict:
    """One step of a run that looks like a run: warm-up, decay, noise, a slow first step, a skipped step, validation."""
    share = step / steps
    loss = 2.6 + 7.6 * math.exp(-14 * share) + 0.55 * math.exp(-2.5 * share) + rng.gauss(0, 0.06)
    seconds = rng.gauss(0.31, 0.012) + (7.5 if step == 1 else 0)
    told = {
        "step": step,
        "loss": round(loss, 5),
        "grad_norm": round(0.6 + 2.2 * math.exp(-20 * share) + abs(rng.gauss(0, 0.12)) + (step == 1234) * 9, 4),
        "tokens": step * 65536,
        "lr": 6e-4 * min(1, step / 100) * (0.55 + 0.45 * math.cos(math.pi * share)),
        "step_time": round(seconds, 4),
        "tokens_per_second": round(65536 / seconds, 1),
        "mfu": round(0.41 * 0.31 / seconds, 4),
        "skipped": step in (412, 413, 900),
        "balance": round(0.02 + 0.03 * math.exp(-6 * share) + abs(rng.gauss(0, 0.002)), 5),
    }
    told["total_loss"] = told["loss"] + told["balance"]
    if told["skipped"]:
        told |= {"loss": None, "grad_norm": None, "total_loss": None}
    if step % 100 == 0:
        told["val_loss"] = round(2.66 + 7.6 * math.exp(-14 * share) + 0.55 * math.exp(-2.5 * share), 5)
        told |= {"val_loss/books": told["val_loss"] - 0.11, "val_loss/code": told["val_loss"] - 0.74}
    return told


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def make_run(folder: Path, last: int = 2000, steps: int = 2000) -> Path:
    """A run folder with all that there can be: two interruptions, skipped steps, checkpoints, evaluation, sample."""
    folder.mkdir(parents=True)
    rng = random.Random(7)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text(lines([record(step, steps, rng) for step in range(1, last + 1)]))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": last, "reason": "all steps are done"}))
    (folder / "sample.txt").write_text(SAMPLE)
    start = 1_772_355_600
    happened = [
        (0, "started", 0, {"world": 8}),
        (16, "checkpoint_durable", 500, {"seconds": 3.2}),
        (129, "skipped", 412, {"reason": "gradient norm is not finite"}),
        (170, "preempted", 548, {"signal": "SIGTERM"}),
        (900, "resumed", 548, {"checkpoint": "step-00000548", "world": 8}),
        (1100, "failed", 1310, {"reason": "rank 3 was lost"}),
        (1180, "resumed", 1200, {"checkpoint": "step-00001200", "world": 4}),
        (1500, "checkpoint_durable", 2000, {"seconds": 3.1}),
        (1503, "finished", 2000, {}),
    ]
    (folder / "logs").mkdir()
    (folder / "logs" / "events.jsonl").write_text(
        lines([{"time": start + at, "event": name, "step": step, **more} for at, name, step, more in happened])
    )
    for step in (1200, 1600, 2000):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "shard-0.distcp").write_bytes(bytes(70_000))
        (checkpoint / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "step-00002100.partial").mkdir()
    evaluation = [("books", 2.48, 0.861), ("code", 1.87, 0.602), ("held-out web", 2.71, 0.934)]
    (folder / "evaluation.json").write_text(
        json.dumps(
            [
                {"name": name, "nats_per_token": nats, "bits_per_byte": bits, "perplexity": math.exp(nats)}
                for name, nats, bits in evaluation
            ]
        )
    )
    mixers = [("softmax", 3_411_968) if layer % 8 == 7 else ("lightning", 3_674_112) for layer in range(16)]
    summary = {
        "parameters": 75_234_816,
        "layers": [
            {"layer": layer, "mixer": mixer, "feedforward": "swiglu", "parameters": parameters}
            for layer, (mixer, parameters) in enumerate(mixers)
        ],
        "hardware": "8 x H200",
        "versions": {"headway": "0.1.0", "torch": "2.13.0"},
        "layout": {"dp_shard": 4, "tp": 2, "pp": 1, "cp": 1},
        "flops_per_token": 512_000_000,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Outline(HTMLParser):
    """Collects elements, checks that they nest, and that nothing is fetched from anywhere."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[Path, str]:
    run = make_run(tmp_path_factory.mktemp("runs") / "small")
    return run, write_report(run).read_text()


def test_the_command_writes_the_page_and_prints_its_path(tmp_path, capsys):
    run = make_run(tmp_path / "run", last=5)
    assert report([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert not list(run.glob("*.partial"))


def test_the_page_needs_nothing_but_itself(full):
    seen = outline(full[1]).seen
    for tag, attributes in seen:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
    assert "url(" not in full[1] and "@import" not in full[1] and "http:" not in full[1] and "https:" not in full[1]


def test_every_section_is_there(full):
    for title in ("Curves", "Validation by source", "Evaluation", "Sample", "Model", "Events", "Checkpoints"):
        assert f"<h2>{title}" in full[1]
    assert "<summary>Configuration</summary>" in full[1]
    assert "<h2>Remarks" not in full[1]
    for told in ("✓ finished", "Step 2,000 of 2,000. All steps are done.", "75.2M", "0.15% of all", "25 min 3 s"):
        assert told in full[1]


def test_every_chart_is_valid_svg_with_title_and_description(full):
    drawings = re.findall(r"<svg viewBox=\"0 0 1000.*?</svg>", full[1], re.DOTALL)
    assert len(drawings) == 7  # loss, four small ones, balance, total_loss
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        assert svg.find("title").text and "at step 2000" in svg.find("desc").text
    for data in re.findall(r'<script type="application/json">(.*?)</script>', full[1]):
        for line in json.loads(data):
            assert len(line["steps"]) == len(line["values"]) <= POINTS


def test_resumption_and_skipped_steps_are_marked(full):
    assert full[1].count("<i>resumed at </i>") == 2
    assert "resumed at step 548" in full[1]
    assert full[1].count('<path class="skip" d="M') >= 2


def test_an_incomplete_checkpoint_is_called_so(full):
    run = read_run(full[0])
    assert [one.complete for one in run.checkpoints] == [True, True, True, False]
    assert "… incomplete" in full[1]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_what_a_run_contains_cannot_become_markup(tmp_path):
    run = make_run(tmp_path / "a<b>&'c'", last=60)
    hostile = json.dumps({"state": HOSTILE, "step": 3, "reason": HOSTILE})
    (run / "status.json").write_text(hostile)
    (run / "sample.txt").write_text(HOSTILE)
    (run / "config.toml").write_text(f"# {HOSTILE}\n[{HOSTILE}]\nkey = '''{HOSTILE}'''\nother = 3 {HOSTILE}\n")
    (run / "evaluation.json").write_text(json.dumps([{"name": HOSTILE, HOSTILE: HOSTILE, "nats_per_token": 1.0}]))
    layer = {"layer": HOSTILE, "mixer": HOSTILE, "feedforward": HOSTILE, "parameters": HOSTILE}
    (run / "summary.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "layers": [layer]}))
    event = {"time": HOSTILE, "event": HOSTILE, "step": HOSTILE, HOSTILE: HOSTILE}
    (run / "logs" / "events.jsonl").write_text(lines([event]))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines([{"step": 61, HOSTILE: 1.0, "val_loss/" + HOSTILE: 2.0}]))
    html = write_report(run).read_text()
    assert "<img" not in html and "<script>alert" not in html
    tags = [tag for tag, _ in outline(html).seen]
    assert tags.count("img") == 0
    assert not [1 for _, attributes in outline(html).seen if any(name.startswith("on") for name in attributes)]


@pytest.mark.parametrize("last", [0, 1, 2, 3, 45])
def test_a_run_that_has_just_started_has_a_page(tmp_path, last):
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text('{"state": "running", "step": 0, "checkpoint": null, "reason": null}')
    rng = random.Random(0)
    (run / "metrics.jsonl").write_text(lines([record(step, 2000, rng) | {"mfu": None} for step in range(1, last + 1)]))
    html = write_report(run).read_text()
    outline(html)
    assert "▶ running" in html and "peak not known" in html
    assert ("No step has been recorded yet" in html) == (last == 0)
    assert "nan" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL).lower()


def test_nothing_but_skipped_steps_and_constant_values_are_drawn(tmp_path):
    lost = {"loss": None, "grad_norm": None, "skipped": True, "lr": 0.0, "step_time": 0.5, "tokens": 1}
    (tmp_path / "metrics.jsonl").write_text(lines([{"step": step, **lost} for step in range(1, 100)]))
    html = write_report(tmp_path).read_text()
    outline(html)
    assert "not known yet" in html and "100.00% of all" in html


def test_optional_files_that_are_broken_become_remarks(tmp_path):
    run = make_run(tmp_path / "run", last=3)
    (run / "summary.json").write_text("[1]")
    (run / "evaluation.json").write_text("{")
    (run / "config.toml").write_text("a = = 1")
    (run / "logs" / "events.jsonl").write_text("1\n2\n{}\n")
    html = write_report(run).read_text()
    outline(html)
    for told in ("a dict is expected", "evaluation.json is left out", "not valid TOML", "3 lines of logs/events.jsonl"):
        assert told in html


def test_what_is_no_run_folder_is_refused_in_a_sentence(tmp_path, capsys):
    make_run(tmp_path / "quickstart", last=3)
    assert report([str(tmp_path / "quikstart")]) == 2
    told = capsys.readouterr().err
    assert "is not there" in told and "metrics.jsonl" in told and str(tmp_path / "quickstart") in told
    with pytest.raises(ValueError, match=r"is a checkpoint of a run.*nearest run folder is .*quickstart\."):
        write_report(tmp_path / "quickstart" / "checkpoints" / "step-00001200")
    with pytest.raises(ValueError, match=r"holds quickstart;.*nearest run folder is .*quickstart\."):
        write_report(tmp_path)


def test_a_run_of_a_million_steps_stays_small():
    count = 1_000_000
    noise = np.random.default_rng(0).normal(size=count)
    series = Series(np.arange(1, count + 1), noise)
    series.values[123_456], series.values[777_777], series.values[5] = 99.0, -99.0, np.nan
    started = time.perf_counter()
    less, mean = downsample(series), smooth(series)
    assert time.perf_counter() - started < 5
    assert len(less) <= POINTS and {99.0, -99.0} <= set(less.values)
    assert less.steps[0] == 1 and less.steps[-1] == count and (np.diff(less.steps) > 0).all()
    assert abs(mean.values[500_000]) < 0.1


def test_one_spike_does_not_flatten_the_curve():
    values = np.full(200, 0.3)
    values[::2], values[0] = 0.32, 8.0
    area = frame([Line("step time", Series(np.arange(1, 201), values), "raw")], 1, 200, zero=True)
    assert area.y1 < 0.5 and area.above == 1 and area.peak_step == 1
    assert smooth(Series(np.arange(1, 201), values)).values.max() < 0.4


def test_ticks_are_round_and_inside():
    assert ticks(1, 2000, 5, whole=True) == [500, 1000, 1500, 2000]
    assert ticks(0, 6e-4, 4) == [0, 0.0002, 0.0004, 0.0006]
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]
    assert ticks(2.6, 2.7, 4) == [2.6, 2.62, 2.64, 2.66, 2.68, 2.7]


def test_numbers_read_as_people_write_them():
    assert [number(value) for value in (0, 12345, 3.14159, 0.0003, 2.5e-7, math.nan)] == [
        "0",
        "12,345",
        "3.142",
        "0.0003",
        "2.5e-7",
        "–",
    ]
    assert [compact(value) for value in (999, 4096, 999_999, 131_072_000, 7e12)] == ["999", "4.1k", "1M", "131M", "7T"]
    assert [duration(value) for value in (3.14, 59, 61, 7200, 90_061)] == [
        "3.1 s",
        "59 s",
        "1 min 1 s",
        "2 h",
        "1 d 1 h",
    ]
    assert [size(count) for count in (5, 70_000, 3 * 2**40)] == ["5 bytes", "68.4 KiB", "3 TiB"]


def diagnosed(step: int, layers: int = 16, heads: int = 8) -> dict:
    """The record of a step with a diagnosis: every eighth layer has weights, and its last head is a sink."""
    rng = random.Random(step)
    rows = [[rng.uniform(0.2, 0.9) for _ in range(heads)] if layer % 8 == 7 else None for layer in range(layers)]
    sinks = [None if row is None else [*(0.1 for _ in row[1:]), 0.875] for row in rows]
    tables = {"layers": list(range(layers)), "entropy": rows, "entropy_norm": rows, "sink": sinks}
    tables |= {"residual_max": [3.5 * layer for layer in range(layers)], "first_norm_ratio": [None] * layers}
    tables |= {
        "sigma": {"layers.0.mixer.q.weight": 2.5, "layers.7.mixer.q.weight": 9.25, "head.weight": 31.0},
        "gain": {"layers.0.mixer.q.weight": 1.0},
    }
    scalars = {"attention_entropy_min": 1.5, "attention_entropy_norm_min": 0.4, "sink_rate": None}
    return {"step": step, "loss": 3.0, "residual_max": 52.5, **scalars, "diagnostics": tables}


def test_attention_has_heat_maps_curves_and_numbers(tmp_path):
    run = make_run(tmp_path / "run", last=60)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines([diagnosed(100), record(101, 200, random.Random(1)), diagnosed(150)]))
    html = write_report(run).read_text()
    outline(html)
    assert "<h2>Attention <small>diagnosed at step 150</small></h2>" in html
    maps = re.findall(r'<svg viewBox="0 0 8 16".*?</svg>', html, re.DOTALL)
    assert len(maps) == 2
    for drawing, title in zip(maps, ("Entropy", "Weight of the first token"), strict=True):
        svg = ElementTree.fromstring(drawing)
        assert svg.find("title").text == f"{title} by layer and head"
        assert len(svg.findall("rect")) == 2 * 8
        assert "Without attention weights: layers 0, 1, 2, 3" in svg.find("desc").text
    assert "highest 0.875 in layer 15, head 7" in maps[1] and "<title>layer 7, head 7: 0.875</title>" in maps[1]
    for name in ("attention_entropy_min", "attention_entropy_norm_min", "residual_max"):
        assert html.count(f'id="chart-attention-{name}"') == 1
    assert "chart-attention-sink_rate" not in html  # it was never a number
    assert "<h3>residual_max" not in html  # nor is anything drawn a second time, among the further terms
    assert "9.25 <small>layer 7</small>" in html and "<code>mixer.q.weight</code>" in html
    assert "<code>head.weight</code>" in html


def test_a_run_without_diagnoses_has_no_such_section(full):
    assert "<h2>Attention" not in full[1]


def test_diagnostics_of_any_shape_are_survived_and_cannot_become_markup(tmp_path):
    odd = {"entropy": HOSTILE, "entropy_norm": [[HOSTILE, None, 0.5], HOSTILE, None], "sigma": {HOSTILE: 1.0}}
    odd |= {"gain": [1], "sink": [[None]], "first_weight": [], "residual_max": [HOSTILE, 2.0], "logit_max": {}}
    (tmp_path / "metrics.jsonl").write_text(lines([{"step": 1, "loss": 1.0, "diagnostics": odd}]))
    html = write_report(tmp_path).read_text()
    outline(html)
    assert "<img" not in html and "<script>alert" not in html
    assert "layer 0, head 2: 0.5" in html
