"""Writing a Hugging Face folder, one file of weights at a time."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import Architecture
from model.files import write_json
from model.hf.bundle import bundle
from model.hf.folder import CONFIG
from model.hf.formats import Format
from model.hf.names import fillers, made_of, parameter_shapes, places
from model.hf.source import Weights
from model.registry import kind_of
from model.stack import Model

MODELLING_FILE = "modeling_headway"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Facts:
    """What a folder says about a model beside its weights.

    Attributes:
        max_positions: the longest sequence it was trained on.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`, as far as there are such.
    """

    max_positions: int = 2048
    tokens: dict[str, int] = field(default_factory=dict)


def write_folder(
    out: Path,
    weights: Weights,
    architecture: Architecture,
    layout: Format,
    facts: Facts,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write `config.json`, `generation_config.json`, the weights and, where transformers has no class, the code.

    Args:
        out: an empty folder.
        dtype: of the weights; what stays in fp32 in every model stays so here.

    Raises:
        ValueError: parameters that the format has no name for, or a layer whose source cannot go with the export.
    """
    write_configuration(out, architecture, layout, facts, dtype)
    shards = _plan(architecture, layout.names, dtype, max_shard_bytes)
    files: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: shard[name].tensor(weights) for name in shard}
        save_file(tensors, out / file, metadata={"format": "pt"})
        # safetensors writes for the owner's eyes alone; the other files are as the user's mask says.
        shutil.copymode(out / CONFIG, out / file)
        files |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        write_json(out / "model.safetensors.index.json", index)


def write_configuration(
    out: Path, architecture: Architecture, layout: Format, facts: Facts, dtype: torch.dtype
) -> None:
    """All of a folder but its weights and tokenizer."""
    import transformers

    # The classes of transformers have defaults of their own for these: other tokens than this model's.
    config = layout.write(architecture) | dict.fromkeys(TOKENS) | facts.tokens
    if layout.code is not None or "max_position_embeddings" in config:
        config["max_position_embeddings"] = architecture.model.max_positions or facts.max_positions
    config |= {
        "model_type": layout.model_type,
        "architectures": [layout.class_name],
        "dtype": next(name for name, known in DTYPES.items() if known == dtype),
        "transformers_version": transformers.__version__,
    }
    if layout.code is not None:
        config_class = layout.class_name.removesuffix("ForCausalLM") + "Config"
        config["auto_map"] = {
            "AutoConfig": f"{MODELLING_FILE}.{config_class}",
            "AutoModelForCausalLM": f"{MODELLING_FILE}.{layout.class_name}",
        }
        (out / f"{MODELLING_FILE}.py").write_text(modelling_file(architecture, layout.code), encoding="utf-8")
    write_json(out / CONFIG, dict(sorted(config.items())))
    transformers.GenerationConfig(**facts.tokens).save_pretrained(str(out))


def modelling_file(architecture: Architecture, code: str) -> str:
    """The text of the file that computes this model where Headway is not installed."""
    layers = {
        f"{section}.{kind_of(section, cls)}": cls
        for section, parts in (("mixers", architecture.mixers), ("feedforwards", architecture.feedforwards))
        for cls, _ in parts.values()
    }
    return bundle([code], layers)


@dataclass
class _Whole:
    """One tensor of the export: the parameters it is made of, or a value that no parameter has."""

    parameters: list[str]
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: Any = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensor(self, weights: Weights) -> Tensor:
        if not self.parameters:
            return torch.zeros(self.shape, dtype=self.dtype)
        parts = weights.read(self.parameters)
        return self.place.lay_out([parts[name].to(self.dtype) for name in self.parameters]).contiguous()


def _plan(architecture: Architecture, family: str, dtype: torch.dtype, limit: int) -> list[dict[str, _Whole]]:
    """Which tensors go into which file, in the order of the model; one that is larger than the limit goes alone."""
    with torch.device("meta"):
        stored = {name: p.dtype for name, p in Model(architecture).to(dtype).named_parameters()}
    shapes, known = parameter_shapes(architecture), places(architecture, family)
    wholes = {
        outside: _Whole(names, known[names[0]].shape(shapes[names[0]]), stored[names[0]], known[names[0]])
        for outside, names in made_of(known).items()
    }
    for name, shape in fillers(architecture, family).items():
        wholes[name] = _Whole([], shape, dtype)
    shards: list[dict[str, _Whole]] = [{}]
    used = 0
    for name in wholes:
        if shards[-1] and used + wholes[name].nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = wholes[name]
        used += wholes[name].nbytes
    return shards


def parse_size(text: str) -> int:
    """Bytes in "5GB", "200MiB", "1000000". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match is not None and (match[2] or "") in _UNITS else 0
    if size < 1:
        raise ValueError(f"--max-shard-size {text!r}: expected a size such as 5GB, 500MB or 2GiB.")
    return size


def read_tokens(folder: Path) -> dict[str, int]:
    """The special tokens that the `config.json` of a folder names."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: config[key] for key in TOKENS if isinstance(config.get(key), int)}
