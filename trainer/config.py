"""The configuration: TOML tables and `--section.key VALUE` overrides, typed, with every fault listed at once."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from kernels.dispatch import parse_wishes
from model.config import Architecture, ModelConfig
from model.reparam import ReparamConfig, reparam_faults
from model.settings import architecture_tables, build, build_architecture, without_none
from model.stack import Model
from model.untie import UntieConfig
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults
from parallel.processes import Process
from trainer.data.config import DataConfig
from trainer.data.modalities import differing_ranges, unseen_modalities
from trainer.metrics import MetricsConfig
from trainer.objective import ObjectiveConfig
from trainer.profiling import profile_faults
from trainer.zero import zero_faults


class Refused(ValueError):
    """Something the user asked for cannot be done; the message lists every reason.

    `seen_by_all`: whether every rank finds a reason by itself; otherwise the others have to be told.
    """

    def __init__(self, faults: Sequence[str], *, seen_by_all: bool = True):
        self.faults, self.seen_by_all = list(faults), seen_by_all
        listed = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(
            f"This run is refused, for {len(self.faults)} reason{'s' if len(self.faults) != 1 else ''}:\n{listed}"
        )


@dataclass
class RunConfig:
    """`[run]`"""

    dir: str
    """The run folder."""
    seed: int = 0
    """Of initial weights and data order."""
    stop_at_step: int | None = None
    """Stop after this update with a checkpoint; the schedule is untouched."""
    precision: Literal["bf16", "fp32", "fp64"] | None = None
    """Of matrix products. Default: bf16 on GPUs, fp32 on CPUs. fp64 is for comparing layouts."""
    compile: bool = False
    """torch.compile, block by block."""
    fused_loss: bool = True
    """Head and cross-entropy as one operation over chunks of tokens, without ever holding the logits. Where tensor
    parallelism cuts the vocabulary, or a pipeline the model, they are held all the same."""
    kernels: list[str] = field(default_factory=list)
    """Which form of an operation runs, where the usual choice is not wanted: ["lightning=torch"], or "torch" alone, for
    all of them. `headway doctor` names operations, and what runs without this."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last step of which each rank writes a trace by torch's profiler to logs/. Default: none."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run."""
    freeze: list[str] = field(default_factory=list)
    """Patterns (`layers.0.*`) of parameters that are not trained; gradients still flow through them."""
    freeze_ids: list[int] = field(default_factory=list)
    """Token ids whose rows of embedding and head are not trained: first, one beyond the last, and so on. The other rows
    are, unless `freeze` has the whole matrix."""
    resume: str = "auto"
    """auto: from the newest complete checkpoint of the run folder; never: refuse a folder that has one; or the path of
    a step folder to go on from."""
    allow_change: list[str] = field(default_factory=list)
    """Keys outside [run] [parallel] [checkpoint] [metrics] that may differ from the checkpoint's."""

    @property
    def frozen_ids(self) -> list[tuple[int, int]]:
        """`freeze_ids` as pairs."""
        return list(zip(self.freeze_ids[::2], self.freeze_ids[1::2], strict=True))


