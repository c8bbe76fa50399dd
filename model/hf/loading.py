"""`load(MODEL) -> (model, config)`: one process, CPU or GPU, no process group."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import torch

from model.folders import find_checkpoint
from model.settings import build_architecture
from model.shards import read_tensors, shape_faults
from model.stack import Model


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_code: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """A model with its weights, in evaluation mode, and the tables of its configuration.

    Args:
        path: a run folder (its newest complete checkpoint) or a step folder.
        dtype: of the weights.
        allow_code: whether a layer class that the configuration names by import path may be imported.

    Raises:
        ValueError: no complete checkpoint there, or one that does not fit its own configuration.
    """
    folder = find_checkpoint(Path(path))
    config = tomllib.loads((folder / "config.toml").read_text())
    faults: list[str] = []
    _, architecture = build_architecture(config, faults, allow_code=allow_code)
    if architecture is None:
        raise ValueError(f"{folder / 'config.toml'}: " + " ".join(faults))
    with torch.device("meta"):
        model = Model(architecture)
    parameters = dict(model.named_parameters())
    if faults := shape_faults(folder, {name: tuple(parameter.shape) for name, parameter in parameters.items()}):
        raise ValueError(" ".join(faults))
    model.to_empty(device=device)
    read_tensors({"model": dict(model.named_parameters())}, folder, alone=True)
    return model.to(dtype).eval(), config
