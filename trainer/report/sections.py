"""The parts of the page below the charts. Each is empty when the run folder has nothing for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any, TypeGuard

from trainer.report.read import Event, Run
from trainer.report.text import compact, duration, escape, number, size

_MOST_EVENTS = 200
_MIXER_COLOURS = 5


def sentence(text: str) -> str:
    """The text with a capital at its start and a full stop at its end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def table(head: Iterable[tuple[str, str]], rows: Iterable[str], *, long: bool = False) -> str:
    """A table of finished rows; `head` has names and classes of columns. A long one scrolls."""
    columns = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in head)
    frame = 'class="scroll long" tabindex="0"' if long else 'class="scroll"'
    return f"<div {frame}><table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _bar(value: float, largest: float) -> str:
    share = 100 * value / largest if largest > 0 else 0.0
    return f'<td class="wide"><span class="bar" style="width:{max(share, 0.0):.1f}%"></span></td>'


def validation_sources(run: Run) -> str:
    """Last and best validation loss of each source, when there are several."""
    prefix = "val_loss/"
    sources = {name.removeprefix(prefix): run.metric(name) for name in run.series if name.startswith(prefix)}
    sources = {name: series for name, series in sources.items() if len(series)}
    if not sources:
        return ""
    largest = max(series.values[-1] for series in sources.values())
    rows = []
    for name, series in sources.items():
        best = int(series.values.argmin())
        rows.append(
            f'<tr><td class="words">{escape(name)}</td>{_bar(series.values[-1], largest)}'
            f'<td class="n">{number(series.values[-1])}</td><td class="n">{number(series.values[best])}</td>'
            f'<td class="n">{series.steps[best]:,}</td></tr>'
        )
    head = [("Source", ""), ("", ""), ("Last", "n"), ("Best", "n"), ("At step", "n")]
    return f"<h2>Validation by source <small>nats per token</small></h2>{table(head, rows)}"


_EVALUATION_NAMES = {
    "nats_per_token": "Nats per token",
    "bits_per_byte": "Bits per byte",
    "perplexity": "Perplexity",
}


def evaluation(run: Run) -> str:
    """What `headway eval` measured, with bars for the first measure that all have."""
    if not run.evaluation:
        return ""
    keys = list(dict.fromkeys(key for row in run.evaluation for key in row if key != "name"))
    keys.sort(key=lambda key: list(_EVALUATION_NAMES).index(key) if key in _EVALUATION_NAMES else 99)
    measured = [key for key in keys if all(is_number(row.get(key)) for row in run.evaluation)]
    drawn = measured[0] if measured else None
    largest = max(row[drawn] for row in run.evaluation) if drawn else 0.0
    rows = []
    for row in run.evaluation:
        cells = "".join(
            f'<td class="n">{number(row[key]) if is_number(row.get(key)) else escape(row.get(key, "–"))}</td>'
            for key in keys
        )
        bar = _bar(row[drawn], largest) if drawn else "<td></td>"
        rows.append(f'<tr><td class="words">{escape(row.get("name", "–"))}</td>{bar}{cells}</tr>')
    names = [(_EVALUATION_NAMES.get(key, key.replace("_", " ").capitalize()), "n") for key in keys]
    bars = f" <small>bars: {escape(_EVALUATION_NAMES.get(drawn, drawn).lower())}</small>" if drawn else ""
    return f"<h2>Evaluation{bars}</h2>{table([('Data', ''), ('', ''), *names], rows)}"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether JSON had a number there."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sample(run: Run) -> str:
    """Text that the model wrote."""
    return f'<h2>Sample</h2><pre class="sample">{escape(run.sample)}</pre>' if run.sample else ""


