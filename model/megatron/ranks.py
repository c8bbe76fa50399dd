"""Megatron-LM's checkpoints with a file for each rank (`--ckpt-format torch`), whatever their number.

`mp_rank_01_003/model_optim_rng.pt` is rank 1 of tensor parallelism in stage 3 of a pipeline. Each holds `model` (or
`model0`, `model1`.. where a stage has several pieces, which take turns with those of the other stages), with layers
numbered from 0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.megatron.names import LAYER, Held, canonical
from model.megatron.pickled import load

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")


class RankFiles:
    """The model's tensors in files of ranks.

    Attributes:
        tp: ranks of tensor parallelism.
        content: of the first file: its arguments and counters.
        shards: canonical name -> what each of these ranks has of it.

    Raises:
        ValueError: files are missing or damaged or hold something else, all of them named.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = _files(folder)
        self.tp = 1 + max(tp for tp, _ in files)
        stages = 1 + max(pp for _, pp in files)
        missing = [f"mp_rank_{t:02d}_{p:03d}" for t in range(self.tp) for p in range(stages) if (t, p) not in files]
        if missing:
            raise ValueError(f"{folder}: there is nothing of {', '.join(missing)}.")
        contents = {place: load(path) for place, path in files.items()}
        self.content = contents[0, 0]
        whole = [_pipeline([contents[tp, pp] for pp in range(stages)], folder) for tp in range(self.tp)]
        if unlike := sorted(set().union(*whole) - set(whole[0]).intersection(*whole)):
            raise ValueError(f"{folder}: not all tensor-parallel ranks have {', '.join(unlike)}.")
        self.shards: dict[str, list[Tensor]] = {name: [rank[name] for rank in whole] for name in whole[0]}

    @property
    def names(self) -> set[str]:
        """Canonical names of all tensors."""
        return set(self.shards)

    def dtype(self, name: str) -> torch.dtype:
        """That it is stored in."""
        return self.shards[name][0].dtype

    def whole(self, held: Held) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        return held.merge(self.shards[held.name])

    def agree(self, held: Held) -> bool:
        """Whether the ranks have alike what they should."""
        shards = self.shards[held.name]
        return held.cut is not None or all(torch.equal(shard, shards[0]) for shard in shards[1:])

    def whole_shape(self, held: Held) -> tuple[int, ...]:
        """That of `whole`."""
        return held.merged_shape([tuple(shard.shape) for shard in self.shards[held.name]])


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, stage) -> its file."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            continue
        if int(match[3] or 0):
            raise ValueError(f"{path} is of an expert-parallel rank: Headway reads models without experts.")
        file = next((path / name for name in _FILES if (path / name).is_file()), None)
        if file is not None:
            found[int(match[1]), int(match[2] or 0)] = file
    if (0, 0) not in found:
        raise ValueError(f"{folder} holds no {' or '.join(_FILES)} of rank 0.")
    return found


def _pipeline(stages: list[dict[str, Any]], folder: Path) -> dict[str, Tensor]:
    """Tensors of all stages of one tensor-parallel rank, with the layers' global numbers."""
    pieces = max(sum(re.fullmatch(r"model\d+", key) is not None for key in stage) for stage in stages)
    keys = ["model"] if pieces == 0 else [f"model{piece}" for piece in range(pieces)]
    found: dict[str, Tensor] = {}
    before = 0
    for key in keys:
        for stage in stages:
            if key not in stage:
                raise ValueError(f"{folder}: a file holds no {key!r} but {', '.join(map(str, stage))}.")
            tensors = {name: one for name, one in stage[key].items() if isinstance(one, Tensor) and not _extra(name)}
            layers = {int(match[1]) for name in tensors if (match := LAYER.fullmatch(name))}
            found |= {_globally(name, before): tensor for name, tensor in tensors.items()}
            before += len(layers)
    return found


def _extra(name: str) -> bool:
    return name.endswith("_extra_state")


def _globally(name: str, before: int) -> str:
    match = LAYER.fullmatch(name)
    return canonical(f"decoder.layers.{int(match[1]) + before}.{match[2]}") if match else name