@dataclass
class OptimizerConfig:
    """`[optimizer]`"""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW, with torch's fused update; or Muon for the matrices of layers, and AdamW for everything else."""
    lr: float = 3e-4
    """Peak learning rate, of AdamW and, times what adjust_lr says, of Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: decay of the first and second moments."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    momentum: float = 0.95
    """Muon: decay of the momentum."""
    nesterov: bool = True
    """Muon: take the gradient once more into what is orthogonalised (Nesterov's momentum)."""
    ns_steps: int = 5
    """Muon: Newton-Schulz iterations that orthogonalise an update."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Muon: the learning rate of a matrix [A, B] is lr times 0.2 sqrt(max(A, B)), so that its updates are as large as
    AdamW's and one lr serves both; or, as first published, times sqrt(max(1, A / B)), which asks for a larger lr."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 for none."""
    max_skipped_in_a_row: int = 10
    """Updates with a non-finite loss or gradient are skipped; after this many in a row the run fails."""


@dataclass
class ScheduleConfig:
    """`[schedule]`"""

    steps: int
    """Updates."""
    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and decays at the end."""
    warmup_steps: int = 0
    """Linear warm-up; clipped, with a warning, when longer than the run."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step as a part of the peak."""
    decay_fraction: float = 0.2
    """wsd: the last part of the run in which the learning rate falls."""


@dataclass
class CheckpointConfig:
    """`[checkpoint]`"""

    every_steps: int = 0
    """0: only where the run ends or stops."""
    keep_last: int = 3
    """Newest complete checkpoints to keep."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this; 0: none."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When a save fails (disk full): warn and train on, the older checkpoint being intact, or stop the run."""


SECTIONS: dict[str, type] = {
    "run": RunConfig,
    "reparam": ReparamConfig,
    "objective": ObjectiveConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "parallel": ParallelConfig,
    "checkpoint": CheckpointConfig,
    "metrics": MetricsConfig,
}
SHORTEST_NODE_TIMEOUT = 5.0
"""Python itself may hold a process for seconds."""
MODEL_SECTIONS = ("model", "mixers", "feedforwards", "untie")
FREE_SECTIONS = ("run", "parallel", "checkpoint", "metrics")
"""Sections that may change when a run resumes."""


@dataclass
class Config:
    """A whole configuration, valid in itself. `tables` is its resolved TOML."""

    run: RunConfig
    reparam: ReparamConfig
    objective: ObjectiveConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    architecture: Architecture
    warnings: list[str] = field(default_factory=list)

    @property
    def model(self) -> ModelConfig:
        return self.architecture.model

    @property
    def samples(self) -> int:
        """Over how many samples the data order is fixed."""
        return self.data.samples or self.schedule.steps * self.data.global_batch_size

    def tables(self) -> dict[str, Any]:
        """Nested tables of every setting, defaults included, that read back as the same configuration."""
        tables = {name: without_none(getattr(self, name)) for name in SECTIONS}
        tables["data"]["samples"] = self.samples
        return tables | architecture_tables(self.architecture)

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.tables())


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    allow_code: bool = True,
    process: Process | None = None,
    world_size: int | None = None,
) -> Config:
    """Read a TOML file, apply `--section.key VALUE` overrides, and check all that can be checked.

    Args:
        process: one that is to train by it: then the layout is checked too, and on the first rank the data's files.
        world_size: of a run that is only thought of: then the layout is checked, and no file is looked for.

    Raises:
        Refused: listing every fault of the file and the overrides at once.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in Path("configs").glob("*.toml")], n=1)
        hint = f" Did you mean configs/{near[0]}?" if near else ""
        raise Refused([f"{path} does not exist.{hint}"]) from None
    except tomllib.TOMLDecodeError as error:
        raise Refused([f"{path} is not TOML: {error}"]) from None
    return config_from_tables(tables, overrides, allow_code=allow_code, process=process, world_size=world_size)


def config_from_tables(
    tables: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    allow_code: bool = True,
    process: Process | None = None,
    world_size: int | None = None,
) -> Config:
    """As `load_config`, from tables already read (which are not changed)."""
    tables = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    faults = _apply_overrides(tables, overrides)
    known = [*SECTIONS, *MODEL_SECTIONS]
    for name in [name for name in tables if name not in known]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        faults.append(f"[{name}] is no section; the nearest known section is [{near[0]}].")
    for name in [name for name in tables if name in known and not isinstance(tables[name], dict)]:
        faults.append(f"{name} = {tables.pop(name)!r}: expected a [{name}] table.")
    faults += _take_model_from_source(tables)
    sections = {name: build(cls, name, tables.get(name, {}), faults) for name, cls in SECTIONS.items()}
    model, architecture = build_architecture(tables, faults, allow_code=allow_code)
    faults += _section_faults(sections, model)
    faults += _reparam_faults(sections, architecture)
    faults += _objective_faults(sections, architecture)
    world_size = process.world_size if process is not None else world_size
    if world_size is not None:
        faults += _layout_faults(sections, architecture, world_size)
    looks_at_files = process is not None and process.is_first
    untie = None if architecture is None else architecture.untie
    in_files = _file_faults(sections["data"], model, untie) if looks_at_files else []
    if faults or in_files:
        raise Refused(faults + in_files, seen_by_all=bool(faults))
    config = Config(architecture=architecture, **sections)  # type: ignore[arg-type]
    _clip_warmup(config)
    if looks_at_files and untie is not None:
        config.warnings += differing_ranges(config.data, untie) + unseen_modalities(config.data, untie)
    return config


def _apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write `--section.key VALUE` pairs into the tables; values are TOML where they can be read so, else text."""
    faults = []
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    index = 0
    while index < len(words):
        word = words[index]
        path = word.removeprefix("--").replace("-", "_").split(".")
        if not word.startswith("--") or len(path) < 2:
            faults.append(f"{word!r} is no override: write --section.key VALUE, for example --schedule.steps 100.")
            index += 1
            continue
        if index + 1 == len(words):
            faults.append(f"{word} has no value: write {word} VALUE.")
            break
        _set(tables, path, _read_value(words[index + 1]))
        index += 2
    return faults


