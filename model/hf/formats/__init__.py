"""Kinds of Hugging Face checkpoints: what their `config.json` says, as our tables, and back.

One file for each kind. The layouts of their weights stand in `model/hf/names.py`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from model.config import Architecture
from model.hf.formats.format import Format, Unfit
from model.hf.formats.gpt2 import GPT2
from model.hf.formats.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from model.hf.formats.minimax import MINIMAX
from model.hf.formats.mixtral import MIXTRAL
from model.hf.formats.own import OWN
from model.hf.formats.transnormer import TRANSNORMER

FORMATS: dict[str, Format] = {
    entry.model_type: entry for entry in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, GPT2, MINIMAX, TRANSNORMER, OWN)
}
"""By `model_type`, in the order in which an export tries them: the last takes every model."""


def format_of(config: dict[str, Any], folder: Path) -> Format:
    """The kind that a `config.json` names.

    Raises:
        ValueError: one that we do not know, naming the nearest.
    """
    kind = config.get("model_type")
    if kind in FORMATS:
        return FORMATS[kind]
    near = difflib.get_close_matches(str(kind), FORMATS, n=1, cutoff=0.6)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    code = ""
    if "auto_map" in config:
        code = " It names code of its own, which Headway never runs from a model folder."
    raise ValueError(
        f"{folder / 'config.json'}: model_type = {kind!r} is no kind of checkpoint that Headway reads "
        f"({', '.join(FORMATS)}){hint}.{code}"
    )


def choose_format(architecture: Architecture, wanted: str | None) -> Format:
    """What a model is exported as: the kind asked for, or the first that can say all of it.

    Raises:
        ValueError: an unknown kind, or one that cannot say what this model is, with every reason.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            near = difflib.get_close_matches(wanted, FORMATS, n=1, cutoff=0.0)[0]
            raise ValueError(f"--format {wanted!r}: expected one of {', '.join(FORMATS)}; the nearest is {near!r}.")
        try:
            _write(FORMATS[wanted], architecture)
        except Unfit as fault:
            raise ValueError(f"--format {wanted}: {fault}") from fault
        return FORMATS[wanted]
    for entry in FORMATS.values():
        try:
            _write(entry, architecture)
        except Unfit:
            continue
        return entry
    raise AssertionError("the last format takes every model")


def _write(entry: Format, architecture: Architecture) -> None:
    """Raises Unfit where the kind cannot say what this model is."""
    reasons = []
    if architecture.untied is not None:
        reasons.append("modalities have no weights of their own there.")
    if architecture.model.norm_position != "pre":
        reasons.append("norms stand before mixers and feed-forwards there.")
    if entry is not OWN and reasons:
        raise Unfit(reasons)
    entry.write(architecture)
