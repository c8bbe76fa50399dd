"""The batches of a run, as a function of (data, seed, step)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.files import file_sha256
from trainer.data.batch import assemble, check_rows
from trainer.data.config import DataConfig, DataSource
from trainer.data.indexed import open_pair
from trainer.data.lazy import megatron
from trainer.data.modalities import TokenModalities
from trainer.data.order import ensure, order_folder, wait_for
from trainer.data.split import training_range

if TYPE_CHECKING:
    from model.batch import Batch
    from model.untie import UntieConfig


class TrainingData:
    """Rows of packed documents, blended from the sources by weight.

    Sample number step x global_batch_size + row makes that row of that step's global batch, whoever asks for it: the
    batch depends on (data, seed, samples, step) alone. Within a source Megatron packs and shuffles; a sample has
    seq_len + 1 tokens and shares one with its neighbour.

    `samples` fixes the order and is all there is. With a process group the constructor is a collective of all its
    processes, since the first one lays the order down in `cache_dir` (`config.cache_dir` goes before it). With
    `vocab_size`, every sample is checked for ids outside of it. With `untie`, batches say which modality their tokens
    and targets are of.

    Raises ValueError when a source cannot be read, is too short for one sample, or does not say the modalities.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        samples: int,
        cache_dir: str | Path,
        vocab_size: int | None = None,
        untie: UntieConfig | None = None,
    ) -> None:
        self.config = config
        self.samples = samples
        self._vocab_size = vocab_size
        self._sources = config.training_sources()
        self._modalities = (
            None if untie is None else [TokenModalities(open_pair(source.path), untie) for source in self._sources]
        )
        cache = config.cache_dir or str(cache_dir)
        blend_folder = order_folder(
            cache, "blend", weights=[float(source.weight) for source in self._sources], samples=samples
        )
        from parallel.processes import first_process_first

        first_process_first(lambda: self._lay_down(blend_folder, cache, seed))
        self._blend = _open_blend(blend_folder)
        counts = np.bincount(self._blend[0], minlength=len(self._sources)).tolist()
        self._packed = [
            _open_packed(source, config, seed, count, cache)
            for source, count in zip(self._sources, counts, strict=True)
        ]

    def batch(self, step: int, rows: range) -> Batch:
        """Rows of the global batch of update number `step`, counted from 0: B = len(rows), N = seq_len.

        Raises ValueError when the step lies beyond `samples`, or a token outside the vocabulary.
        """
        size = self.config.global_batch_size
        check_rows(rows, size)
        assert step >= 0, step
        if (step + 1) * size > self.samples:
            raise ValueError(
                f"data.samples = {self.samples}: step {step + 1} takes the samples from {step * size} to "
                f"{(step + 1) * size - 1}, and the order ends before; the last step that works is "
                f"{self.samples // size}."
            )
        drawn = [self._sample(step * size + row) for row in rows]
        shape = (len(drawn), self.config.seq_len + 1)
        tokens, pieces, modalities = (
            np.array([sample[part] for sample in drawn], dtype=np.int64).reshape(shape) for part in range(3)
        )
        isolate = self.config.isolate_documents
        counted = pieces[:, 1:] == pieces[:, :-1] if isolate else np.ones((shape[0], shape[1] - 1), dtype=bool)
        told_apart = None if self._modalities is None else (modalities[:, :-1], modalities[:, 1:])
        return assemble(tokens[:, :-1], tokens[:, 1:], counted, pieces[:, :-1], isolate, told_apart)

    def _sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, number of the piece of each, modality of each, or 0) of a sample, all int64 [seq_len + 1]."""
        source = int(self._blend[0][index])
        drawn = self._packed[source][int(self._blend[1][index])]
        tokens, pieces = drawn["tokens"], drawn["pieces"]
        self._check_ids(self._sources[source].path, tokens, pieces)
        owners = np.repeat(np.arange(len(pieces)), [piece.length for piece in pieces])
        if self._modalities is None:
            return tokens, owners, np.zeros_like(owners)
        return tokens, owners, self._modalities[source].of(tokens.astype(np.int64), pieces)

    def _check_ids(self, prefix: str, tokens: np.ndarray, pieces: list[Any]) -> None:
        wrong = tokens < 0 if self._vocab_size is None else (tokens < 0) | (tokens >= self._vocab_size)
        if not wrong.any():
            return
        at = int(wrong.argmax())
        ends = np.cumsum([piece.length for piece in pieces])
        found = int(np.searchsorted(ends, at, side="right"))
        place = pieces[found].offset + at - int(ends[found] - pieces[found].length)
        raise ValueError(
            f"{prefix}: token {place} of document {pieces[found].document} is id {int(tokens[at])}, outside the "
            f"model's vocabulary of {self._vocab_size}; the data was made with another tokenizer, or is damaged."
        )

    def _lay_down(self, blend_folder: Path, cache: str, seed: int) -> None:
        """On the first process: write every order that is not there yet."""
        megatron("gpt_dataset")
        from trainer.data.gpt import blend

        def build(folder: Path) -> None:
            sources, places = blend([float(source.weight) for source in self._sources], self.samples)
            np.save(folder / "source.npy", sources)
            np.save(folder / "place.npy", places)

        ensure(blend_folder, build)
        counts = np.bincount(_open_blend(blend_folder)[0], minlength=len(self._sources)).tolist()
        for source, count in zip(self._sources, counts, strict=True):
            _open_packed(source, self.config, seed, count, cache, lay_down=True)


def _open_packed(
    source: DataSource, config: DataConfig, seed: int, samples: int, cache: str, lay_down: bool = False
) -> Any:
    """Megatron's packed samples of one source, in the order that lies in the cache, or is first laid down there."""
    megatron("gpt_dataset")
    from trainer.data.gpt import open_packed

    data = open_pair(source.path)
    documents = training_range(data.documents, config.split)
    tokens = int(data.lengths[documents.start : documents.stop].sum(dtype=np.int64))
    if tokens < config.seq_len + 1:
        raise ValueError(too_short(source.path, tokens, config.seq_len))
    folder = order_folder(
        cache,
        "order",
        idx_sha256=file_sha256(source.path + ".idx"),
        documents=[documents.start, documents.stop],
        samples=samples,
        seq_len=config.seq_len,
        seed=seed,
    )

    def opened(place: Path) -> Any:
        shape = {"samples": samples, "seq_len": config.seq_len, "seed": seed}
        return open_packed(source.path, documents, cache=str(place), **shape)

    if lay_down:
        ensure(folder, opened)
    wait_for(folder)
    try:
        return opened(folder)
    except (ValueError, EOFError, OSError) as fault:
        raise ValueError(f"data.cache_dir: {folder} cannot be read ({fault}); delete it, it is made again.") from fault


def _open_blend(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(source, sample of it) for each sample of the run, memory mapped."""
    wait_for(folder)
    return np.load(folder / "source.npy", mmap_mode="r"), np.load(folder / "place.npy", mmap_mode="r")


def too_short(prefix: str, tokens: int, seq_len: int) -> str:
    """The sentence about a source that does not fill one sample."""
    return (
        f"{prefix}: {tokens} tokens to train on do not fill one sample of data.seq_len + 1 = {seq_len + 1}; "
        f"the largest data.seq_len that works is {max(tokens - 1, 0)}."
    )
