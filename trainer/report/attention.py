"""The part of the page about attention: heat maps of the last diagnosis, its numbers by layer, scalars over steps."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from trainer.report.chart import Chart, Line, ticks
from trainer.report.read import Run
from trainer.report.sections import is_number, table
from trainer.report.text import escape, number

Rows = list[list[float | None]]

CURVES = {
    "attention_entropy_norm_min": ("Lowest entropy of a layer, normalised", "1: all keys alike"),
    "attention_entropy_min": ("Lowest entropy of a layer", "nats"),
    "sink_rate": ("Sink rate", "of heads and windows"),
    "attention_logit_max": ("Largest attention logit", ""),
    "head_load_min": ("Least load of a head", "part of the tokens"),
    "expert_load_min": ("Least load of an expert", "part of the tokens"),
    "expert_load_max": ("Largest load of an expert", "part of the tokens"),
    "residual_max": ("Largest value in the residual stream", ""),
}
"""The scalars that a diagnosis adds to its step's record, with titles and units."""


def curves(run: Run) -> list[Chart]:
    """Small charts of the scalars over steps."""
    return [
        Chart(f"attention-{name}", title, unit, [Line("diagnosed", run.series[name], "only", points=True)], zero=True)
        for name, (title, unit) in CURVES.items()
        if name in run.series
    ]


def attention(run: Run, drawn_curves: str) -> str:
    """The whole section; empty when the run was never diagnosed."""
    found = run.diagnostics
    if not found and not drawn_curves:
        return ""
    step = f" <small>diagnosed at step {run.diagnosed_step:,}</small>" if found else ""
    parts = [f"<h2>Attention{step}</h2>", f'<div class="charts">{_heat_maps(found)}{drawn_curves}</div>']
    parts += [_by_layer(found), _matrices(found)]
    return "".join(parts)


def _heat_maps(found: dict[str, Any]) -> str:
    drawn = []
    if (entropy := _matrix(found, "entropy_norm")) is not None:
        drawn.append(_heat_map("entropy", "Entropy", "normalised: 0 one key, 1 all alike", entropy, "cool"))
    # Where no document was long enough for a window, what the first token gets of all that was looked at.
    for key, unit in (("sink", "in windows of 64"), ("first_weight", "in whole rows")):
        if (weight := _matrix(found, key)) is not None:
            drawn.append(_heat_map("sink", "Weight of the first token", unit, weight, "warm"))
            break
    if (load := _matrix(found, "load")) is not None:
        drawn.append(_heat_map("load", "Head load", "part of the tokens for which a head runs", load, "cool"))
    if (load := _matrix(found, "expert_load")) is not None:
        drawn.append(_heat_map("experts", "Expert load", "part of the tokens that choose an expert", load, "cool"))
    return "".join(drawn)


def _matrix(found: dict[str, Any], key: str) -> Rows | None:
    """Numbers by layer and head, an empty row where a layer has none; None where there is no number at all."""
    rows = found.get(key)
    if not isinstance(rows, list):
        return None
    kept: Rows = [[v if is_number(v) else None for v in row] if isinstance(row, list) else [] for row in rows]
    return kept if any(value is not None for row in kept for value in row) else None


def _heat_map(key: str, title: str, unit: str, rows: Rows, hue: str) -> str:
    """Layers downwards, heads (or experts) to the right; the more of the hue, the nearer to 1."""
    unit_name = "expert" if key == "experts" else "head"
    layers, heads = len(rows), max(len(row) for row in rows)
    cells = [
        f'<rect x="{head}" y="{layer}" width="1" height="1" fill-opacity="{min(max(value, 0.0), 1.0):.3g}">'
        f"<title>layer {layer}, {unit_name} {head}: {number(value, 3)}</title></rect>"
        for layer, row in enumerate(rows)
        for head, value in enumerate(row)
        if value is not None
    ]
    down = "".join(f'<span style="top:{100 * (at + 0.5) / layers:.2f}%">{at}</span>' for at in _labelled(layers, 16))
    across = "".join(f'<span style="left:{100 * (at + 0.5) / heads:.2f}%">{at}</span>' for at in _labelled(heads, 12))
    height = min(max(1.5 * layers, 4.0), 24.0)
    without = {"load": "All heads run", "experts": "Without experts"}.get(key, "Without attention weights")
    told = _told(rows, without, unit_name)
    blank = f"; blank: {without.lower()}" if not all(rows) else ""
    return f"""
<figure class="heat {hue}" id="heat-{key}">
<figcaption><h3>{escape(title)} <small>{escape(unit)}</small></h3>
<p class="scale" aria-hidden="true">0 <i></i> 1</p></figcaption>
<div class="cells" style="height:{height:g}rem">
<svg viewBox="0 0 {heads} {layers}" preserveAspectRatio="none" role="img" aria-labelledby="ht-{key} hd-{key}">
<title id="ht-{key}">{escape(title)} by layer and {unit_name}</title><desc id="hd-{key}">{escape(told)}</desc>
{"".join(cells)}
</svg>
<div class="ys" aria-hidden="true">{down}</div><div class="xs" aria-hidden="true">{across}</div>
</div>
<p class="axes" aria-hidden="true">layers downwards, {unit_name}s to the right{blank}</p>
</figure>"""


