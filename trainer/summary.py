"""`summary.json` in the run folder: what is trained, on what, and how it is spread, for the report."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from model.stack import Model
from parallel.mesh import Layout
from parallel.processes import Process


def summarise(model: Model, layout: Layout, process: Process, precision: str, flops_per_token: float) -> dict[str, Any]:
    """Parameters in all and by layer, hardware, versions, layout, and operations per trained token."""
    layers = [
        {
            "layer": block.layer,
            "mixer": model.architecture.mixer_names[block.layer],
            "feedforward": model.architecture.feedforward_names[block.layer],
            "parameters": sum(parameter.numel() for parameter in block.parameters()),
        }
        for block in model.layers.values()
    ]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": layers,
        "hardware": f"{process.world_size} x {_device_name(process)}",
        "precision": precision,
        "versions": {name: version(name) for name in ("headway", "torch", "megatron-core")},
        "layout": asdict(layout),
        "flops_per_token": flops_per_token,
    }


def _device_name(process: Process) -> str:
    if process.device_type == "cuda":
        return torch.cuda.get_device_name(process.device)
    threads = torch.get_num_threads()
    return f"CPU process ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''}, {os.cpu_count()} cores)"
