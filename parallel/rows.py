"""Rows of embedding and head that training leaves as they are: those of ids whose model is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel.data import View, held, local

VOCABULARY = ("embedding.weight", "head.weight")


class KeptRows:
    """Of the parameters that are here, which rows are kept.

    Args:
        parameters: name -> parameter. whole: from a name and a parameter to it as a part of the whole model's.
        ids: first and one beyond the last.
    """

    def __init__(self, parameters: Mapping[str, Tensor], whole: View, ids: Sequence[tuple[int, int]]):
        self._parameters = {name: parameters[name] for name in VOCABULARY if name in parameters and ids}
        self._rows: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            _, rows, _ = held(whole(name, parameter))
            places = torch.arange(rows.start, rows.stop)
            kept = torch.stack([(places >= first) & (places < end) for first, end in ids]).any(0)
            self._rows[name] = kept.nonzero().flatten().to(parameter.device)

    def drop_gradients(self) -> None:
        """They have none: so they do not count in the norm, and no moment of an optimizer moves."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                local(parameter.grad).index_fill_(0, self._rows[name], 0.0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever an optimizer does meanwhile, decay for instance, they come out as they went in."""
        with torch.no_grad():
            before = {name: local(p)[self._rows[name]].clone() for name, p in self._parameters.items()}
        yield
        with torch.no_grad():
            for name, values in before.items():
                local(self._parameters[name]).index_copy_(0, self._rows[name], values)
