"""MODEL, wherever it comes from: a run folder, a step folder or a Hugging Face folder; its weights are read by name."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Architecture
from model.folders import find_checkpoint, read_manifest
from model.hf.folder import TensorFiles, is_hugging_face_folder, read_config
from model.hf.formats import format_of
from model.hf.names import match, parameter_shapes, places
from model.hf.released import ReleasedFiles, open_tensors
from model.settings import build_architecture
from model.shards import read_tensors, shape_faults, tensor_dtypes


class Source(ABC):
    """A model's configuration and weights on disk.

    Attributes:
        folder: the step folder or Hugging Face folder.
        tables: of its configuration; at least `model`, `mixers`, `feedforwards`.
        tokenizer: folder of its tokenizer, or None.
    """

    folder: Path
    tables: dict[str, Any]
    tokenizer: Path | None

    def architecture(self, *, allow_code: bool = False) -> Architecture:
        """What its tables describe. Raises ValueError with every fault."""
        faults: list[str] = []
        _, architecture = build_architecture(self.tables, faults, allow_code=allow_code)
        if architecture is None:
            raise ValueError(f"{self.folder}: " + " ".join(faults))
        return architecture

    @abstractmethod
    def weights(self, architecture: Architecture) -> Weights:
        """The weights of this model. Raises ValueError naming every tensor that differs, with both shapes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What an export is stored in unless told otherwise."""


class Weights(ABC):
    """Parameters of a model, on disk."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of them, by their names in Headway, in the dtype they are stored in."""


class StepFolder(Source):
    """A checkpoint of ours."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tables = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        self.tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else None

    def weights(self, architecture: Architecture) -> Weights:
        return _StepWeights(self.folder, parameter_shapes(architecture))

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 for a run in bf16, whose stored weights are wider than what it computed with."""
        return torch.bfloat16 if read_manifest(self.folder).get("precision") == "bf16" else torch.float32


class _StepWeights(Weights):
    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]]):
        if faults := shape_faults(folder, shapes):
            raise ValueError(" ".join(faults))
        self._folder, self._shapes = folder, shapes
        self._dtypes = tensor_dtypes(folder, "model.")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(self._shapes[name], dtype=self._dtypes[name]) for name in names}
        read_tensors({"model": tensors}, self._folder, alone=True)
        return tensors


class HuggingFaceFolder(Source):
    """A folder that transformers reads, too.

    Raises:
        ValueError: a kind of model that we do not know or cannot express, or weights that cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.format = format_of(self.config, folder)
        try:
            self.tables = self.format.read(self.config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} ({self.format.model_type}): {error}") from error
        self.files = open_tensors(TensorFiles(folder))
        held = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
        self.tokenizer = folder if held else None
        if self.format.tied_unless_given:
            self._untie_a_head_of_its_own()

    def weights(self, architecture: Architecture) -> Weights:
        try:
            return _ForeignWeights(self.files, architecture, self.format.names)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        return self.files.dtype

    def _untie_a_head_of_its_own(self) -> None:
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        shapes = self.files.shapes
        if head not in shapes or embedding not in shapes or not self.tables["model"]["tie_embeddings"]:
            return
        same = shapes[head] == shapes[embedding] and torch.equal(self.files.read(head), self.files.read(embedding))
        self.tables["model"]["tie_embeddings"] = same


class _ForeignWeights(Weights):
    def __init__(self, files: TensorFiles | ReleasedFiles, architecture: Architecture, family: str):
        self._files = files
        self._places = places(architecture, family)
        self._keys = match(files.shapes, files.read, architecture, family)
        # Of one packed matrix several parameters are taken, one after another.
        self._last: tuple[str, Tensor] | None = None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._places[name].take(self._whole(self._keys[self._places[name].name])) for name in names}

    def _whole(self, key: str) -> Tensor:
        if self._last is None or self._last[0] != key:
            self._last = key, self._files.read(key)
        return self._last[1]


def open_model(path: str | Path) -> Source:
    """Look at MODEL; its weights are not read yet.

    Raises:
        ValueError: nothing there, nothing complete, or nothing that we can read.
    """
    path = Path(path)
    if is_hugging_face_folder(path):
        return HuggingFaceFolder(path)
    return StepFolder(find_checkpoint(path))
