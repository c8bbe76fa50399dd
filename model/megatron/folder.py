"""A checkpoint of Megatron-LM on disk, as a model whose weights are read by name."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Architecture
from model.hf.names import check_tensors, parameter_shapes
from model.hf.source import Source, Weights
from model.megatron.arguments import read_arguments
from model.megatron.distributed import METADATA, DistributedFiles
from model.megatron.names import EMBEDDING, HEAD, Held, held_tensors
from model.megatron.ranks import RankFiles

TRACKER = "latest_checkpointed_iteration.txt"


def is_megatron_folder(path: Path) -> bool:
    """Whether it looks like what Megatron-LM's `--save` names."""
    return (path / TRACKER).is_file()


def iteration_folder(path: Path) -> Path:
    """The folder of one iteration: the given one, or the newest of what Megatron-LM's `--save` names.

    Raises:
        ValueError: there is none.
    """
    if (path / METADATA).is_file() or any(path.glob("mp_rank_*")):
        return path
    if not is_megatron_folder(path):
        raise ValueError(
            f"{path} is no checkpoint of Megatron: expected {TRACKER} in it, or {METADATA}, or mp_rank_00 and others."
        )
    said = (path / TRACKER).read_text(encoding="utf-8").strip()
    if said != "release" and not said.isdigit():
        raise ValueError(f"{path / TRACKER} says {said!r}, expected a number, or release.")
    folder = path / (said if said == "release" else f"iter_{int(said):07d}")
    if not folder.is_dir():
        raise ValueError(f"{path / TRACKER} says {said}, but {folder} is not there.")
    return folder


class MegatronFolder(Source):
    """A GPT checkpoint of Megatron.

    Attributes:
        arguments: of the run that wrote it, by name.
        files: its tensors.

    Raises:
        ValueError: no checkpoint, one that cannot be read, or a model that Headway cannot express.
    """

    def __init__(self, path: Path, tokenizer: Path | None = None):
        self.folder, self.tokenizer = iteration_folder(path), tokenizer
        distributed = (self.folder / METADATA).is_file()
        self.files: DistributedFiles | RankFiles = (DistributedFiles if distributed else RankFiles)(self.folder)
        self.arguments = _arguments(self.folder, self.files.content)
        if EMBEDDING not in self.files.names:
            found = ", ".join(sorted(self.files.names)[:3]) or "nothing"
            raise ValueError(f"{self.folder} holds no {EMBEDDING}, as megatron-core's GPT does, but {found}.")
        self.rows = self.files.whole_shape(_rows_of(EMBEDDING))[0]
        places = Held("embedding.position_embeddings.weight", ())
        positions = self.files.whole_shape(places)[0] if places.name in self.files.names else None
        try:
            self.tables = read_arguments(self.arguments, positions, self._vocab_size())
        except ValueError as error:
            raise ValueError(f"{self.folder}, arguments: {error}") from error

    def _vocab_size(self) -> int:
        """Tokens: rows after them that are zeros, as an export of ours has them, were never trained."""
        said = self.arguments.get("vocab_size")
        if not said or said >= self.rows:
            return self.rows
        tables = [name for name in (EMBEDDING, HEAD) if name in self.files.names]
        trained = any(self.files.whole(_rows_of(name))[said:].any() for name in tables)
        return self.rows if trained else said

    def weights(self, architecture: Architecture) -> Weights:
        try:
            return _MegatronWeights(self.files, architecture, self.rows)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        return self.files.dtype(EMBEDDING)


def _rows_of(name: str) -> Held:
    """A table of tokens, of which nothing is known yet."""
    return Held(name, (), cut=0, padded=True)


def _arguments(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(content.get("args"), Namespace):
        raise ValueError(
            f"{folder} holds no arguments (args), which say what the model is: Megatron-LM writes them beside the "
            "weights; a checkpoint of megatron-core alone can be loaded in Megatron-LM and saved there."
        )
    version = content.get("checkpoint_version") or 0
    if version < 3.0:
        raise ValueError(
            f"{folder} has checkpoint_version {version}, which packs queries, keys and values in another way; "
            "expected 3.0: load it in Megatron-LM and save it there."
        )
    return vars(content["args"])


class _MegatronWeights(Weights):
    def __init__(self, files: DistributedFiles | RankFiles, architecture: Architecture, rows: int):
        self._files, self._shapes = files, parameter_shapes(architecture)
        held = held_tensors(architecture)
        self._of = {part: one for one in held.values() for part in one.parts}
        given = files.names
        if architecture.model.tie_embeddings and HEAD in given:
            # The last stage of a pipeline has a copy of its own.
            self._check_copy()
            given = given - {HEAD}
        check_tensors(
            {name: files.whole_shape(held.get(name, Held(name, ()))) for name in given},
            {name: one.shape(self._shapes, rows) for name, one in held.items()},
            "the checkpoint",
        )
        if torn := [name for name, one in held.items() if not files.agree(one)]:
            raise ValueError(f"tensor-parallel ranks should have the same {', '.join(torn)}, and differ.")
        # Of one packed matrix several parameters are taken, one after another.
        self._last: tuple[str, Tensor] | None = None

    def _check_copy(self) -> None:
        embedding, head = (self._files.whole(_rows_of(name)) for name in (EMBEDDING, HEAD))
        if not torch.equal(embedding, head):
            raise ValueError(
                f"its arguments tie the head to the embedding, but {HEAD} differs from {EMBEDDING}: "
                "untie_embeddings_and_output_weights = True would say what the checkpoint is."
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._of[name].take(name, self._whole(self._of[name]), self._shapes) for name in names}

    def _whole(self, held: Held) -> Tensor:
        if self._last is None or self._last[0] != held.name:
            self._last = held.name, self._files.whole(held)
        return self._last[1]
