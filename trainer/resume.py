"""Before anything is built: where a run starts from, and whether it may."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import VARIABLE, parse_wishes, refusals
from model.folders import check_files, newest_complete, read_manifest, step_of
from model.settings import without_none
from trainer.config import FREE_SECTIONS, SECTIONS, Config, Refused, default_precision


@dataclass
class Plan:
    """What the first rank decided for all.

    Attributes:
        resume_from: the step folder to continue, if any; init_from: the folder to take only weights from.
        precision: of matrix products.
        cache_dir: where the data order is kept; samples: over how many it is fixed.
        fingerprint: of the data. already_done: a sentence, when there is nothing left to do.
    """

    resume_from: Path | None = None
    init_from: Path | None = None
    precision: str = "fp32"
    cache_dir: Path = Path()
    samples: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    already_done: str = ""
    notes: list[str] = field(default_factory=list)


def make_plan(config: Config) -> Plan:
    """Decide where to start from. The first rank's business; it needs no process group.

    Raises:
        Refused: everything that stands against this start, at once.
    """
    run_dir = Path(config.run.dir)
    plan = Plan(precision=default_precision(config.run.precision))
    plan.cache_dir = Path(config.data.cache_dir) if config.data.cache_dir else run_dir / "cache"
    plan.fingerprint = _fingerprint(config)
    faults = _choose_start(config, run_dir, plan) + _kernel_faults(config, plan.precision)
    if plan.resume_from is not None:
        faults += _resume_faults(config, plan)
    elif config.model.init_from is not None:
        faults += _initial_weights(config, plan)
    if faults:
        raise Refused(faults, seen_by_all=False)
    plan.samples = config.samples
    return plan


def _kernel_faults(config: Config, precision: str) -> list[str]:
    """What is asked of kernels and cannot be had on this machine."""
    from parallel.spread import DTYPES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = torch.empty(0, dtype=DTYPES[precision], device=device)
    faults = refusals(parse_wishes(config.run.kernels), like)
    return [f"run.kernels or {VARIABLE}: {fault}" for fault in faults]


def _fingerprint(config: Config) -> dict[str, Any]:
    from trainer.data.fingerprint import fingerprint

    untie = config.architecture.untie
    return fingerprint(config.data, seed=config.run.seed, samples=config.samples, untie=untie)


def _choose_start(config: Config, run_dir: Path, plan: Plan) -> list[str]:
    """Set `plan.resume_from`."""
    wanted = config.run.resume
    elsewhere = wanted not in ("auto", "never") and Path(wanted).resolve().parent.parent != run_dir.resolve()
    newest, passed_over = newest_complete(run_dir)
    if newest is not None and (_restarted() or elsewhere):
        # The same command again, by hand or by a scheduler, goes on: it does not begin a second time.
        wanted = "auto"
    if wanted == "never" and newest is not None:
        return [
            f'run.resume = "never", but {run_dir} holds {newest.name}: name another run.dir, '
            'or resume with run.resume = "auto".'
        ]
    if wanted not in ("auto", "never"):
        return _start_from(Path(wanted), plan)
    if newest is None and passed_over and wanted == "auto":
        return [f"{run_dir} has checkpoints, but none is whole; name another run.dir to start over.", *passed_over]
    plan.notes += [f"passed over a damaged checkpoint: {fault}" for fault in passed_over]
    plan.resume_from = newest
    return []


def _start_from(folder: Path, plan: Plan) -> list[str]:
    if step_of(folder) is None or not folder.is_dir():
        return [f'run.resume = "{folder}": expected "auto", "never" or a step folder (step-00000100).']
    plan.resume_from = folder
    return [f"run.resume: {fault}" for fault in check_files(folder, hashes=True)]


def _restarted() -> bool:
    """Whether torchrun or Slurm started this run anew after it had ended."""
    return any(int(os.environ.get(f"{name}_RESTART_COUNT") or 0) for name in ("TORCHELASTIC", "SLURM"))


def _resume_faults(config: Config, plan: Plan) -> list[str]:
    """How the checkpoint's configuration and data differ from this run's, where they must not."""
    from trainer.data.fingerprint import fingerprint_differences

    assert plan.resume_from is not None
    manifest = read_manifest(plan.resume_from)
    theirs = tomllib.loads((plan.resume_from / "config.toml").read_text())
    if "data" not in theirs:
        return [
            f"{plan.resume_from} holds weights, no optimizer and no place in the data, so no run goes on from it: "
            f'begin one with model.init_from = "{plan.resume_from}".'
        ]
    allowed = config.run.allow_change
    step = step_of(plan.resume_from) or 0
    plan.already_done = _nothing_left(config, theirs, step)
    if plan.already_done:
        return []
    if plan.precision != manifest["precision"]:
        plan.notes.append(f"run.precision was {manifest['precision']} and is {plan.precision}: the curve will differ.")
    samples = theirs["data"]["samples"]
    needed = config.schedule.steps * config.data.global_batch_size
    faults = []
    if needed > samples:
        faults.append(
            f"schedule.steps = {config.schedule.steps} needs {needed} samples, but the order of this run's data was "
            f"fixed for {samples} (data.samples) when it began, and another number would be another order: "
            f"steps can be at most {samples // config.data.global_batch_size}."
        )
    elif config.data.samples is None:
        # The default follows schedule.steps; a run that goes on keeps the order it began with.
        config.data.samples = samples
    changes = config_changes(theirs, config.tables())
    faults += [
        f"{key} is {json.dumps(was)} in the checkpoint, which keeps heads in that order: set it so."
        for key, (was, now) in changes.items()
        if key.endswith(".group_order")
    ]
    changes = {key: value for key, value in changes.items() if not any(_covers(entry, key) for entry in allowed)}
    faults += [
        f"{key}: {json.dumps(was)} -> {json.dumps(now)} (accept with --run.allow_change {key})"
        for key, (was, now) in changes.items()
        if (key != "data.samples" or needed <= samples) and not key.endswith(".group_order")
    ]
    plan.fingerprint = _fingerprint(config)
    if not any(entry.startswith("data") for entry in allowed):
        faults += fingerprint_differences(manifest["data"], plan.fingerprint)
    return faults


def _nothing_left(config: Config, theirs: dict[str, Any], step: int) -> str:
    if step >= config.schedule.steps and config.schedule.steps == theirs["schedule"]["steps"]:
        return f"{config.run.dir} is finished: {step} of {config.schedule.steps} steps are done."
    if config.run.stop_at_step is not None and step >= config.run.stop_at_step:
        return f"{config.run.dir} stands at step {step}; run.stop_at_step = {config.run.stop_at_step} asks for no more."
    return ""


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(allowed + ".")


def config_changes(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`key -> (was, is)` for every setting that differs outside the sections that may change."""
    before, after = _defaults() | _flat(was), _flat(now)
    keys = [key for key in before | after if key.split(".")[0] not in FREE_SECTIONS and key not in _NOT_COMPARED]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