def model(run: Run) -> str:
    """Layers, then facts about the model and where it ran."""
    if not run.summary:
        return ""
    layers = run.summary.get("layers")
    layers = [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
    return f"<h2>Model</h2>{_layer_strip(layers)}{_layer_table(layers)}{_facts(run.summary)}"


def _layer_strip(layers: list[dict[str, Any]]) -> str:
    """One cell for each layer, its mixer told by colour and by letters."""
    if not layers or len(layers) > 200:
        return ""
    mixers = list(dict.fromkeys(str(layer.get("mixer", "–")) for layer in layers))
    cells = []
    for position, layer in enumerate(layers):
        mixer = str(layer.get("mixer", "–"))
        colour = f' style="--mixer:var(--mixer-{mixers.index(mixer)})"' if mixers.index(mixer) < _MIXER_COLOURS else ""
        cells.append(
            f'<li{colour} title="{escape(mixer)}"><small>{escape(layer.get("layer", position))}</small>'
            f"{escape(mixer[:3])}</li>"
        )
    return f'<ol class="layers">{"".join(cells)}</ol>'


def _layer_table(layers: list[dict[str, Any]]) -> str:
    if not layers:
        return ""

    def kind(numbered: tuple[int, dict[str, Any]]) -> tuple[str, str, Any]:
        layer = numbered[1]
        return str(layer.get("mixer", "–")), str(layer.get("feedforward", "–")), layer.get("parameters")

    rows = []
    for (mixer, feedforward, parameters), group in groupby(enumerate(layers), key=kind):
        alike = [layer.get("layer", position) for position, layer in group]
        span = str(alike[0]) if len(alike) == 1 else f"{alike[0]}–{alike[-1]}"
        each = compact(parameters) if is_number(parameters) else "–"
        together = compact(parameters * len(alike)) if is_number(parameters) else "–"
        rows.append(
            f'<tr><td class="tight">{escape(span)}</td><td class="words">{escape(mixer)}</td>'
            f'<td class="words">{escape(feedforward)}</td><td class="n">{each}</td><td class="n">{together}</td></tr>'
        )
    head = [("Layers", ""), ("Mixer", ""), ("Feed-forward", ""), ("Parameters each", "n"), ("Together", "n")]
    return table(head, rows, long=len(rows) > 14)


def _facts(summary: dict[str, Any]) -> str:
    facts = []
    for key, value in summary.items():
        if key in ("layers", "parameters"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(item) for item in value)
        elif is_number(value):
            value = compact(value)
        facts.append(f"<dt>{escape(_in_words(key))}</dt><dd>{escape(value)}</dd>")
    return f'<dl class="facts">{"".join(facts)}</dl>' if facts else ""


def _in_words(key: str) -> str:
    words = key.replace("_", " ").strip()
    return (words[:1].upper() + words[1:]).replace("Flops", "FLOPs")


def events(run: Run) -> str:
    """When it was started, stopped, resumed, saved."""
    if not run.events:
        return ""
    shown = run.events[-_MOST_EVENTS:]
    rows = []
    day = None
    for event in shown:
        date = f"{event.time:%Y-%m-%d}" if event.time else "–"
        moment = f"{event.time:%H:%M:%S}" if event.time else "–"
        rows.append(_event_row("" if date == day else date, moment, event))
        day = date
    left_out = len(run.events) - len(shown)
    note = (
        f" <small>the last {len(shown)}; {left_out:,} earlier ones are in logs/events.jsonl</small>" if left_out else ""
    )
    head = [("Date", ""), ("UTC", ""), ("Event", ""), ("Step", "n"), ("Details", "")]
    return f"<h2>Events{note}</h2>{table(head, rows, long=len(rows) > 14)}"


def _event_row(date: str, moment: str, event: Event) -> str:
    kind = "good" if event.name == "finished" else "bad" if event.name.endswith("failed") else ""
    details = ", ".join(_detail(key, value) for key, value in event.details.items())
    step = f"{event.step:,}" if event.step is not None else "–"
    return (
        f'<tr><td class="tight">{date}</td><td class="tight">{moment}</td>'
        f'<td class="tight {kind}">{escape(event.name.replace("_", " "))}</td>'
        f'<td class="n">{step}</td><td class="words soft">{escape(details)}</td></tr>'
    )


def _detail(key: str, value: Any) -> str:
    if key == "reason":
        return str(value)
    if key == "seconds" and is_number(value):
        return duration(value)
    return f"{key.replace('_', ' ')} {value}"


def checkpoints(run: Run) -> str:
    """The folders under `checkpoints/`."""
    if not run.checkpoints:
        return ""
    rows = []
    for checkpoint in run.checkpoints:
        state = (
            '<span class="good">✓ complete</span>' if checkpoint.complete else '<span class="bad">… incomplete</span>'
        )
        rows.append(
            f'<tr><td class="tight"><code>{escape(checkpoint.name)}</code></td><td class="tight">{state}</td>'
            f'<td class="n">{size(checkpoint.size)}</td><td class="n">{checkpoint.files:,}</td>'
            f'<td class="n">{checkpoint.written:%Y-%m-%d %H:%M:%S}</td></tr>'
        )
    head = [("Folder", ""), ("State", ""), ("Size", "n"), ("Files", "n"), ("Written, UTC", "n")]
    return f"<h2>Checkpoints</h2>{table(head, rows, long=len(rows) > 14)}"


# What colours a line of TOML, in the order in which it is tried: comment, string, value after `=`, `[` or `,`.
_TOML = re.compile(
    r"""(?P<comment>\#.*)|(?P<string>"(?:\\.|[^"\\])*"|'[^']*')|(?P<value>(?<=[=\[,\s])(?:true|false|[+-]?\d[\w.+:-]*))"""
)


def config(run: Run) -> str:
    """The resolved configuration, coloured lightly, folded away."""
    if not run.config_text.strip():
        return ""
    lines = "\n".join(_coloured(line) for line in run.config_text.strip().splitlines())
    return f"<details><summary>Configuration</summary><pre>{lines}</pre></details>"


def _coloured(line: str) -> str:
    if re.match(r"\s*\[[^=]*\]\s*(#.*)?$", line):
        return f'<span class="toml-section">{escape(line)}</span>'
    # Each piece is escaped on its own: what is matched and what lies between.
    pieces, end = [], 0
    for match in _TOML.finditer(line):
        pieces.append(escape(line[end : match.start()]))
        pieces.append(f'<span class="toml-{match.lastgroup}">{escape(match[0])}</span>')
        end = match.end()
    return "".join([*pieces, escape(line[end:])])


def remarks(run: Run) -> str:
    """What could not be shown, and why."""
    if not run.remarks:
        return ""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in run.remarks)
    return f"<h2>Remarks</h2><ul>{items}</ul>"
