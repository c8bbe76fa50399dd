"""Checkpoints: written beside training, complete or not there at all, read back into any layout.

A step's folder is written as `step-N.partial/`, its manifest last, and then renamed. An older checkpoint is deleted
only when a newer one is complete. Entries are tensors only; everything else stands in JSON or TOML beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from model.folders import MANIFEST, describe_files, step_folder, step_folders, step_of
from model.fragments import SavePlanner
from model.hf.source import Source, StepFolder
from model.order import change_of, orders_of
from model.shards import read_tensors, tensor_shapes
from parallel.data import fill
from parallel.processes import from_first_rank, gathered_on_first_rank, group_beside_training
from parallel.spread import Spread
from trainer.config import CheckpointConfig


@dataclass
class Counters:
    """How far a run has come: all the state there is beside weights and optimizer.

    The batch, the learning rate and every random number are functions of these counters and the configuration.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def training_state(model: Spread, optimizer: torch.optim.Optimizer, counters: Counters) -> dict[str, Any]:
    """Everything a checkpoint holds, as tensors by global name, each as a part of the whole model's; loading writes
    into the same tensors."""
    moments = {}
    # ZeRO puts it together anew each time that it is asked for.
    states = optimizer.state
    for name, parameter in model.learned.items():
        if parameter in states:
            # AdamW's count of steps is one number; the rest is shaped like the parameter.
            moments[name] = {
                key: value if value.ndim == 0 else model.whole(name, value) for key, value in states[parameter].items()
            }
    counts = {key: torch.tensor(value, dtype=torch.int64) for key, value in asdict(counters).items()}
    state = {"model": model.whole_parameters(), "optimizer": moments, "counters": counts}
    beside = model.beside | model.kept
    return state | ({"beside": beside} if beside else {})


def load_training_state(folder: Path, model: Spread, optimizer: torch.optim.Optimizer) -> Counters:
    """Read a step folder into the model and the optimizer, in whatever layout they are. Collective.

    A parameter that was frozen when the folder was written (`run.freeze` may change), or updated by another optimizer,
    starts with a fresh optimizer state; of one that is frozen now, the stored state is left unread. What did not stand
    beside the model then, or in another shape, begins anew, and leaves the model as it is.
    """
    state = training_state(model, optimizer, Counters())
    stored = tensor_shapes(folder, "optimizer.")
    state["optimizer"] = {
        name: moments
        for name, moments in state["optimizer"].items()
        if all(f"{name}.{key}" in stored for key in moments)
    }
    shapes = tensor_shapes(folder, "beside.")
    beside = {name: x for name, x in (model.beside | model.kept).items() if shapes.get(name) == tuple(x.shape)}
    read_tensors(state | {"beside": beside}, folder)
    if not model.kept.keys() <= beside.keys():
        model.reparam.begin(as_they_are=True)
    model.update_copies()
    return Counters(**{key: int(value) for key, value in state["counters"].items()})


