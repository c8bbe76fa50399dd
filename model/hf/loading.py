"""`load(MODEL) -> (model, config)`: one process, CPU or GPU, no process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.hf.source import Source, open_model
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
        path: a run folder (its newest complete checkpoint), a step folder or a Hugging Face folder.
        dtype: of the weights, but those that stay in fp32 in every model (the angles of LRPE).
        allow_code: whether a layer class that the configuration names by import path may be imported.

    Raises:
        ValueError: nothing complete there, or weights that do not fit their own configuration.
    """
    source = open_model(path)
    return load_source(source, device=device, dtype=dtype, allow_code=allow_code), source.tables


def load_source(
    source: Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_code: bool = False,
) -> Model:
    """As `load`, from a source that is open. Parameters are read one at a time: the model is in memory once."""
    architecture = source.architecture(allow_code=allow_code)
    weights = source.weights(architecture)
    with torch.device("meta"):
        model = Model(architecture).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read([name])[name])
    return model.eval()
