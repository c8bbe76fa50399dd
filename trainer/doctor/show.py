"""The report in a terminal: a table for each subject, then what stands in the way, and what is worth knowing."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trainer.doctor.finding import Finding


def show(report: Mapping[str, list[Finding]], console: Console) -> None:
    """Print it."""
    for subject, findings in report.items():
        console.print(_table(subject, findings))
    everything = [finding for findings in report.values() for finding in findings]
    _sentences("In the way", [one.fault for one in everything if one.fault], "red", console)
    _sentences("Worth knowing", [one.hint for one in everything if one.hint], "yellow", console)
    if not any(one.fault for one in everything):
        console.print(Text("Nothing stands in the way of training.", "green"))


def _table(subject: str, findings: list[Finding]) -> Table:
    table = Table(title=subject, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(width=1)
    table.add_column(width=22, overflow="fold")
    table.add_column(ratio=4, overflow="fold")
    table.add_column(ratio=6, overflow="fold")
    table.expand = True
    for one in findings:
        mark = "[red]x[/red]" if one.fault else "[yellow]![/yellow]" if one.hint else ""
        table.add_row(mark, escape(one.what), escape(one.found), escape(one.meaning))
    return table


def _sentences(title: str, sentences: list[str], colour: str, console: Console) -> None:
    if not sentences:
        return
    console.print(Text(title, f"bold {colour}"))
    # Sentences hang on their dashes.
    listed = Table.grid(padding=(0, 1))
    for sentence in sentences:
        listed.add_row(" -", Text(sentence, overflow="fold"))
    console.print(listed)
    console.print()
