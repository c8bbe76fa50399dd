"""`headway eval MODEL --data PREFIX`"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Arguments:
    """Loss, perplexity and bits per byte, in total and per source."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder or a step folder."""
    data: list[str] = field(default_factory=list)
    """Prefixes of prepared data. Default: what the run validates on."""
    baselines: bool = False
    """Also unigram and bigram models counted on the run's training data, on the same tokens."""
    batch_size: int = 8
    """Sequences at a time."""
    seq_len: int | None = None
    """Tokens in a sequence. Default: that of training."""
    out: Path | None = None
    """Also write the figures there, as JSON; RUN/evaluation.json enters the report."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    allow_code: bool = False
    """Import layer classes that the checkpoint's configuration names by path."""


def evaluate(argv: list[str]) -> int:
    """Print a table; returns the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="headway eval", config=(tyro.conf.FlagCreatePairsOff,))
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} must be at least 1.")
    if arguments.seq_len is not None and arguments.seq_len < 1:
        raise ValueError(f"--seq-len {arguments.seq_len} must be at least 1.")
    from rich.console import Console
    from rich.table import Table

    from model.files import write_json
    from trainer.evaluation import evaluate as score

    rows = [
        found.row()
        for found in score(
            arguments.model,
            arguments.data,
            baselines=arguments.baselines,
            batch_size=arguments.batch_size,
            seq_len=arguments.seq_len,
            device=arguments.device,
            allow_code=arguments.allow_code,
        )
    ]
    table = Table("", "nats per token", "perplexity", "bits per byte", "tokens")
    for row in rows:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        loss, perplexity = f"{row['nats_per_token']:.4f}", f"{row['perplexity']:.3f}"
        table.add_row(row["name"], loss, perplexity, bits, f"{row['tokens']:,}")
    Console().print(table)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, rows)
    return 0
