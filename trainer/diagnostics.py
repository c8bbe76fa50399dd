"""Diagnostics of attention as a run records them: when they are due, and what a record, TensorBoard and a table get."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.batch import Batch
    from model.diagnostics import Diagnosis
    from parallel.spread import Spread

BY_HEAD = ("entropy", "entropy_norm", "logit_max", "effective_keys", "sink", "sink_argmax", "first_weight", "mass")
"""Keys of `diagnostics` with a row for each layer and in it a number for each head."""
LOAD = "load"
"""The same, where heads are chosen: for which part of the tokens a head runs."""
EXPERT_LOAD = "expert_load"
"""For each layer with experts, and in it for each of them: which part of the tokens chooses it."""
BY_LAYER = ("residual_max", "first_norm_ratio")
"""Keys with a number for each layer."""
SPECTRAL = ("sigma", "gain")
"""Keys with a number for each reparametrised matrix."""
DIGITS = 5
"""Significant digits of what is kept by layer and head."""


class Diagnostics:
    """Diagnoses a model every so many steps of its training; 0: never."""

    def __init__(self, every_steps: int):
        self.every_steps = every_steps

    def is_due(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0

    def record(self, model: Spread, batch: Batch, step: int) -> dict[str, Any]:
        """What the record of this step gets, from the first row of each rank's share of its batch. Collective."""
        if not self.is_due(step):
            return {}
        from parallel.diagnose import diagnose

        told = record_of(diagnose(model, batch))
        told["diagnostics"] |= spectral(model.reparam.norms())
        return told


def record_of(found: Diagnosis) -> dict[str, Any]:
    """Scalars, and `diagnostics` by layer and head. Scalars of attention are left out where no layer has weights."""
    return scalars(found) | {"diagnostics": tables(found)}


def scalars(found: Diagnosis) -> dict[str, float | None]:
    """One number each for the whole model."""
    told: dict[str, float | None] = {}
    if any(found.heads):
        told["attention_entropy_min"] = _lowest_mean(found, "entropy")
        told["attention_entropy_norm_min"] = _lowest_mean(found, "entropy_norm")
        told["sink_rate"] = found.sink_rate
        told["attention_logit_max"] = found.by_head["logit_max"].max().item()
    if loads := [load for row in head_loads(found) for load in row]:
        told["head_load_min"] = min(loads)
    if loads := [load for row in found.expert_loads for load in row]:
        told["expert_load_min"], told["expert_load_max"] = min(loads), max(loads)
    told["residual_max"] = found.residual_max.max().item()
    return told


def head_loads(found: Diagnosis) -> list[list[float]]:
    """By layer and head; an empty list for a layer that does not choose."""
    return [[] if row is None or row[0] != row[0] else row for row in found.rows(LOAD)]


def unchosen(record: dict[str, Any]) -> list[str]:
    """Sentences that name the heads and experts which no token that was looked at has chosen."""
    sentences = []
    for key, what, owner in ((LOAD, "heads", "mixer"), (EXPERT_LOAD, "experts", "feed-forward")):
        rows = record.get("diagnostics", {}).get(key) or []
        idle = {layer: [unit for unit, load in enumerate(row or []) if load == 0] for layer, row in enumerate(rows)}
        named = [f"{', '.join(map(str, units))} of layer {layer}" for layer, units in idle.items() if units]
        if named:
            sentences.append(
                f"no token that was looked at chose {what} {'; '.join(named)}: raise balance_weight of the {owner} if "
                "it stays so"
            )
    return sentences


def _lowest_mean(found: Diagnosis, name: str) -> float | None:
    means = [mean for row in found.rows(name) if row and (mean := sum(row) / len(row)) == mean]
    return min(means, default=None)


def tables(found: Diagnosis) -> dict[str, Any]:
    """Nested lists by layer and head; null for layers without attention weights, and for what could not be measured."""
    told: dict[str, Any] = {"layers": list(range(len(found.heads)))}
    for name in BY_HEAD:
        told[name] = [None if row is None else [_short(value) for value in row] for row in found.rows(name)]
    if any(head_loads(found)):
        told[LOAD] = [[_short(load) for load in row] or None for row in head_loads(found)]
    if any(found.expert_loads):
        told[EXPERT_LOAD] = [[_short(load) for load in row] or None for row in found.expert_loads]
    for name in BY_LAYER:
        told[name] = [_short(value) for value in getattr(found, name).tolist()]
    return told


def spectral(norms: dict[str, tuple[float, float]]) -> dict[str, dict[str, float | int | None]]:
    """Of reparametrised matrices by name, `sigma`, the norm of W, and `gain`, that of what is multiplied."""
    if not norms:
        return {}
    return {key: {name: _short(pair[place]) for name, pair in norms.items()} for place, key in enumerate(SPECTRAL)}


def _short(value: float) -> float | int | None:
    """With as many digits as are worth keeping; null where it is no number."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def layer_means(diagnostics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(`attention_entropy/layer_00`, value), ...: the mean over heads of each layer, for what draws single numbers; the
    least load of a head, the least and largest of an expert, and `sigma` and `gain` of each matrix."""
    for key in SPECTRAL:
        yield from ((f"{key}/{name}", value) for name, value in diagnostics.get(key, {}).items() if value is not None)
    for layer, row in enumerate(diagnostics.get(LOAD, [])):
        if row:
            yield f"head_load_min/layer_{layer:02d}", min(row)
    for layer, row in enumerate(diagnostics.get(EXPERT_LOAD, [])):
        if row:
            yield f"expert_load_min/layer_{layer:02d}", min(row)
            yield f"expert_load_max/layer_{layer:02d}", max(row)
    for name in (*BY_HEAD, *BY_LAYER):
        if name == "sink_argmax":
            continue  # a mean of places means nothing
        prefix = name if name in BY_LAYER else f"attention_{name}"
        for layer, row in enumerate(diagnostics.get(name, [])):
            numbers = [value for value in (row if isinstance(row, list) else [row]) if value is not None]
            if numbers:
                yield f"{prefix}/layer_{layer:02d}", sum(numbers) / len(numbers)
