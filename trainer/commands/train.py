"""`headway train CONFIG.toml [--section.key VALUE ...]`"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli import FAILED, REFUSED

if TYPE_CHECKING:
    from parallel.processes import Process
    from parallel.watch import LostNode, NodeWatch
    from trainer.config import Config
    from trainer.resume import Plan
    from trainer.signals import StopRequest
    from trainer.status import Status


def train(argv: list[str]) -> int:
    """Train; returns the exit code. Raises ValueError for what is refused."""
    if not argv or argv[0] in ("-h", "--help"):
        return _help()
    if argv[0].startswith("--"):
        raise ValueError(f"{argv[0]} stands where CONFIG.toml comes first: headway train CONFIG.toml {argv[0]} ...")
    # The first thing of all: a signal must find us whatever we are doing.
    from trainer.signals import StopRequest

    with StopRequest() as stop:
        return _train(Path(argv[0]), argv[1:], stop)


def _train(path: Path, overrides: list[str], stop: StopRequest) -> int:
    from parallel.processes import from_first_rank, process_group, this_process
    from trainer.config import Refused, load_config

    process = this_process()
    plan: Plan | None = None
    failure: Exception | None = None
    try:
        config = load_config(path, overrides, process=process)
        if process.is_first:
            plan = _plan(config)
    except Exception as error:
        seen_by_all = isinstance(error, Refused) and error.seen_by_all
        if seen_by_all and not process.is_first:
            # The first rank says it; torchrun ends it as soon as one rank is gone.
            time.sleep(2)
            return REFUSED
        if seen_by_all or not process.is_first or process.world_size == 1:
            raise
        failure = error
    with process_group(process):
        # A first rank that has failed still joins, to tell the others: they would wait for it until they are killed.
        plan = from_first_rank(plan)
        if failure is not None:
            raise failure
        return REFUSED if plan is None else _train_together(config, plan, process, stop)


def _plan(config: Config) -> Plan:
    """Where to start from, and the run folder made ready for it."""
    from trainer.resume import make_plan, prepare_run_folder

    plan = make_plan(config)
    if plan.already_done:
        print(plan.already_done, file=sys.stderr)
    else:
        prepare_run_folder(config, plan)
    return plan


def _train_together(config: Config, agreed: Plan, process: Process, stop: StopRequest) -> int:
    """With a process group: train by the agreed plan, and say how it ended."""
    from parallel.watch import watch_nodes
    from trainer.status import Status

    if agreed.already_done:
        return 0
    _check_shared_folder(config, process)
    # The order of the samples is part of the plan: the first rank may have taken it from a checkpoint.
    config.data.samples = agreed.samples
    status = Status(Path(config.run.dir), is_first=process.is_first)
    status.checkpoint = agreed.resume_from.name if agreed.resume_from is not None else None

    def say(loss: LostNode) -> None:
        print(f"rank {process.rank}: {loss}", file=sys.stderr, flush=True)
        status.fail(process, loss)

    with watch_nodes(process, config.parallel.node_timeout, on_loss=say, exit_code=FAILED) as watch:
        return _train_watched(config, agreed, process, stop, status, watch)


def _train_watched(
    config: Config, agreed: Plan, process: Process, stop: StopRequest, status: Status, watch: NodeWatch | None
) -> int:
    from trainer.loop import train as train_loop
    from trainer.planning.out_of_memory import OutOfMemory
    from trainer.run import open_run

    try:
        with open_run(config, agreed, process, stop, status) as run:
            status.set("running")
            status.event("resumed" if agreed.resume_from else "started", step=run.counters.step)
            for note in [*config.warnings, *agreed.notes]:
                status.event("warning", reason=note)
                run.progress.note(note)
            ending = train_loop(run)
    except ValueError:
        raise
    except BaseException as error:
        cause = _cause(error, config, agreed, process, watch)
        status.fail(process, cause, is_cause=isinstance(cause, OutOfMemory))
        if cause is error:
            raise
        raise cause from error
    reason = {"finished": "all steps done", "stopped": "run.stop_at_step", "preempted": _preemption(stop)}[ending]
    status.event(ending, step=run.counters.step, reason=reason)
    status.set(ending, reason)
    return 0


def _cause(
    error: BaseException, config: Config, agreed: Plan, process: Process, watch: NodeWatch | None
) -> BaseException:
    """What is behind an error: memory that has ended, a node that is lost, or itself."""
    from trainer.planning.out_of_memory import OutOfMemory, explain, is_out_of_memory

    if is_out_of_memory(error):
        error = OutOfMemory(explain(error, config, agreed.precision, process))
    loss = None if watch is None else watch.explain(error)
    return loss or error


def _preemption(stop: StopRequest) -> str:
    return f"signal {stop.signal_name}" if stop.requested else "a signal to another rank"


def _check_shared_folder(config: Config, process: Process) -> None:
    """Every rank must see the folder that the first one made."""
    from parallel.data import sum_over_ranks
    from trainer.config import Refused

    seen = (Path(config.run.dir) / "config.toml").is_file()
    if missing := int(sum_over_ranks([0.0 if seen else 1.0])[0]):
        raise Refused(
            [
                f"run.dir = {config.run.dir} is not seen by {missing} of {process.world_size} processes: "
                "it must lie on a file system that all nodes share."
            ]
        )


def _help() -> int:
    """What the command takes, and every section and key."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    from trainer.describe import keys, sections

    console = Console(highlight=False)
    console.print(HELP, markup=False)
    for name, cls in sections().items():
        console.print(f"\n[{name.replace(' ', '] [')}]", style="bold", markup=False)
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        for key, kind, default, meaning in keys(cls):
            table.add_row(key, f"{meaning} ({kind}; {default})".replace("[", "\\["))
        console.print(Padding(table, (0, 0, 0, 2)))
    return 0


HELP = """usage: headway train CONFIG.toml [--section.key VALUE ...]

Trains; resumes by itself. Under torchrun: torchrun --nproc-per-node 4 -m trainer train CONFIG.toml

CONFIG.toml is a preset (see configs/) or your own file. An override replaces what stands in it; \
VALUE is TOML where it can be read so (true, 3e-4, [1, 2]), else text. Layers are overridden as \
--mixers.NAME.key VALUE. Every key, with its meaning, type and default:"""
