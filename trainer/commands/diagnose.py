"""`headway diagnose MODEL --data PREFIX`"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Arguments:
    """What attention does in every layer and head: entropy, sinks, largest logits, the residual stream."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder."""
    data: list[str] = field(default_factory=list)
    """Prefixes of prepared data; the first rows of each. Default: what the run validates on."""
    rows: int = 8
    """Sequences of each dataset."""
    seq_len: int | None = None
    """Tokens in a sequence. Default: that of training."""
    queries: int | None = None
    """Look at so many queries of each sequence, evenly spread. Default: all."""
    out: Path | None = None
    """Also write the figures there, as JSON, under the keys of metrics.jsonl."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    allow_code: bool = False
    """Import layer classes that the checkpoint's configuration names by path."""


def diagnose(argv: list[str]) -> int:
    """Print a table by layer, and numbers of the whole model; returns the exit code.

    Raises:
        ValueError: what cannot be diagnosed, in a sentence.
    """
    arguments = tyro.cli(Arguments, args=argv, prog="headway diagnose", config=(tyro.conf.FlagCreatePairsOff,))
    numbers = (("--rows", arguments.rows), ("--seq-len", arguments.seq_len), ("--queries", arguments.queries))
    if faults := [f"{flag} {value} must be at least 1." for flag, value in numbers if value is not None and value < 1]:
        raise ValueError(" ".join(faults))
    from rich.console import Console

    from model.files import write_json
    from trainer.diagnostics import record_of, unchosen
    from trainer.evaluation import diagnose as look

    found, tokens = look(
        arguments.model,
        arguments.data,
        rows=arguments.rows,
        seq_len=arguments.seq_len,
        num_queries=arguments.queries,
        device=arguments.device,
        allow_code=arguments.allow_code,
    )
    record = record_of(found)
    console = Console()
    console.print(_layer_table(found))
    for name, value in record.items():
        if name != "diagnostics":
            console.print(f"{name}  {'-' if value is None else f'{value:.4g}'}", highlight=False)
    console.print(f"tokens  {tokens:,}", highlight=False)
    if not any(found.heads):
        console.print("No layer has attention weights to look at: the mixers are linear ones.")
    elif found.sink_rate is None:
        console.print("No document of these rows has 64 tokens in one of them, so there is no sink rate.")
    for idle in unchosen(record):
        console.print(idle, highlight=False)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, record)
    return 0


def _layer_table(found: Any) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from trainer.diagnostics import head_loads

    head = ("layer", "entropy, nats", "lowest head", "normalised", "sinks", "largest logit", "first token gets")
    loads = {"least load": head_loads(found), "least expert load": found.expert_loads}
    loads = {title: rows for title, rows in loads.items() if any(rows)}
    # Ten columns may have to share 80 characters: words of a heading are broken before a number is.
    table = Table(*head, *loads, "largest residual", "first / median norm", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.pad_edge = False
    for column in table.columns:
        column.justify, column.overflow = "right", "fold"
    means = {name: [_mean(row) for row in found.rows(name)] for name in ("entropy", "entropy_norm", "first_weight")}
    lowest = [None if row is None else min(row) for row in found.rows("entropy")]
    largest = [None if row is None else max(row) for row in found.rows("logit_max")]
    for layer, heads in enumerate(found.heads):
        sinks = found.sink_rates[layer].item() if heads else None
        shown = (means["entropy"][layer], lowest[layer], means["entropy_norm"][layer])
        cells = [_cell(value) for value in shown] + [_cell(sinks, ".1%"), _cell(largest[layer], ".1f")]
        cells.append(_cell(means["first_weight"][layer], ".1%"))
        cells += [_cell(min(rows[layer], default=None), ".1%") for rows in loads.values()]
        cells.append(_cell(found.residual_max[layer].item(), ".4g"))
        table.add_row(str(layer), *cells, _cell(found.first_norm_ratio[layer].item(), ".2f"))
    return table


def _mean(row: list[float] | None) -> float | None:
    return None if row is None else sum(row) / len(row)


def _cell(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None or value != value else format(value, form)
