"""The weights in a Hugging Face folder: which file holds which tensor, read one by one."""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "config.json"
# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_hugging_face_folder(path: Path) -> bool:
    """Whether it looks like one."""
    return (path / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder. Raises ValueError when it cannot be read."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no Hugging Face folder: it has no {CONFIG}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no table of settings.")
    return config


class TensorFiles:
    """All tensors of a folder, by their names there.

    Raises:
        ValueError: no weights, or files that are missing or damaged, all of them named.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if found is None:
            raise ValueError(f"{folder} holds no weights: expected {', '.join(_WEIGHTS)}.")
        names = sorted(set(_weight_map(found).values())) if found.suffix == ".json" else [found.name]
        faults: list[str] = []
        self._files = {name: file for name in names if (file := _open(folder / name, faults)) is not None}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, _File] = {}
        for file in self._files.values():
            self.shapes |= file.shapes
            self._owner |= dict.fromkeys(file.shapes, file)
        if not faults and found.suffix == ".json":
            faults += [
                f"{found.name} promises {name} in {file}, which does not hold it."
                for name, file in _weight_map(found).items()
                if name not in self._files[file].shapes
            ]
        if faults:
            raise ValueError(" ".join(faults))

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        return self._owner[name].read(name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the largest tensor."""
        largest = max(self.shapes, key=lambda name: torch.Size(self.shapes[name]).numel())
        return self.read(largest).dtype


class _File(ABC):
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One of its tensors."""


class _Safetensors(_File):
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class _Pickled(_File):
    """torch.save's, read as data: nothing in it is run."""

    def __init__(self, path: Path):
        self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _open(path: Path, faults: list[str]) -> _File | None:
    if not path.is_file():
        faults.append(f"{path} is missing.")
        return None
    try:
        return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)
    except pickle.UnpicklingError:
        faults.append(f"{path} holds more than tensors, or is damaged: its pickled content is not read.")
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        faults.append(f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): {said}.")
    return None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: it has no weight_map that can be read ({error}).") from None