def _read_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


_LISTS = {
    *("run.kernels", "run.profile_steps", "run.freeze", "run.freeze_ids", "run.allow_change"),
    *("model.pattern", "reparam.targets"),
    *("data.train", "data.validation", "metrics.sinks"),
}


def _set(tables: dict[str, Any], path: list[str], value: Any) -> None:
    table = tables
    for key in path[:-1]:
        inner = table.get(key)
        table[key] = dict(inner) if isinstance(inner, dict) else {}
        table = table[key]
    if ".".join(path) in _LISTS and not isinstance(value, list):
        value = [value]
    if path == ["run", "allow_change"]:
        value = [*table.get("allow_change", []), *value]
    table[path[-1]] = value


def _take_model_from_source(tables: dict[str, Any]) -> list[str]:
    """With `model.init_from`, what the model sections leave out is taken from that model's own configuration."""
    source = tables.get("model", {}).get("init_from")
    if not isinstance(source, str):
        return []
    from model.hf.source import open_model

    try:
        theirs = open_model(source).tables
    except (ValueError, OSError) as error:
        # A run that goes on no longer needs it; one that begins is refused when it looks for the weights.
        complete = {"d_model", "num_layers", "vocab_size"} <= tables["model"].keys()
        return [] if complete else [f"model.init_from = {source!r}: {error}"]
    faults = []
    tables["model"] = theirs["model"] | tables["model"]
    if untie := theirs.get("untie", {}) | tables.get("untie", {}):
        tables["untie"] = untie
    for section in ("mixers", "feedforwards"):
        ours = tables.get(section, {})
        merged = {name: _over(name, table, ours.get(name, {})) for name, table in theirs[section].items()}
        faults += [
            f"{section}.{name}.kind = {table['kind']!r} would import code that model.init_from names: write it into "
            "your own configuration if you trust it."
            for name, table in merged.items()
            if ":" in str(table.get("kind", "")) and "kind" not in ours.get(name, {})
        ]
        tables[section] = merged | {name: table for name, table in ours.items() if name not in merged}
    return faults


