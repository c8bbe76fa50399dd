"""Losses beside the objective's own, in a model that is spread: they watch forward passes and enter backward there.

Each is defined over whole sequences, or the global batch, so it does not depend on how those are spread. Its gradient
enters backward where it arises, in whatever stage and micro-batch; values are added up beside that, and summed over all
processes once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.attention import AttentionMap
from model.observer import Observer
from model.routing import Routing
from model.stack import Model


@dataclass(frozen=True)
class StepFacts:
    """What auxiliary losses have to know of a training step.

    Attributes:
        sequences: in the global batch.
        gradient_divisor: by how much the engine divides summed gradients.
    """

    sequences: int
    gradient_divisor: int


class OneForward(Observer):
    """Sees one forward pass of one stage in training.

    Recomputation goes through the blocks again, with the same observer: once it is closed, nothing is counted or summed
    over processes another time.
    """

    closed = False

    def close(self) -> None:
        """The forward pass is over."""
        self.closed = True


class Watcher(Protocol):
    """Whoever sees the forward passes of training steps."""

    def begin(self, facts: StepFacts) -> None:
        """A training step begins."""
        ...

    def one_forward(self) -> OneForward:
        """The observer of a forward pass that begins: under a pipeline several are under way."""
        ...


class AuxiliaryLoss(Watcher, Protocol):
    """One of these losses.

    Attributes:
        name: of its value among the metrics.
    """

    name: str

    def finish(self) -> float:
        """Its weighted value over the global batch. Collective."""
        ...


class _Several(OneForward):
    """One observer after the other, each of which sees what the one before put in place of queries and scores."""

    def __init__(self, parts: list[OneForward]):
        self.parts = parts

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        for part in self.parts:
            weights = replace(weights, q_BNHd=part.attention(layer, weights))
        return weights.q_BNHd

    # Under run.compile it stays outside of the graph, which breaks here: it counts, and talks to other processes.
    @torch.compiler.disable
    def routing(self, layer: int, found: Routing) -> Tensor:
        for part in self.parts:
            found = replace(found, scores_BNU=part.routing(layer, found))
        return found.scores_BNU


@contextmanager
def watching(stages: Sequence[Model], watchers: Sequence[Watcher]) -> Iterator[None]:
    """Meanwhile every forward pass of these stages is a part of a training step."""

    def begin(stage: nn.Module, args: tuple[Any, ...]) -> None:
        assert stage.observer is None, "a training step has one observer"
        stage.observer = _Several([watcher.one_forward() for watcher in watchers])

    def end(stage: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        observer = stage.observer
        assert isinstance(observer, _Several)
        stage.observer = None
        observer.close()

    hooks = []
    for stage in stages if watchers else ():
        hooks += [stage.register_forward_pre_hook(begin), stage.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
