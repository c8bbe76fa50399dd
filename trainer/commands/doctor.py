"""`headway doctor`: what is installed and fast, what is missing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import tyro

LIBRARIES = {
    "torch": "needed",
    "megatron-core": "needed: indexed datasets",
    "sentencepiece": "needed: tokenizers",
    "transformers": "needed: tokenizers",
    "triton": "extra gpu: kernels",
    "deepspeed": "extra deepspeed",
    "lm-eval": "extra eval",
    "wandb": "optional sink",
}


@dataclass
class Arguments:
    """What is installed and fast, what is missing."""


def doctor(argv: list[str]) -> int:
    """Print a table of libraries, devices and the paths that will run; returns the exit code."""
    tyro.cli(Arguments, args=argv, prog="headway doctor")
    import torch
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", "meaning", title="headway doctor")
    table.add_row("python", platform.python_version(), "")
    for name, meaning in LIBRARIES.items():
        table.add_row(name, _version(name), meaning)
    table.add_row(
        "processor",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        torch.backends.cpu.get_cpu_capability(),
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            table.add_row(f"gpu {index}", torch.cuda.get_device_name(index), _peak(index))
    else:
        table.add_row("gpu", "none", "training runs on the CPU with gloo, in fp32")
    table.add_row("lightning attention", "portable", "chunked, batched products; any device")
    table.add_row("softmax attention", "torch", "scaled_dot_product_attention")
    table.add_row("sigmoid attention", "portable", "blocks of queries; any device")
    Console().print(table)
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _peak(index: int) -> str:
    import torch

    from trainer.throughput import peak_flops

    peak = peak_flops(torch.device("cuda", index), "bf16")
    return "peak not known: no MFU" if peak is None else f"MFU relative to {peak / 1e12:.0f} TFLOP/s (bf16, dense)"