def _over(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A layer's table with our settings over theirs; those of another kind mean nothing here."""
    same = ours.get("kind", theirs.get("kind", name)) == theirs.get("kind", name)
    return theirs | ours if same else ours


def _section_faults(sections: dict[str, Any], model: ModelConfig | None) -> list[str]:
    """What a section's types do not say. Sections that could not be read are None and left out."""
    faults = []
    if (run := sections["run"]) is not None:
        if not run.dir:
            faults.append('run.dir is missing: name the run folder, for example "runs/first".')
        faults += _frozen_id_faults(run, model)
        if run.stop_at_step is not None and run.stop_at_step < 1:
            faults.append(f"run.stop_at_step = {run.stop_at_step} must be at least 1.")
        faults += profile_faults(run.profile_steps) + _kernel_faults(run.kernels)
    if (optimizer := sections["optimizer"]) is not None:
        faults += _optimizer_faults(optimizer)
    if (schedule := sections["schedule"]) is not None:
        if schedule.steps < 1:
            faults.append(f"schedule.steps = {schedule.steps} must be at least 1.")
        if schedule.warmup_steps < 0:
            faults.append(f"schedule.warmup_steps = {schedule.warmup_steps} must not be negative.")
        for key in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(schedule, key) <= 1:
                faults.append(f"schedule.{key} = {getattr(schedule, key)} must lie between 0 and 1.")
    if (checkpoint := sections["checkpoint"]) is not None:
        faults += [
            f"checkpoint.{key} = {getattr(checkpoint, key)} must be at least {least}."
            for key, least in (("every_steps", 0), ("keep_last", 1), ("keep_every", 0))
            if getattr(checkpoint, key) < least
        ]
    if (parallel := sections["parallel"]) is not None and not (
        parallel.node_timeout == 0 or SHORTEST_NODE_TIMEOUT <= parallel.node_timeout < math.inf
    ):
        faults.append(
            f"parallel.node_timeout = {parallel.node_timeout:g} must be at least {SHORTEST_NODE_TIMEOUT:g} (seconds), "
            "or 0, which waits for ever."
        )
    for name in ("data", "metrics"):
        if sections[name] is not None:
            faults += sections[name].faults()
    data = sections["data"]
    if data is not None and model is not None and model.positions == "learned" and data.seq_len > model.max_positions:
        faults.append(f"data.seq_len = {data.seq_len} is more than model.max_positions = {model.max_positions}.")
    return faults


def _frozen_id_faults(run: RunConfig, model: ModelConfig | None) -> list[str]:
    ids = run.freeze_ids
    if len(ids) % 2 or any(first >= end or first < 0 for first, end in run.frozen_ids):
        return [f"run.freeze_ids = {ids} must be pairs of a first id and a larger one beyond the last."]
    if model is not None and ids and max(ids) > model.vocab_size:
        return [f"run.freeze_ids = {ids} reaches beyond model.vocab_size = {model.vocab_size}."]
    return []


def _kernel_faults(wishes: list[str]) -> list[str]:
    try:
        parse_wishes(wishes)
    except ValueError as fault:
        return [f"run.kernels = {wishes}: {fault}"]
    return []


def _reparam_faults(sections: dict[str, Any], architecture: Architecture | None) -> list[str]:
    """Whether matrices of this model can be reparametrised so, and trained so."""
    reparam, run, optimizer = (sections[name] for name in ("reparam", "run", "optimizer"))
    if reparam is None or reparam.kind == "none":
        return []
    faults = []
    if optimizer is not None and optimizer.kind == "muon" and not reparam.decay:
        faults.append(
            'reparam.decay = false, but with optimizer.kind = "muon" one weight_decay serves all matrices of layers: '
            "set optimizer.weight_decay = 0."
        )
    if architecture is None:
        return faults + reparam.faults()
    with torch.device("meta"):
        model = Model(architecture)
    frozen = [] if run is None else run.freeze
    return faults + reparam_faults(model, reparam, has_weights=architecture.model.init_from is not None, frozen=frozen)


def _objective_faults(sections: dict[str, Any], architecture: Architecture | None) -> list[str]:
    """What the objective cannot be with this model and the other sections; what could not be read is left out."""
    objective, run, optimizer = sections["objective"], sections["run"], sections["optimizer"]
    if objective is None:
        return []
    return objective.faults(
        None if architecture is None else [architecture.mixers[name][0] for name in architecture.mixer_names],
        compiled=run is not None and run.compile,
        lr=None if optimizer is None else optimizer.lr,
    )


def _layout_faults(sections: dict[str, Any], architecture: Architecture | None, world_size: int) -> list[str]:
    """Whether so many processes can carry it; left out where the sections that say so could not be read."""
    parallel, data = sections["parallel"], sections["data"]
    if architecture is None or parallel is None or data is None:
        return []
    shape: dict[str, Any] = {
        name: getattr(data, name) for name in ("seq_len", "global_batch_size", "isolate_documents")
    }
    run = sections["run"]
    faults = layout_faults(parallel, world_size, architecture, **shape, compiled=run is not None and run.compile)
    return faults + zero_faults(sections, world_size, default_precision(None if run is None else run.precision))


def default_precision(asked: str | None) -> str:
    """Of matrix products, where the configuration does not say: bf16 on GPUs, fp32 on CPUs."""
    return asked or ("bf16" if torch.cuda.is_available() else "fp32")


def _file_faults(data: DataConfig | None, model: ModelConfig | None, untie: UntieConfig | None) -> list[str]:
    from trainer.data.check import check_sources

    if data is None or data.faults():
        return []
    return check_sources(data, None if model is None or model.vocab_size < 1 else model.vocab_size, untie)


def _optimizer_faults(optimizer: OptimizerConfig) -> list[str]:
    faults = [
        f"optimizer.{key} = {getattr(optimizer, key)} must not be negative."
        for key in ("lr", "eps", "weight_decay", "grad_clip")
        if getattr(optimizer, key) < 0
    ]
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        faults.append(f"optimizer.betas = {list(optimizer.betas)} must lie in [0, 1).")
    if not 0 <= optimizer.momentum < 1:
        faults.append(f"optimizer.momentum = {optimizer.momentum} must lie in [0, 1), for example 0.95.")
    if optimizer.ns_steps < 1:
        faults.append(f"optimizer.ns_steps = {optimizer.ns_steps} must be at least 1; 5 is usual.")
    if optimizer.max_skipped_in_a_row < 1:
        faults.append(f"optimizer.max_skipped_in_a_row = {optimizer.max_skipped_in_a_row} must be at least 1.")
    return faults


def _clip_warmup(config: Config) -> None:
    schedule = config.schedule
    if schedule.warmup_steps > schedule.steps:
        config.warnings.append(
            f"schedule.warmup_steps = {schedule.warmup_steps} is longer than the run: clipped to {schedule.steps}."
        )
        schedule.warmup_steps = schedule.steps
