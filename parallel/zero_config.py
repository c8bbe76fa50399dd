"""What DeepSpeed is told, and which layouts its engine carries. Nothing here imports DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.config import ParallelConfig

DEFAULT_STAGE = 2
OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
"""Our key -> DeepSpeed's, under `zero_optimization`."""


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed cuts and where it keeps what it has cut.

    Attributes:
        stage: 1 cuts optimizer states, 2 gradients too, 3 parameters too.
        offload_optimizer: "none", "cpu" or "nvme". offload_parameters: "none" or "cpu".
        nvme_dir: a folder on a fast disk.
        theirs: a user's own DeepSpeed JSON, once it has been held against the configuration.
    """

    stage: int = DEFAULT_STAGE
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    nvme_dir: str = ""
    theirs: dict[str, Any] = field(default_factory=dict)


def resolve_zero(config: ParallelConfig) -> ZeroConfig | None:
    """None for torch's engine. What the configuration leaves open is as the user's JSON says.

    Raises:
        ValueError: the JSON cannot be read.
    """
    if config.engine != "deepspeed":
        return None
    theirs = read_json(config.deepspeed_config)
    zero = _table(theirs, "zero_optimization")
    stage = config.zero_stage or given(zero, "stage") or DEFAULT_STAGE
    chosen = {ours: getattr(config, ours) or offload(zero, name) or "none" for ours, name in OFFLOADS.items()}
    nvme_dir = config.nvme_dir or given(_table(zero, "offload_optimizer"), "nvme_path") or ""
    return ZeroConfig(stage, nvme_dir=str(nvme_dir), theirs=theirs, **chosen)


def read_json(path: str) -> dict[str, Any]:
    """A DeepSpeed JSON; empty where no path is given.

    Raises:
        ValueError: it is missing, or no JSON object.
    """
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f'parallel.deepspeed_config = "{path}" cannot be read: {error.strerror}.') from None
    except ValueError as error:
        raise ValueError(f'parallel.deepspeed_config = "{path}" is not JSON: {error}.') from None
    if not isinstance(found, dict):
        raise ValueError(f'parallel.deepspeed_config = "{path}" holds {type(found).__name__}, expected an object.')
    return found


def given(table: dict[str, Any], key: str) -> Any:
    """A value; None where it is missing or "auto", as Hugging Face's integration writes what others are to decide."""
    value = table.get(key)
    return None if value == "auto" else value


def offload(zero: dict[str, Any], name: str) -> str | None:
    """Where a DeepSpeed JSON puts what it offloads; None where it does not say."""
    device = given(_table(zero, name), "device")
    return None if device is None else str(device)


def _table(tables: dict[str, Any], key: str) -> dict[str, Any]:
    found = tables.get(key)
    return found if isinstance(found, dict) else {}


def engine_faults(config: ParallelConfig, *, compiled: bool = False) -> list[str]:
    """Why this engine cannot carry this layout, all reasons; also of keys that the engine does not know."""
    if config.engine == "torch":
        keys = ("zero_stage", "offload_optimizer", "offload_parameters", "nvme_dir", "deepspeed_config")
        return [
            f'parallel.{key} = {json.dumps(value)} is DeepSpeed\'s: set parallel.engine = "deepspeed", or leave it out.'
            for key in keys
            if (value := getattr(config, key)) and value != "none"
        ]
    faults = []
    if importlib.util.find_spec("deepspeed") is None:
        faults.append(
            'parallel.engine = "deepspeed", but DeepSpeed is not installed: pip install -e ".[deepspeed]", '
            'or take engine = "torch".'
        )
    try:
        zero = resolve_zero(config)
    except ValueError as error:
        return [*faults, str(error)]
    assert zero is not None
    for name in ("tp", "pp", "cp", "ep"):
        if (size := getattr(config, name)) > 1:
            faults.append(
                f'parallel.{name} = {size} with engine = "deepspeed" (ZeRO {zero.stage}), which carries data '
                f'parallelism alone: set {name} = 1, or take engine = "torch", which has FSDP beside {name}.'
            )
    if config.dp_replicate > 1:
        faults.append(
            f'parallel.dp_replicate = {config.dp_replicate} with engine = "deepspeed": ZeRO cuts over all processes; '
            'set dp_replicate = 1, or take engine = "torch".'
        )
    return faults + _zero_faults(zero, compiled)


