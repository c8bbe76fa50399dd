"""Headway's own kind: our names, our tables in `config.json`, and the modelling file with the export."""

from __future__ import annotations

from typing import Any

from model.config import Architecture
from model.hf.formats.format import Format, Tables
from model.settings import architecture_tables


def read(raw: dict[str, Any]) -> Tables:
    tables = raw.get("headway")
    if not isinstance(tables, dict):
        raise ValueError("headway, the tables [model], [mixers.NAME] and [feedforwards.NAME], is missing.")
    found: Tables = {name: dict(tables.get(name, {})) for name in ("model", "mixers", "feedforwards")}
    # In the folder heads lie as they are numbered; here they are kept as the mixer likes it.
    found["mixers"] = {name: without_order(table) for name, table in found["mixers"].items()}
    if "untie" in tables:
        found["untie"] = dict(tables["untie"])
    return found


def without_order(mixer: dict[str, Any]) -> dict[str, Any]:
    """A mixer's table without what says how its heads are kept."""
    return {key: value for key, value in mixer.items() if key != "group_order"}


def write(architecture: Architecture) -> dict[str, Any]:
    m = architecture.model
    tables = architecture_tables(architecture)
    # The source of the first weights says nothing about the model.
    tables["model"].pop("init_from", None)
    for mixer in tables["mixers"].values():
        if "group_order" in mixer:
            mixer["group_order"] = sorted(mixer["group_order"])
    return {
        "headway": tables,
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": architecture.mixers[architecture.mixer_names[0]][1].num_heads,
        "initializer_range": m.init_std,
        # There is one matrix, not two that are tied.
        "tie_word_embeddings": False,
    }


OWN = Format("headway", "headway", "HeadwayForCausalLM", read, write, code="model.hf.modeling")
