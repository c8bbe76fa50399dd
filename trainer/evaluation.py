"""A trained model on held-out text: nats per token, perplexity and bits per byte, beside n-gram models."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import Architecture
from model.diagnostics import Diagnosis, Numbers, Tally, probed
from model.hf.loading import load_source
from model.hf.source import Source, open_model
from model.objective import NextToken, token_nats
from model.settings import build
from model.stack import Model
from trainer.data.check import check_sources
from trainer.data.config import DataConfig
from trainer.data.evaluation import EvaluationData, validation_sets
from trainer.data.sidecar import recorded_tokenizer
from trainer.data.split import training_documents
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.ngram import NgramBaselines


@dataclass
class Score:
    """A sum over counted tokens. `text_bytes` are the UTF-8 bytes behind them; None without a tokenizer, or when not
    all of them are text."""

    name: str
    nats: float
    tokens: int
    text_bytes: int | None

    def row(self) -> dict[str, Any]:
        """What is shown and stored. Loss in nats per token; bits per byte is null without `text_bytes`."""
        loss = self.nats / max(self.tokens, 1)
        bits = self.nats / math.log(2) / self.text_bytes if self.text_bytes else None
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {
            "name": self.name,
            "nats_per_token": loss,
            "bits_per_byte": bits,
            "perplexity": perplexity,
            "tokens": self.tokens,
        }


def total(name: str, scores: list[Score]) -> Score:
    """Several sources as one."""
    known = [score.text_bytes for score in scores]
    text_bytes = None if None in known else sum(size for size in known if size is not None)
    return Score(name, sum(s.nats for s in scores), sum(s.tokens for s in scores), text_bytes)


def evaluate(
    path: Path,
    prefixes: list[str],
    *,
    baselines: bool = False,
    batch_size: int = 8,
    seq_len: int | None = None,
    device: torch.device | str = "cpu",
    allow_code: bool = False,
) -> list[Score]:
    """Score MODEL on datasets: each source, and their total when there are several.

    Args:
        prefixes: of prepared data; empty: what the run validates on.
        baselines: also score n-gram models counted on the run's training data, on the same tokens.
        seq_len: tokens in a row. Default: that of training.

    Raises:
        ValueError: a dataset that cannot be read, or was made with another tokenizer than the model's.
    """
    source = open_model(path)
    architecture = source.architecture(allow_code=allow_code)
    trained_on, config = _data_config(source, prefixes, seq_len, architecture)
    if baselines and not trained_on.train:
        raise ValueError(
            f"{source.folder} names no training data, so there is nothing to count: leave --baselines out."
        )
    model = load_source(source, device=device, allow_code=allow_code)
    tokenizer = load_tokenizer(source.tokenizer) if source.tokenizer is not None else None
    vocab_size = architecture.model.vocab_size
    sources = validation_sets(config, vocab_size=vocab_size, untie=architecture.untie)
    scores = [
        _score(name, model, data, _text_bytes(data, tokenizer, config), batch_size) for name, data in sources.items()
    ]
    if len(scores) > 1:
        scores.append(total("total", scores))
    if baselines:
        if tokenizer is None and (recorded := recorded_tokenizer(trained_on.training_sources()[0].path)):
            tokenizer = load_tokenizer(recorded)
        counted = NgramBaselines.count(training_documents(trained_on), vocab_size)
        text_bytes = [_text_bytes(data, tokenizer, config) for data in sources.values()]
        scores += _baseline_scores(counted, list(sources.values()), text_bytes, batch_size)
    return scores


def _data_config(
    source: Source, prefixes: list[str], seq_len: int | None, architecture: Architecture
) -> tuple[DataConfig, DataConfig]:
    """The data that MODEL was trained on, and what it is scored on.

    Raises:
        ValueError: nothing to score on, data that cannot be read or has another tokenizer, or too long a sequence.
    """
    faults: list[str] = []
    trained_on = build(DataConfig, "data", source.tables.get("data", {}), faults)
    if trained_on is None:
        raise ValueError(" ".join(faults))
    model = architecture.model
    longest = model.max_positions or trained_on.seq_len
    if seq_len is not None and model.positions == "learned" and seq_len > longest:
        raise ValueError(f"--seq-len {seq_len} is more than the {longest} positions that this model has learned.")
    config = replace(trained_on, seq_len=seq_len or min(trained_on.seq_len, longest))
    if prefixes:
        config = replace(config, train=list(prefixes), validation=list(prefixes), split=None)
        if source.tokenizer is not None:
            config = replace(config, tokenizer=str(source.tokenizer))
        if faults := check_sources(replace(config, seq_len=1), model.vocab_size, architecture.untie):
            raise ValueError("\n".join(faults))
    elif not (config.validation or config.split):
        raise ValueError(f"{source.folder} has no validation data of its own: give --data PREFIX.")
    return trained_on, config


@torch.no_grad()
def _score(name: str, model: Model, data: EvaluationData, text_bytes: int | None, batch_size: int) -> Score:
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    for index in range(data.num_batches(batch_size)):
        batch = data.batch(index, range(batch_size), batch_size).to(device)
        nats += token_nats(model, NextToken(), batch).double().sum().item()
        tokens += int(batch.counted.sum())
    return Score(name, nats, tokens, text_bytes)


@torch.no_grad()
def diagnose(
    path: Path,
    prefixes: list[str],
    *,
    rows: int = 8,
    seq_len: int | None = None,
    num_queries: int | None = None,
    device: torch.device | str = "cpu",
    allow_code: bool = False,
) -> tuple[Diagnosis, int]:
    """Look at MODEL's attention on the first full rows of each dataset; what was found, and on how many tokens.

    Args:
        prefixes, seq_len: as of `evaluate`.
        num_queries: of each row, evenly spread. Default: all.

    Raises:
        ValueError: a dataset that cannot be read, has no full row, or was made with another tokenizer.
    """
    source = open_model(path)
    shape = source.architecture(allow_code=allow_code)
    _, config = _data_config(source, prefixes, seq_len, shape)
    sources = validation_sets(config, vocab_size=shape.model.vocab_size, untie=shape.untie)
    for name, data in sources.items():
        if data.tokens <= config.seq_len:
            raise ValueError(
                f"{name} has {data.tokens} tokens, too few for one row of {config.seq_len} and what follows it: "
                + (f"--seq-len {data.tokens - 1} fits." if data.tokens > 1 else "there is nothing to look at.")
            )
    model = load_source(source, device=device, allow_code=allow_code)
    numbers = Numbers.of(model)
    tally, tokens = Tally.empty(numbers), 0
    for data in sources.values():
        # What fills up the last row is no text.
        for row in range(min(rows, (data.tokens - 1) // config.seq_len)):
            batch = data.batch(row, range(1), 1).to(next(model.parameters()).device)
            tally.add(Tally.of(probed(model, batch, num_queries), numbers))
            tokens += batch.tokens.numel()
    return tally.diagnosis(), tokens


def _text_bytes(data: EvaluationData, tokenizer: Tokenizer | None, config: DataConfig) -> int | None:
    return None if tokenizer is None else data.counted_bytes(tokenizer, end_token=config.end_token)


def _baseline_scores(
    counted: NgramBaselines, sources: list[EvaluationData], text_bytes: list[int | None], batch_size: int
) -> list[Score]:
    """The n-gram models on exactly the tokens that the model was scored on."""
    found: dict[str, list[Score]] = {"unigram": [], "bigram": []}
    for data, size in zip(sources, text_bytes, strict=True):
        sums, tokens = np.zeros(2), 0
        for index in range(data.num_batches(batch_size)):
            batch = data.batch(index, range(batch_size), batch_size)
            pair = batch.tokens[batch.counted].numpy(), batch.targets[batch.counted].numpy()
            sums += [part.sum() for part in counted.nats(*pair)]
            tokens += int(batch.counted.sum())
        for name, nats in zip(found, sums, strict=True):
            found[name].append(Score(name, float(nats), tokens, size))
    return [total(name, scores) for name, scores in found.items()]