# Where things lie is not what they are: the fingerprint compares the data itself.
_NOT_COMPARED = {"data.train", "data.validation", "data.tokenizer", "data.cache_dir"}


def _defaults() -> dict[str, Any]:
    """What a key stood at before there was such a key: a checkpoint may be older than the code."""
    found = {}
    for section, cls in SECTIONS.items():
        for key in fields(cls):
            value = key.default if key.default_factory is MISSING else key.default_factory()
            if value is not MISSING and value is not None:
                found[f"{section}.{key.name}"] = without_none(value)
    return found


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _initial_weights(config: Config, plan: Plan) -> list[str]:
    from model.hf.source import open_model

    assert config.model.init_from is not None
    try:
        source = open_model(config.model.init_from)
        source.weights(config.architecture)
    except ValueError as error:
        return [f"model.init_from: {error}"]
    plan.init_from = source.folder
    return []


def prepare_run_folder(config: Config, plan: Plan) -> None:
    """Make the run folder and write the resolved configuration. First rank only."""
    from trainer.checkpoint import remove_later, remove_leftovers

    run_dir = Path(config.run.dir)
    for name in ("checkpoints", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    plan.cache_dir.mkdir(parents=True, exist_ok=True)
    plan.notes += [f"removed {name}, left behind by an interrupted save" for name in remove_leftovers(run_dir)]
    if plan.resume_from is not None and plan.resume_from.parent == run_dir / "checkpoints":
        removed = remove_later(run_dir, step_of(plan.resume_from) or 0)
        plan.notes += [f"removed {name}: this run continues from {plan.resume_from.name}" for name in removed]
    partial = run_dir / "config.toml.partial"
    partial.write_text(config.to_toml())
    os.replace(partial, run_dir / "config.toml")


def checkpoint_files(folder: Path, config: Config, plan: Plan) -> dict[str, Any]:
    """Write what lies beside the shards in a step folder; returns what its manifest says beside the files."""
    from trainer.data.sidecar import recorded_tokenizer
    from trainer.data.tokenizer import load_tokenizer

    (folder / "config.toml").write_text(config.to_toml())
    tokenizer = config.data.tokenizer or recorded_tokenizer(config.data.training_sources()[0].path)
    if tokenizer is not None:
        (folder / "tokenizer").mkdir()
        load_tokenizer(tokenizer).copy_to(folder / "tokenizer")
    return {"data": plan.fingerprint, "precision": plan.precision}
