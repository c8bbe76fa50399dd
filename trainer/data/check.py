"""What is wrong with the data of a run, found before a process group exists."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.config import DataConfig
from trainer.data.indexed import TokenFile, open_pair, pair_faults
from trainer.data.modalities import column_faults
from trainer.data.sidecar import read_sidecar
from trainer.data.split import split_ranges, training_range
from trainer.data.tokenizer import load_tokenizer
from trainer.data.training import too_short

if TYPE_CHECKING:
    from model.untie import UntieConfig

# Up to here a .bin is scanned for ids; beyond, every sample is checked when it is read.
LARGEST_SCAN_BYTES = 2 << 30


def check_sources(config: DataConfig, vocab_size: int | None = None, untie: UntieConfig | None = None) -> list[str]:
    """Every fault of the files that `config` names, one sentence each; empty when there is none.

    Missing, empty, damaged or cut files; a sidecar that belongs to other files; ids outside [0, vocab_size), by
    document and place (not looked for when it is None); another tokenizer than the data was made with, or other codes
    of images; a split that leaves nothing to train or to validate on; too few tokens for one sample; with `untie`, what
    keeps the data from saying which modality its tokens are of. Reads headers, and all tokens only where no sidecar
    says what they are and they take no more than 2 GiB. Imports neither torch nor megatron-core.
    """
    faults: list[str] = []
    sidecars: dict[str, dict[str, Any]] = {}
    for key, sources in (("train", config.training_sources()), ("validation", config.validation_sources())):
        for source in sources:
            found = pair_faults(source.path)
            if not found:
                data = open_pair(source.path)
                found = _length_faults(config, key, data) + _content_faults(data, vocab_size, sidecars, untie)
            faults += [f"data.{key}: {fault}" for fault in found]
    faults += _tokenizer_faults(config, sidecars) + _code_faults(sidecars)
    if config.end_token is not None and vocab_size is not None and config.end_token >= vocab_size:
        faults.append(f"data.end_token = {config.end_token}: outside the model's vocabulary of {vocab_size}.")
    return list(dict.fromkeys(faults))


def _length_faults(config: DataConfig, key: str, data: TokenFile) -> list[str]:
    """Is there something to train on, and something to predict in validation?"""
    validated = range(data.documents) if key == "validation" else range(0)
    faults = []
    if key == "train":
        trained = training_range(data.documents, config.split)
        if config.split:
            validated = split_ranges(data.documents, config.split)[1]
            for name, left in (("train", trained), ("validate", validated)):
                if len(left) == 0:
                    faults.append(
                        f"{data.prefix}: data.split = {config.split} of {data.documents} documents leaves none to "
                        f"{name} on; a split that leaves at least one each works, or a dataset for data.validation."
                    )
        tokens = _tokens_in(data, trained)
        if len(trained) and tokens < config.seq_len + 1:
            faults.append(too_short(data.prefix, tokens, config.seq_len))
    if len(validated) and int(data.lengths[validated.start : validated.stop].max()) < 2:
        faults.append(
            f"{data.prefix}: no document to validate on has a second token, so there is nothing to predict; "
            "documents of two tokens and more are needed."
        )
    return faults


def _tokens_in(data: TokenFile, documents: range) -> int:
    return int(data.lengths[documents.start : documents.stop].sum(dtype=np.int64))


def _content_faults(
    data: TokenFile, vocab_size: int | None, sidecars: dict[str, dict[str, Any]], untie: UntieConfig | None
) -> list[str]:
    """Does the sidecar describe these files, do ids fit the vocabulary, and are modalities known? Notes a good
    sidecar."""
    try:
        sidecar = read_sidecar(data.prefix)
    except ValueError as fault:
        return [str(fault)]
    if sidecar is not None:
        faults = [
            f"{data.prefix}.json describes a {suffix} of {sidecar.get(key)} bytes, and {data.prefix}{suffix} has "
            f"{os.path.getsize(data.prefix + suffix)}: they do not belong together; copy the whole set again."
            for suffix, key in ((".bin", "bin_bytes"), (".idx", "idx_bytes"))
            if sidecar.get(key) != os.path.getsize(data.prefix + suffix)
        ]
        if faults:
            return faults
        sidecars[data.prefix] = sidecar
    faults = [] if vocab_size is None else _id_faults(data, vocab_size, sidecar)
    return faults + ([] if untie is None else column_faults(data, untie))


def _id_faults(data: TokenFile, vocab_size: int, sidecar: dict[str, Any] | None) -> list[str]:
    if sidecar is not None and sidecar["max_token"] < vocab_size:
        return []
    advice = "use the vocabulary size of the tokenizer that made the data"
    if data.tokens.nbytes <= LARGEST_SCAN_BYTES:
        outside = data.first_outside(vocab_size)
        if outside is None:
            return []
        token, document, place = outside
        return [
            f"{data.prefix}.bin: token {place} of document {document} is id {token}, outside the model's vocabulary "
            f"of {vocab_size}; {advice}."
        ]
    if sidecar is None:
        return []
    return [
        f"{data.prefix}.bin: holds ids up to {sidecar['max_token']}, outside the model's vocabulary of {vocab_size}; "
        f"{advice}."
    ]


def _tokenizer_faults(config: DataConfig, sidecars: dict[str, dict[str, Any]]) -> list[str]:
    """Was all the data made with one tokenizer, and with the one that the configuration names?"""
    made_with = {prefix: sidecar["tokenizer_fingerprint"] for prefix, sidecar in sidecars.items()}
    if config.tokenizer is not None:
        try:
            wanted = load_tokenizer(config.tokenizer).fingerprint
        except ValueError as fault:
            return [f"data.tokenizer: {fault}"]
        return [
            f"data.tokenizer = {config.tokenizer}: {prefix} was made with another tokenizer ({had[:12]}, not "
            f"{wanted[:12]}); the one it was made with lies in {prefix}.tokenizer."
            for prefix, had in made_with.items()
            if had != wanted
        ]
    if len(set(made_with.values())) <= 1:
        return []
    listed = ", ".join(f"{prefix} ({had[:12]})" for prefix, had in made_with.items())
    return [f"data: the sources were made with different tokenizers: {listed}; prepare them with one."]


def _code_faults(sidecars: dict[str, dict[str, Any]]) -> list[str]:
    """Do the codes of images have the same ids everywhere?"""
    ranges = {prefix: found["modalities"]["ranges"] for prefix, found in sidecars.items() if found.get("modalities")}
    if all(found == next(iter(ranges.values())) for found in ranges.values()):
        return []
    listed = ", ".join(f"{prefix} ({found})" for prefix, found in ranges.items())
    return [
        f"data: the sources number their modalities differently: {listed}; prepare them with one tokenizer and one "
        "--image-codes."
    ]
