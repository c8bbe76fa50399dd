"""Small models around one mixer, and what every conformance test needs of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Architecture
from model.layer import Mixer
from model.mixers import MIXERS
from model.registry import find
from model.settings import build_architecture
from model.stack import Model
from parallel.data import initialise

D_MODEL, VOCAB = 32, 61


def mixer_class(kind: str) -> type[Mixer]:
    found = find(kind, MIXERS, "mixer", allow_code=True)
    assert issubclass(found, Mixer)
    return found


CASES = [(kind, index) for kind in MIXERS for index in range(len(mixer_class(kind).examples))]
"""Every registered mixer under each of its own examples: a new one is tested by being registered."""


def built(tables: dict[str, Any]) -> Model:
    """The model of these tables in fp64, initialised by name."""
    faults: list[str] = []
    _, found = build_architecture(tables, faults)
    assert found is not None, faults
    with torch.device("meta"):
        model = Model(found).double()
    initialise(model, seed=0, device=torch.device("cpu"))
    return model


def architecture(kind: str, example: int = 0, *, num_layers: int = 2, **model: Any) -> Architecture:
    """A model of width 32 whose layers all have this mixer."""
    settings = mixer_class(kind).examples[example]
    tables = {
        "model": {"d_model": D_MODEL, "num_layers": num_layers, "vocab_size": VOCAB, "pattern": ["it"]} | model,
        "mixers": {"it": {"kind": kind} | settings},
        "feedforwards": {"swiglu": {"d_ff": 48}},
    }
    faults: list[str] = []
    _, found = build_architecture(tables, faults, allow_code=True)
    assert found is not None, faults
    return found


def small_model(kind: str, example: int = 0, *, dtype: torch.dtype = torch.float64, **model: Any) -> Model:
    """Built as a run builds it: on the meta device, then initialised by name. Weights are made larger than usual, so
    that attention is far from uniform and a fault in it shows."""
    shape = architecture(kind, example, **({"init_std": 0.3} | model))
    with torch.device("meta"):
        found = Model(shape).to(dtype)
    initialise(found, seed=1, device=torch.device("cpu"))
    return found


def random_documents(batch_size: int, n: int, seed: int = 0) -> Tensor:
    """Document ids with boundaries at random places, one of them right after the first token."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(batch_size, n, generator=generator) < 0.15
    begins[:, 0] = False
    begins[0, 1] = True
    return begins.cumsum(1)


def positions_of(documents: Tensor) -> Tensor:
    """Positions that restart at each document."""
    places = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


def random_batch(batch_size: int, n: int, seed: int = 0, *, isolated: bool = True) -> Batch:
    """Tokens of several documents a row (or of one); 5 to 95% of the tokens of a row count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (batch_size, n + 1), generator=generator)
    documents = random_documents(batch_size, n, seed)
    share = torch.linspace(0.05, 0.95, batch_size)[:, None]
    counted = torch.rand(batch_size, n, generator=generator) < share
    if not isolated:
        places = torch.arange(n).expand(batch_size, n)
        return Batch(tokens[:, :-1], tokens[:, 1:], counted, None, places)
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, documents, positions_of(documents))
