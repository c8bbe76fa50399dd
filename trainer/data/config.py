"""The `[data]` section: what is trained on, in which order, and what validates it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DataSource:
    """One prepared dataset and its share of the batches."""

    path: str
    """The prefix: PREFIX.bin and PREFIX.idx hold the tokens."""
    weight: float = 1.0
    """Its share of the samples, relative to the other sources."""


@dataclass
class DataConfig:
    """What is trained and validated on. `faults()` says what is wrong with the values, before any file is opened."""

    train: list[str | DataSource] = field(default_factory=list)
    """Prefixes to train on, or {path, weight} for a blend by weight."""
    validation: list[str | DataSource] = field(default_factory=list)
    """Prefixes to validate on, each reported under its own name."""
    split: list[float] | None = None
    """Instead of data.validation: [train, validation] fractions of every source, by document."""
    tokenizer: str | None = None
    """A tokenizer folder, a .model or a Hugging Face folder. Default: the one recorded beside the data."""
    seq_len: int = 1024
    """Tokens in a row of the batch."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all processes."""
    isolate_documents: bool = True
    """Attention, positions and states restart at every document; predicting across a boundary does not count."""
    samples: int | None = None
    """Fixes the order of the samples. Default: schedule.steps x data.global_batch_size."""
    validate_every_steps: int = 0
    """Validate after every so many steps; 0 means never."""
    validation_batches: int = 8
    """Global batches in a validation; 0 means all there are."""
    cache_dir: str | None = None
    """Where the order of the samples is kept. Default: inside the run folder."""
    end_token: int | None = None
    """The id that ends a document, in Megatron data without our sidecar whose id is not the tokenizer's."""

    def training_sources(self) -> list[DataSource]:
        """`train` with every entry as a DataSource."""
        return [_as_source(entry) for entry in self.train]

    def validation_sources(self) -> list[DataSource]:
        """`validation` with every entry as a DataSource."""
        return [_as_source(entry) for entry in self.validation]

    def faults(self) -> list[str]:
        """What is wrong with the values, one sentence each; empty when nothing is."""
        return [*self._count_faults(), *self._source_faults(), *self._validation_faults()]

    def _count_faults(self) -> list[str]:
        least = {"seq_len": 1, "global_batch_size": 1, "validate_every_steps": 0, "validation_batches": 0}
        if self.samples is not None:
            least["samples"] = 1
        if self.end_token is not None:
            least["end_token"] = 0
        return [
            f"data.{key} = {getattr(self, key)}: must be at least {bound}; for example {max(bound, _default(key))}."
            for key, bound in least.items()
            if getattr(self, key) < bound
        ]

    def _source_faults(self) -> list[str]:
        faults = []
        if not self.train:
            faults.append(
                "data.train = []: there is nothing to train on; name a prefix that `headway data prepare` "
                'wrote, for example ["data/corpus"].'
            )
        for key, sources in (("train", self.training_sources()), ("validation", self.validation_sources())):
            for path, times in Counter(source.path for source in sources).items():
                if times > 1:
                    faults.append(f"data.{key} names {path} {times} times: name it once, with the sum of the weights.")
            for source in sources:
                if not (source.weight > 0 and math.isfinite(source.weight)):
                    faults.append(
                        f"data.{key}: the weight of {source.path} is {source.weight}: weights must be positive "
                        "numbers; leave the source out to not use it."
                    )
        return faults

    def _validation_faults(self) -> list[str]:
        faults = []
        if self.validation and self.split is not None:
            faults.append(
                f"data.split = {self.split}: data.validation is given too, and only one of them can say what to "
                "validate on; leave one out."
            )
        if self.split is not None:
            faults += _split_faults(self.split)
        if self.validate_every_steps > 0 and not self.validation and self.split is None:
            faults.append(
                f"data.validate_every_steps = {self.validate_every_steps}: there is nothing to validate on; give "
                "data.validation or data.split = [0.98, 0.02]."
            )
        return faults


def _as_source(entry: str | DataSource) -> DataSource:
    return DataSource(entry) if isinstance(entry, str) else entry


def _default(key: str) -> int:
    """The default of a count, as the example in a fault."""
    value = getattr(DataConfig(), key)
    return value if isinstance(value, int) else 1


def _split_faults(split: list[float]) -> list[str]:
    if len(split) != 2:
        return [
            f"data.split = {split}: expected two fractions, [train, validation], and got {len(split)}; "
            "for example [0.98, 0.02]."
        ]
    faults = []
    if any(not 0 < fraction < 1 for fraction in split):
        faults.append(f"data.split = {split}: each fraction must lie between 0 and 1; for example [0.98, 0.02].")
    elif not math.isclose(sum(split), 1, abs_tol=1e-6):
        faults.append(
            f"data.split = {split}: fractions must sum to 1 (they sum to {sum(split):.6g}); for example [0.98, 0.02]."
        )
    return faults
