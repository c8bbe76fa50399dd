"""Small models on disk: a step folder with random weights, and the commands that convert it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from model.config import Architecture
from model.files import write_json
from model.folders import MANIFEST, describe_files
from model.hf.check import Answer
from model.hf.probe import answer
from model.hf.source import StepFolder
from model.settings import architecture_tables, build_architecture
from model.shards import write_tensors
from model.stack import Model


def architecture_of(tables: dict[str, Any], *, allow_code: bool = False) -> Architecture:
    faults: list[str] = []
    _, built = build_architecture(tables, faults, allow_code=allow_code)
    assert built is not None, faults
    return built


def random_weights(
    architecture: Architecture, seed: int = 1234, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Numbers of its own for every parameter: norms and biases are not left at 1 and 0, where a mix-up is unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Model(architecture)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.3
        weights[name] = values + 1 if name.endswith("norm.weight") else values
    return weights


def write_step(
    folder: Path,
    tables: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    *,
    allow_code: bool = False,
    tokenizer: Path | None = None,
    **facts: Any,
) -> Path:
    """A step folder as a run would leave it, without the optimizer; `tokenizer`: a folder, copied into it."""
    architecture = architecture_of(tables, allow_code=allow_code)
    weights = random_weights(architecture) if weights is None else weights
    folder.mkdir(parents=True)
    stored = {f"model.{name}": tensor for name, tensor in weights.items()}
    write_tensors(folder, {name: tensor.to("meta") for name, tensor in stored.items()}, stored.__getitem__)
    extra = {name: table for name, table in tables.items() if name == "data"}
    (folder / "config.toml").write_text(tomli_w.dumps(architecture_tables(architecture) | extra))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    write_json(folder / MANIFEST, {"step": 0, "files": describe_files(folder, files)} | facts)
    return folder


def stored_weights(folder: Path, *, allow_code: bool = False) -> dict[str, Tensor]:
    """Every parameter of a step folder."""
    source = StepFolder(folder)
    architecture = source.architecture(allow_code=allow_code)
    with torch.device("meta"):
        names = [name for name, _ in Model(architecture).named_parameters()]
    return source.weights(architecture).read(names)


def ask_in_this_process(folder: Path, tokens: Tensor, **request: Any) -> Answer:
    """`model.hf.check.ask_transformers` without the process of its own, which takes seconds to start."""
    rounded = request.get("round_to")
    content = {
        "folder": str(folder),
        "tokens": tokens.tolist(),
        "modalities": None if (modalities := request.get("modalities")) is None else modalities.tolist(),
        "texts": request.get("texts"),
        "trust": request["trust"],
        "wide": request.get("wide", ()),
        "round_to": None if rounded is None else str(rounded).removeprefix("torch."),
    }
    return Answer(*answer(content))
