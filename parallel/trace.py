"""What a step holds in memory and what it sends: counted on the real program, operation by operation.

A `Trace` watches every operation that torch dispatches. On fake tensors (torch's `FakeTensorMode`) and a process group
of torch's kind `fake`, that needs neither the memory nor the other processes; on real ones it counts the same. So there
is no formula for a layer, and a user's own is counted as well as ours.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.data import local
from parallel.traffic import GLOO_COPIES, messages

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "rest")


@dataclass
class Traffic:
    """Collectives of one kind in one group: how many there were, and the bytes that this rank sent."""

    count: float = 0
    sent: float = 0.0

    def plus(self, other: Traffic, times: float = 1) -> Traffic:
        return Traffic(self.count + times * other.count, self.sent + times * other.sent)


@dataclass
class _Span:
    """A piece of memory from its making to its end, both counted in events.

    Attributes:
        resized: it began or ended because its storage was resized, as FSDP2 does with what it gathers.
    """

    storage: int
    size: int
    begun: int
    in_backward: bool
    ended: float = inf
    resized: bool = False


@dataclass
class _Storage:
    """A storage that is alive: its serial number, its current span, and what tells us of its end."""

    serial: int
    span: _Span
    end: weakref.ref = field(repr=False)


class Trace(TorchDispatchMode):
    """Counts memory and messages while it is entered.

    Args:
        fake: the tensors have no values: where one is asked for, it is 1.
        gloo: messages travel, or are to be counted as if they travelled, by gloo.

    Attributes:
        traffic: (kind, name of the process group) -> what was sent.
        peak: most bytes held at one time.
    """

    def __init__(self, *, fake: bool, gloo: bool):
        super().__init__()
        self.fake, self.gloo = fake, gloo
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.peak = 0
        self._peak_at = 0
        self._live = 0
        self._events = 0
        self._turns: dict[bool, list[int]] = {False: [], True: []}
        self._spans: list[_Span] = []
        self._storages: dict[int, _Storage] = {}
        self._owned: dict[int, str] = {}

    def __enter__(self) -> Trace:
        self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._resized(storage)

        # FSDP2 frees and takes memory so, which is no operation that is dispatched.
        torch.UntypedStorage.resize_ = resize_
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # It is taken apart first; what is done to the local tensor comes here again.
        if self.fake and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        for message in messages(func, args, kwargs or {}, result):
            if message.kind == "send" and message.size <= 8:
                continue  # torch's pipelines open their connections with a number each, once in a run.
            traffic = self.traffic.setdefault((message.kind, message.group), Traffic())
            traffic.count += 1
            traffic.sent += message.sent
            if self.gloo and message.kind in GLOO_COPIES:
                self._begin(-1, message.size)
                self._end(self._spans[-1])
        return result

    def traffic_so_far(self) -> dict[tuple[str, str], Traffic]:
        """A copy, to which what follows is not added."""
        return {key: replace(traffic) for key, traffic in self.traffic.items()}

    def own(self, category: str, tensors: Iterable[Tensor | None]) -> None:
        """Say of tensors that they are parameters, gradients or states of the optimizer."""
        for tensor in tensors:
            if tensor is not None:
                self._owned[self._see(local(tensor)).serial] = category

    def memory(self) -> dict[str, int]:
        """Bytes at the peak by category; their sum is the peak.

        Parameters and optimizer states are what the process owns of them. Activations were made by forward and are kept
        for backward; gradients were made by backward and are kept after it. The rest: gathered parameters, gradients
        that go into a sum over ranks, messages, and what single operations work with.
        """
        parts = dict.fromkeys(CATEGORIES, 0)
        for span in self._spans:
            if span.begun <= self._peak_at < span.ended:
                parts[self._category(span)] += span.size
        assert sum(parts.values()) == self.peak
        return parts

    def _category(self, span: _Span) -> str:
        if span.storage in self._owned:
            return self._owned[span.storage]
        # What outlives the pass that it was made in: from forward into backward, or from backward into what follows.
        turns = self._turns[not span.in_backward]
        following = bisect_right(turns, span.begun)
        if span.resized or following == len(turns) or turns[following] > span.ended:
            return "rest"
        return "gradients" if span.in_backward else "activations"

    def _see(self, tensor: Tensor) -> _Storage:
        """Note the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is None:
            serial = len(self._spans)
            span = self._begin(serial, storage.nbytes())
            known = _Storage(serial, span, weakref.ref(storage, lambda _: self._gone(key)))
            self._storages[key] = known
        elif known.span.size != storage.nbytes():
            self._resized(storage)
        return known

    def _gone(self, key: int) -> None:
        self._end(self._storages.pop(key).span)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._storages.get(storage._cdata)
        if known is not None:
            self._end(known.span)
            known.span.resized = True
            known.span = self._begin(known.serial, storage.nbytes())
            known.span.resized = True

    def _begin(self, storage: int, size: int) -> _Span:
        in_backward = torch._C._current_graph_task_id() != -1
        self._events += 1
        if self._spans and self._spans[-1].in_backward != in_backward:
            self._turns[in_backward].append(self._events)
        span = _Span(storage, size, self._events, in_backward)
        self._spans.append(span)
        self._live += size
        if self._live > self.peak:
            self.peak, self._peak_at = self._live, self._events
        return span

    def _end(self, span: _Span) -> None:
        self._events += 1
        span.ended = self._events
        self._live -= span.size