def _labelled(count: int, about: int) -> list[int]:
    """Indices that get a label: round ones, `about` of them at most."""
    return [int(at) for at in ticks(0, max(count - 1, 1), min(count, about), whole=True) if at < count]


def _told(rows: Rows, otherwise: str, unit: str) -> str:
    """What the picture says, in words."""
    there = [
        (value, layer, head) for layer, row in enumerate(rows) for head, value in enumerate(row) if value is not None
    ]
    (low, *low_at), (high, *high_at) = min(there), max(there)
    mean = sum(value for value, *_ in there) / len(there)
    empty = [str(layer) for layer, row in enumerate(rows) if not row]
    without = f" {otherwise}: layers {', '.join(empty)}." if empty else ""
    return (
        f"{len(rows)} layers. Lowest {number(low, 3)} in layer {low_at[0]}, {unit} {low_at[1]}; highest "
        f"{number(high, 3)} in layer {high_at[0]}, {unit} {high_at[1]}; mean {number(mean, 3)}.{without}"
    )


_COLUMNS = (
    ("entropy", "Entropy", "mean"),
    ("entropy", "Lowest head", "min"),
    ("entropy_norm", "Normalised", "mean"),
    ("effective_keys", "Effective keys", "mean"),
    ("logit_max", "Largest logit", "max"),
    ("sink", "Sink", "mean"),
    ("first_weight", "First token", "mean"),
    ("load", "Least load", "min"),
    ("residual_max", "Residual", "max"),
    ("first_norm_ratio", "First norm", "max"),
)


def _by_layer(found: dict[str, Any]) -> str:
    """The numbers behind the pictures, for each layer over its heads."""
    columns = [column for column in _COLUMNS if isinstance(found.get(column[0]), list)]
    count = max((len(found[key]) for key, _, _ in columns), default=0)
    rows = []
    for layer in range(count):
        cells = "".join(f'<td class="n">{_over_heads(found[key], layer, how)}</td>' for key, _, how in columns)
        rows.append(f'<tr><td class="n">{layer}</td>{cells}</tr>')
    head = [("Layer", "n"), *((title, "n") for _, title, _ in columns)]
    return table(head, rows, long=len(rows) > 14) if rows else ""


def _over_heads(rows: list[Any], layer: int, how: str) -> str:
    row = rows[layer] if layer < len(rows) else None
    numbers: list[float] = [value for value in (row if isinstance(row, list) else [row]) if is_number(value)]
    if not numbers:
        return "–"
    if how == "mean":
        return number(sum(numbers) / len(numbers), 3)
    return number(min(numbers) if how == "min" else max(numbers), 3)


def _matrices(found: dict[str, Any]) -> str:
    """Smallest and largest singular value and gain of each kind of matrix, where the run has them."""
    kinds: defaultdict[str, dict[str, list[tuple[float, str]]]] = defaultdict(lambda: {"sigma": [], "gain": []})
    for what in ("sigma", "gain"):
        values = found.get(what)
        for name, value in values.items() if isinstance(values, dict) else ():
            if is_number(value):
                layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
                place, kind = (f"layer {layer[1]}", layer[2]) if layer else ("", name)
                kinds[kind][what].append((value, place))
    rows = []
    for kind, both in kinds.items():
        cells = "".join(_extreme(both[what], pick) for what in ("sigma", "gain") for pick in (min, max))
        rows.append(f'<tr><td class="words"><code>{escape(kind)}</code></td>{cells}</tr>')
    if not rows:
        return ""
    head = [(f"{extreme} {what}", "n") for what in ("sigma", "gain") for extreme in ("Smallest", "Largest")]
    return f"<h3>Reparametrised matrices</h3>{table([('Matrix', ''), *head], rows, long=len(rows) > 14)}"


def _extreme(values: list[tuple[float, str]], pick: Any) -> str:
    if not values:
        return '<td class="n">–</td>'
    value, place = pick(values)
    return f'<td class="n">{number(value)} <small>{escape(place)}</small></td>'
