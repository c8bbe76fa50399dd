"""`headway eval MODEL --data PREFIX`, `headway eval MODEL --tasks NAME_OR_FOLDER`"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Arguments:
    """Loss, perplexity and bits per byte, in total and per source; tasks of lm-evaluation-harness."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder."""
    data: list[str] = field(default_factory=list)
    """Prefixes of prepared data. Default: what the run validates on; nothing where there are --tasks."""
    tasks: Annotated[list[str], tyro.conf.arg(metavar="NAME_OR_FOLDER...")] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, or folders of YAML files that define some. Nothing is fetched, unless
    HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 are set."""
    limit: int | None = None
    """Only the first so many examples of each task."""
    baselines: bool = False
    """Also unigram and bigram models counted on the run's training data, on the same tokens."""
    batch_size: int = 8
    """Sequences at a time."""
    seq_len: int | None = None
    """Tokens in a sequence of data. Default: that of training."""
    out: Path | None = None
    """Also write the figures there, as JSON; RUN/evaluation.json, made without --tasks, enters the report."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    allow_code: bool = False
    """Import layer classes that the checkpoint's configuration names by path."""


def evaluate(argv: list[str]) -> int:
    """Print tables; returns the exit code.

    Raises:
        ValueError: what cannot be evaluated, in a sentence.
    """
    arguments = tyro.cli(Arguments, args=argv, prog="headway eval", config=(tyro.conf.FlagCreatePairsOff,))
    _check(arguments)
    from rich.console import Console

    from model.files import write_json

    # Tasks first: what cannot be run is known before the long work begins.
    tasks = _score_tasks(arguments) if arguments.tasks else None
    rows = _score_data(arguments) if arguments.data or tasks is None else None
    if rows is not None:
        Console().print(_data_table(rows))
    if tasks is not None:
        Console().print(_tasks_table(tasks))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: part for name, part in (("data", rows), ("tasks", tasks)) if part is not None}
        write_json(arguments.out, rows if tasks is None else parts)
    return 0


def _check(arguments: Arguments) -> None:
    for flag, value in (
        ("--batch-size", arguments.batch_size),
        ("--seq-len", arguments.seq_len),
        ("--limit", arguments.limit),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value} must be at least 1.")
    if arguments.limit is not None and not arguments.tasks:
        raise ValueError("--limit counts examples of tasks: give --tasks, or leave it out.")
    flags = {"--baselines": arguments.baselines, "--seq-len": arguments.seq_len is not None}
    unused = [flag for flag, given in flags.items() if given]
    if unused and arguments.tasks and not arguments.data:
        raise ValueError(f"{' and '.join(unused)}: with --tasks, data is scored only where --data names it.")


def _score_data(arguments: Arguments) -> list[dict[str, Any]]:
    from trainer.evaluation import evaluate as score

    found = score(
        arguments.model,
        arguments.data,
        baselines=arguments.baselines,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        device=arguments.device,
        allow_code=arguments.allow_code,
    )
    return [one.row() for one in found]


def _score_tasks(arguments: Arguments) -> dict[str, dict[str, Any]]:
    from trainer.tasks import evaluate_tasks

    return evaluate_tasks(
        arguments.model,
        arguments.tasks,
        batch_size=arguments.batch_size,
        device=arguments.device,
        limit=arguments.limit,
        allow_code=arguments.allow_code,
    )


def _data_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("", "nats per token", "perplexity", "bits per byte", "tokens")
    for row in rows:
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        loss, perplexity = f"{row['nats_per_token']:.4f}", f"{row['perplexity']:.3f}"
        table.add_row(row["name"], loss, perplexity, bits, f"{row['tokens']:,}")
    return table


def _tasks_table(tasks: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("task", "examples", "metric", "value", "stderr")
    for name, task in tasks.items():
        examples = "-" if task["examples"] is None else f"{task['examples']:,}"
        for metric, found in task["metrics"].items():
            stderr = "-" if found["stderr"] is None else f"{found['stderr']:.4f}"
            table.add_row(name, examples, metric, f"{found['value']:.4f}", stderr)
    return table
