"""DeepSpeed's engine beside the rest of a configuration, and a user's own DeepSpeed JSON held against it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from parallel.config import ParallelConfig
from parallel.mesh import resolve_layout
from parallel.zero_config import OFFLOADS, read_json, resolve_zero

# What a DeepSpeed JSON may say of speed, memory and logs: it is handed on.
_HANDED_ON = {
    "": (
        *(
            "wall_clock_breakdown",
            "memory_breakdown",
            "comms_logger",
            "flops_profiler",
            "steps_per_print",
            "dump_state",
        ),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    ),
    "zero_optimization": (
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
        *("contiguous_gradients", "round_robin_gradients", "sub_group_size", "ignore_unused_parameters"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_module_granularity_threshold", "stage3_gather_16bit_weights_on_model_save"),
    ),
    "zero_optimization.offload_optimizer": (
        "pin_memory",
        "buffer_count",
        "fast_init",
        "pipeline_read",
        "pipeline_write",
    ),
    "zero_optimization.offload_param": ("pin_memory", "buffer_count", "buffer_size", "max_in_cpu"),
    "optimizer": (),
    "optimizer.params": ("torch_adam", "fused"),
    "bf16": (),
    "fp16": ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "auto_cast"),
    "data_types": (),
}

_ADAM = ("lr", "betas", "eps", "weight_decay")

# What Headway itself decides elsewhere: what a DeepSpeed JSON says of it is not heard, so it may not say it.
_ELSEWHERE = {
    "scheduler": "[schedule]",
    "activation_checkpointing": "parallel.recompute",
    "tensorboard": "metrics.sinks",
    "wandb": "metrics.sinks",
    "csv_monitor": "metrics.sinks",
    "checkpoint": "[checkpoint]",
    "seed": "run.seed",
}


def zero_faults(sections: dict[str, Any], world_size: int, precision: str) -> list[str]:
    """Why DeepSpeed's engine cannot carry this configuration; nothing for torch's.

    Args:
        sections: those that could not be read are None.
        precision: as the run will have it.
    """
    parallel: ParallelConfig = sections["parallel"]
    if parallel.engine != "deepspeed":
        return []
    faults = [] if precision != "fp64" else ['run.precision = "fp64": DeepSpeed keeps its masters in fp32.']
    optimizer, reparam, run = sections["optimizer"], sections["reparam"], sections["run"]
    if optimizer is not None and optimizer.kind != "adamw":
        faults.append(f'optimizer.kind = "{optimizer.kind}" updates whole matrices, and ZeRO cuts in mid-row.')
    if reparam is not None and reparam.kind != "none":
        faults.append(f'reparam.kind = "{reparam.kind}" looks at whole matrices, and ZeRO cuts in mid-row.')
    if run is not None:
        faults += [
            f"run.{key} = {json.dumps(getattr(run, key))}: DeepSpeed keeps no fp32 master of what is not trained."
            for key in ("freeze", "freeze_ids")
            if getattr(run, key)
        ]
    faults = [f'{fault} With parallel.engine = "torch" it works.' for fault in faults]
    try:
        theirs = read_json(parallel.deepspeed_config)
    except ValueError:
        return faults  # Of the layout's faults.
    wanted = _wanted(sections, world_size, precision)
    said = [*_contradictions(theirs, wanted), *_strangers(theirs, "", list(wanted))]
    return faults + [f"{parallel.deepspeed_config}: {fault}" for fault in said]


def _wanted(sections: dict[str, Any], world_size: int, precision: str) -> dict[str, tuple[Any, str]]:
    """Key of a DeepSpeed JSON -> (what it may say, and why); `...` where the configuration could not be read."""
    parallel, data, optimizer = sections["parallel"], sections["data"], sections["optimizer"]
    zero, layout = resolve_zero(parallel), resolve_layout(parallel, world_size)
    assert zero is not None
    parts = layout.data_parallel * layout.microbatches
    rows = ... if data is None else data.global_batch_size
    each = ... if data is None else data.global_batch_size / parts
    cut = f"data.global_batch_size / (processes x microbatches) = {rows} / ({world_size} x {layout.microbatches})"
    wide = "gradients are added up and reduced in fp32, and averaged then"
    wanted: dict[str, tuple[Any, str]] = {
        "train_batch_size": (rows, f"data.global_batch_size = {rows}"),
        "train_micro_batch_size_per_gpu": (each, f"{cut} = {each}"),
        "gradient_accumulation_steps": (layout.microbatches, f"parallel.microbatches = {layout.microbatches}"),
        "bf16.enabled": (precision == "bf16", f'run.precision = "{precision}"'),
        "fp16.enabled": (False, "there is bf16 and fp32, and no fp16"),
        "prescale_gradients": (False, wide),
        "gradient_predivide_factor": (1.0, wide),
        "communication_data_type": ("fp32", wide),
        "data_types.grad_accum_dtype": ("fp32", wide),
        "zero_optimization.stage": (zero.stage, f"parallel.zero_stage = {zero.stage}"),
        "optimizer.type": ("AdamW", f'optimizer.kind = "{"adamw" if optimizer is None else optimizer.kind}"'),
    }
    path = "zero_optimization.offload_optimizer.nvme_path"
    wanted[path] = (zero.nvme_dir, f'parallel.nvme_dir = "{zero.nvme_dir}"')
    for ours, name in OFFLOADS.items():
        where = getattr(zero, ours)
        wanted[f"zero_optimization.{name}.device"] = (where, f'parallel.{ours} = "{where}"')
    settings = {"gradient_clipping": "grad_clip"} | {f"optimizer.params.{key}": key for key in _ADAM}
    for key, name in settings.items():
        value = ... if optimizer is None else getattr(optimizer, name)
        value = list(value) if isinstance(value, tuple) else value
        wanted[key] = (value, f"optimizer.{name} = {value}")
    return wanted


def _contradictions(theirs: dict[str, Any], wanted: dict[str, tuple[Any, str]]) -> Iterator[str]:
    """Where a DeepSpeed JSON says something else than the configuration."""
    for key, (value, why) in wanted.items():
        found: Any = theirs
        for part in key.split("."):
            found = found.get(part, "auto") if isinstance(found, dict) else "auto"
        if key == "optimizer.type" and str(found).lower() in ("adam", "adamw"):
            continue  # DeepSpeed's "Adam" is AdamW, unless it is told otherwise.
        if found not in ("auto", value) and value is not ...:
            yield f"{key} = {json.dumps(found)}, but {why}."


def _strangers(theirs: dict[str, Any], path: str, compared: list[str]) -> Iterator[str]:
    """Keys that are neither handed on nor compared, at any depth."""
    inside = [key for key in (*compared, *_HANDED_ON, *_ELSEWHERE) if key.rpartition(".")[0] == path and key]
    known = [*_HANDED_ON[path], *(key.rpartition(".")[2] for key in inside)]
    for key, value in theirs.items():
        full = f"{path}.{key}".lstrip(".")
        if full in _HANDED_ON and isinstance(value, dict):
            yield from _strangers(value, full, compared)
        elif full in _ELSEWHERE:
            if value not in ("auto", {}):
                yield f"{full}: {_ELSEWHERE[full]} decides that; leave it out."
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f"the nearest key is {near[0]}" if near else "leave it out"
            yield f"{full} = {json.dumps(value)} is nothing that is handed on to DeepSpeed: {hint}."