def load_weights(source: Source, model: Spread) -> None:
    """Read only the weights of MODEL into a model, in whatever layout it is. Collective."""
    weights, parameters = source.weights(model.architecture), model.whole_parameters()
    if isinstance(source, StepFolder):
        theirs = orders_of(source.tables)
        changes = {name: change_of(model.architecture, name, theirs) for name in parameters}
        moved = {name: change for name, change in changes.items() if change is not None}
        read_tensors({"model": {name: x for name, x in parameters.items() if name not in moved}}, source.folder)
        fill({name: parameters[name] for name in moved}, lambda name: moved[name].apply(weights.read([name])[name]))
    else:
        fill(parameters, lambda name: weights.read([name])[name])
    model.update_copies()


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time, while training goes on.

    Args:
        describe: makes the files beside the shards (config, tokenizer) in the folder it is given; first rank only.
        report: told of events: (name, details).
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        describe: Callable[[Path], dict[str, Any]],
        report: Callable[..., None],
    ):
        self.run_dir, self.config, self.describe, self.report = run_dir, config, describe, report
        # A group of its own: these collectives run beside those of training.
        self.group = group_beside_training()
        self.background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.saved_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint after this update."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state and begin to write it; returns before it is durable. Collective.

        Raises:
            RuntimeError: the save before this one failed and `checkpoint.on_failure` is "stop".
        """
        self.wait()
        self.saved_step = step
        final = step_folder(self.run_dir, step)
        partial = final.with_name(final.name + ".partial")
        self.report("checkpoint_requested", step=step)
        failure = _make_room(partial) if dist.get_rank() == 0 else None
        if (failure := from_first_rank(failure, self.group)) is not None:
            self.pending = Future()
            self.pending.set_exception(OSError(failure))
            return
        writer = dcp.FileSystemWriter(partial)
        response = dcp.async_save(state, storage_writer=writer, planner=SavePlanner(), process_group=self.group)
        assert isinstance(response, Future)
        self.pending = self.background.submit(self._finish, response, partial, final, step, time.monotonic())

    def wait(self, *, must_succeed: bool = False) -> None:
        """Until what was begun is durable, or has failed.

        Raises:
            RuntimeError: it has failed, and either `checkpoint.on_failure` is "stop" or it had to succeed: a run that
                ends without its last checkpoint has not ended well.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            self.report("checkpoint_failed", step=self.saved_step, reason=str(error))
            self.saved_step = None
            if must_succeed or self.config.on_failure == "stop":
                raise RuntimeError(f"writing a checkpoint failed: {error}") from error

    def close(self) -> None:
        """Wait, and end the background thread."""
        self.wait()
        self.background.shutdown()

    def _finish(self, written: Future[Any], partial: Path, final: Path, step: int, begun: float) -> None:
        """Beside training, on every rank: hash what this rank wrote; the first rank completes the folder."""
        written.result()
        rank = dist.get_rank()
        described: dict[str, Any] | str
        try:
            described = describe_files(partial, sorted(partial.glob(f"__{rank}_*.distcp")))
        except OSError as error:
            described = f"rank {rank}: {error}"
        gathered = gathered_on_first_rank(described, self.group)
        failure = None
        if gathered is not None:
            try:
                self._complete(gathered, partial, final, step)
                self.report("checkpoint_durable", step=step, seconds=round(time.monotonic() - begun, 3))
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        # All ranks agree on how it ended, so that all go on or all stop.
        if (failure := from_first_rank(failure, self.group)) is not None:
            raise RuntimeError(failure)

    def _complete(self, gathered: list[dict[str, Any] | str], partial: Path, final: Path, step: int) -> None:
        if failures := [part for part in gathered if isinstance(part, str)]:
            raise OSError("; ".join(failures))
        facts = self.describe(partial)
        own = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.suffix != ".distcp"]
        files = describe_files(partial, own)
        for part in gathered:
            assert isinstance(part, dict)
            files |= part
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps({"step": step, **facts, "files": files}, indent=1))
        _flush(manifest)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(final.parent)
        self._delete_old(step)

    def _delete_old(self, newest: int) -> None:
        folders = [folder for folder in step_folders(self.run_dir) if (step_of(folder) or 0) <= newest]
        for folder in folders[self.config.keep_last :]:
            step = step_of(folder) or 0
            if self.config.keep_every and step % self.config.keep_every == 0:
                continue
            # Without its manifest it is no checkpoint any more, however much of it is left.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _make_room(partial: Path) -> str | None:
    """An empty folder to write into; or why there is none."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(run_dir: Path) -> list[str]:
    """Delete what interrupted saves and deletions left behind; the names of the folders removed."""
    leftovers = [
        folder
        for folder in sorted((run_dir / "checkpoints").glob("step-*"))
        if folder.name.endswith(".partial") or not (folder / MANIFEST).exists()
    ]
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in leftovers]


def remove_later(run_dir: Path, step: int) -> list[str]:
    """Delete step folders after `step`: damaged ones, or those of a history that is being rewritten."""
    later = [folder for folder in step_folders(run_dir) if (step_of(folder) or 0) > step]
    for folder in later:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in later]