def _zero_faults(zero: ZeroConfig, compiled: bool) -> list[str]:
    """What of ZeRO's own choices does not go together."""
    faults = []
    if zero.stage not in (1, 2, 3):
        faults.append(f"zero_optimization.stage = {zero.stage}: expected 1, 2 or 3.")
    if zero.offload_parameters != "none" and zero.stage != 3:
        faults.append(
            f'parallel.offload_parameters = "{zero.offload_parameters}" needs zero_stage = 3, and it is {zero.stage}: '
            "below, every process has all parameters at work."
        )
    if zero.offload_optimizer == "nvme":
        faults += _nvme_faults(zero)
    elif zero.offload_optimizer not in ("none", "cpu"):
        faults.append(f'parallel.offload_optimizer = "{zero.offload_optimizer}": expected "none", "cpu" or "nvme".')
    if zero.offload_parameters not in ("none", "cpu"):
        faults.append(f'parallel.offload_parameters = "{zero.offload_parameters}": expected "none" or "cpu".')
    if compiled and zero.stage == 3:
        faults.append(
            "run.compile with parallel.zero_stage = 3: parameters come and go by hooks around every block, which a "
            "compiled block does not run; take compile = false, or zero_stage = 2."
        )
    return faults


def _nvme_faults(zero: ZeroConfig) -> list[str]:
    """Why optimizer states cannot wait on a disk."""
    faults = []
    if zero.stage != 3:
        faults.append(f'parallel.offload_optimizer = "nvme" needs zero_stage = 3, and it is {zero.stage}: take "cpu".')
    if not zero.nvme_dir:
        faults.append('parallel.offload_optimizer = "nvme" needs parallel.nvme_dir, a folder on a fast disk.')
    elif not Path(zero.nvme_dir).is_dir():
        faults.append(f'parallel.nvme_dir = "{zero.nvme_dir}" is no folder on this machine.')
    if importlib.util.find_spec("deepspeed") is not None and not _reads_asynchronously():
        faults.append(
            'parallel.offload_optimizer = "nvme": DeepSpeed\'s async_io does not build here. It needs a compiler and '
            'libaio with its headers (Debian: g++, libaio-dev); or take "cpu".'
        )
    return faults


def _reads_asynchronously() -> bool:
    """Whether DeepSpeed's own operation for disks can be built here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


def engine_tables(zero: ZeroConfig, precision: str, micro_batch_size: int, microbatches: int) -> dict[str, Any]:
    """What DeepSpeed is told: the user's own table, and over it what the configuration says.

    Clipping, skipping and the learning rate are not its business, and gradients are reduced and added up in fp32.

    Args:
        micro_batch_size: rows of a micro-batch on one process.
    """
    decided = ("optimizer", "scheduler", "fp16", "train_batch_size")
    tables = {key: value for key, value in zero.theirs.items() if key not in decided and value != "auto"}
    inner: dict[str, Any] = {
        # Replaced for the whole process otherwise: torch's linear map, by one of DeepSpeed's own.
        "memory_efficient_linear": False,
        # Small parameters are gathered with their block, and need not be kept.
        "stage3_param_persistence_threshold": 0,
    }
    inner |= {key: value for key, value in _table(zero.theirs, "zero_optimization").items() if value != "auto"}
    inner["stage"] = zero.stage
    for ours, name in OFFLOADS.items():
        inner.pop(name, None)
        if (device := getattr(zero, ours)) != "none":
            said = _table(_table(zero.theirs, "zero_optimization"), name)
            inner[name] = {key: value for key, value in said.items() if value != "auto"} | {"device": device}
            if device == "nvme":
                inner[name]["nvme_path"] = zero.nvme_dir
    return tables | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": microbatches,
        "zero_optimization": inner,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
