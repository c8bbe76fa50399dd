"""The page as a whole: title, headline figures, charts; `sections` has what follows them."""

from __future__ import annotations

import math
from collections import Counter
from importlib import resources

import numpy as np

from trainer.report import attention, sections
from trainer.report.chart import Chart, Line, Mark, draw, smooth
from trainer.report.read import Run, Series
from trainer.report.text import compact, duration, escape, number

_STATE_SIGNS = {"running": "▶", "finished": "✓", "stopped": "■", "preempted": "‖", "failed": "✕"}
_MODALITY = "modality/"
_OWN_CHARTS = {"loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "step_time", "tokens", "mfu"}
_MOST_EXTRA_CHARTS = 8

# The page may load nothing from anywhere, whatever text a run puts into it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(run: Run) -> str:
    """The whole HTML document."""
    parts = [
        _header(run),
        _figures(run),
        _charts(run),
        attention.attention(run, _draw_all(run, attention.curves(run))),
        sections.validation_sources(run),
        sections.evaluation(run),
        sections.sample(run),
        sections.model(run),
        sections.events(run),
        sections.checkpoints(run),
        sections.config(run),
        sections.remarks(run),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)} · Headway</title>
<style>
{_asset("style.css")}</style>
</head>
<body>
<main>
{"".join(parts)}
</main>
<script>
{_asset("script.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (resources.files("trainer.report") / name).read_text(encoding="utf-8")


def _header(run: Run) -> str:
    state = str(run.status.get("state", "state not known"))
    sign = _STATE_SIGNS.get(state, "?")
    known = f" {state}" if state in _STATE_SIGNS else ""
    step, total = _last_step(run), _total_steps(run)
    told = [f"Step {step:,}" + (f" of {total:,}." if total else ".")]
    if run.status.get("reason"):
        told.append(sections.sentence(str(run.status["reason"])))
    bar = (
        f'<div class="bar-of-steps"><i style="width:{min(100.0, 100 * step / total):.1f}%"></i></div>' if total else ""
    )
    return f"""
<header>
<p class="kicker">Headway run</p>
<div class="title"><h1>{escape(run.name)}</h1><span class="state{known}">{sign} {escape(state)}</span></div>
<p class="lead">{escape(" ".join(told))}</p>{bar}
</header>"""


def _last_step(run: Run) -> int:
    seen = [int(series.steps[-1]) for series in run.series.values()]
    told = run.status.get("step")
    return max([*seen, told if isinstance(told, int) else 0])


def _total_steps(run: Run) -> int | None:
    schedule = run.config.get("schedule")
    steps = schedule.get("steps") if isinstance(schedule, dict) else None
    return steps if isinstance(steps, int) and steps > 0 else None


def _figures(run: Run) -> str:
    loss, val = run.metric("loss"), run.metric("val_loss")
    figures = [_figure("Loss at the last step", number(loss.values[-1]) if len(loss) else None, "nats per token")]
    if len(val):
        best = int(val.values.argmin())
        figures.append(_figure("Validation loss", number(val.values[best]), f"best, at step {val.steps[best]:,}"))
        figures.append(_figure("Perplexity", _perplexity(val.values[best]), "of the best validation loss"))
    else:
        figures.append(_figure("Validation loss", None, "", missing="not measured yet"))
        figures.append(_figure("Perplexity", _perplexity(loss.values[-1]) if len(loss) else None, "of the last step"))
    tokens, speed, mfu = run.metric("tokens"), run.metric("tokens_per_second"), run.metric("mfu")
    figures.append(_figure("Tokens seen", compact(tokens.values[-1]) if len(tokens) else None))
    figures.append(_figure("Tokens per second", compact(np.median(speed.values)) if len(speed) else None, "median"))
    usage = f"{np.median(mfu.values):.1%}" if len(mfu) else None
    figures.append(_figure("MFU", usage, "median", missing="peak not known"))
    figures += [_time(run), _figure("Skipped steps", f"{len(run.skipped):,}", _share_skipped(run))]
    parameters = run.summary.get("parameters")
    if isinstance(parameters, (int, float)):
        figures.append(_figure("Parameters", compact(parameters), f"{parameters:,}"))
    return f'<dl class="figures">{"".join(figures)}</dl>'


def _figure(label: str, value: str | None, note: str = "", *, missing: str = "not known yet") -> str:
    if value is None:
        return f'<div><dt>{escape(label)}</dt><dd class="value words">{escape(missing)}</dd></div>'
    return (
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd><dd class="note">{escape(note)}</dd></div>'
    )


def _perplexity(loss: float) -> str:
    return number(math.exp(loss)) if loss < 80 else "beyond e⁸⁰"


def _share_skipped(run: Run) -> str:
    steps = len(run.series["loss"]) if "loss" in run.series else 0
    return f"{len(run.skipped) / steps:.2%} of all" if run.skipped and steps else ""


def _time(run: Run) -> str:
    spent = run.metric("step_time")
    times = [event.time for event in run.events if event.time]
    note = (
        f"in steps; {duration((max(times) - min(times)).total_seconds())} by the clock"
        if len(times) > 1
        else "in steps"
    )
    return _figure("Time", duration(float(spent.values.sum())) if len(spent) else None, note)


def _charts(run: Run) -> str:
    if not any(len(series) for series in run.series.values()):
        return '<h2>Curves</h2><p class="empty">No step has been recorded yet; the curves will appear here.</p>'
    drawn = _draw_all(run, [_loss_chart(run), *_small_charts(run)])
    return f'<h2>Curves <small>by step</small></h2><div class="charts">{drawn}</div>'


def _draw_all(run: Run, charts: list[Chart]) -> str:
    """Those that have a number, all over the same steps."""
    every = [series.steps for series in run.series.values() if len(series)]
    if not every:
        return ""
    x0, x1 = min(int(steps[0]) for steps in every), max(int(steps[-1]) for steps in every)
    drawn = []
    for chart in charts:
        if any(len(line.series.finite()) for line in chart.lines):
            chart.marks = [mark for mark in _marks(run) if x0 <= mark.step <= x1]
            drawn.append(draw(chart, x0, x1))
    return "".join(drawn)


def _marks(run: Run) -> list[Mark]:
    times = Counter(event.step for event in run.events if event.name == "resumed" and event.step is not None)
    return [Mark(step, count) for step, count in sorted(times.items())]


def _loss_chart(run: Run) -> Chart:
    lines = _raw_and_smooth(run.series.get("loss"), "training")
    if len(run.metric("val_loss")):
        lines.append(Line("validation", run.metric("val_loss"), "val", points=True))
    return Chart("loss", "Loss", "nats per token", lines, tall=True, skipped=run.skipped)


def _raw_and_smooth(series: Series | None, name: str) -> list[Line]:
    if series is None:
        return []
    mean = smooth(series)
    if mean is None:
        return [Line(name, series, "only")]
    return [Line(name, series, "raw"), Line("smoothed", mean, "smooth")]


def _small_charts(run: Run) -> list[Chart]:
    def plain(name: str) -> list[Line]:
        return [Line("each step", run.series[name], "only")] if name in run.series else []

    charts = [
        Chart("lr", "Learning rate", "", plain("lr"), zero=True),
        Chart("grad_norm", "Gradient norm", "before clipping", _two("grad_norm", run), zero=True, skipped=run.skipped),
        Chart("tokens_per_second", "Tokens per second", "", _two("tokens_per_second", run), zero=True),
        Chart("step_time", "Step time", "seconds", _two("step_time", run), zero=True),
    ]
    charts += _modality_charts(run)
    own = _OWN_CHARTS | attention.CURVES.keys()
    extra = [name for name in run.series if name not in own and not name.startswith(("val_loss/", _MODALITY))]
    if len(extra) > _MOST_EXTRA_CHARTS:
        rest = ", ".join(extra[_MOST_EXTRA_CHARTS:])
        run.remarks.append(f"Of the further terms, {_MOST_EXTRA_CHARTS} are drawn; the others are {rest}.")
    for index, name in enumerate(extra[:_MOST_EXTRA_CHARTS]):
        charts.append(Chart(f"extra-{index}", name, "", _two(name, run)))
    return charts


def _modality_charts(run: Run) -> list[Chart]:
    """What predictions of each modality cost, where the model tells them apart."""
    charts: list[Chart] = []
    for name in [name for name in run.series if name.startswith(_MODALITY) and name.endswith("/loss")]:
        modality = name.removeprefix(_MODALITY).removesuffix("/loss")
        lines = _raw_and_smooth(run.series[name], "training")
        validated = run.metric(f"{_MODALITY}{modality}/val_loss")
        if len(validated):
            lines.append(Line("validation", validated, "val", points=True))
        charts.append(Chart(f"modality-{len(charts)}", f"Loss of {modality}", "nats per token", lines))
    return charts


def _two(name: str, run: Run) -> list[Line]:
    return _raw_and_smooth(run.series.get(name), "each step")
