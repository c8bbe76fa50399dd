"""One HTML page about one run, made from what the run folder holds: no network, no chart library, no server."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.report.page import page
from trainer.report.read import read_run

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Writes `RUN/report.html` and returns its path. A run that is still going may be reported on at any moment.

    Raises `ValueError` when `run_dir` is not a run folder.
    """
    html = page(read_run(run_dir))
    path = run_dir / "report.html"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)
    return path
