"""Messages: which collectives an operation is, in which group, and how many bytes a rank sends for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from parallel.context import heads_by_distance

_WORDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "isend": "send",
}
"""How operations of `c10d` and `_c10d_functional` are called, without underscores: they begin so. What is received is
what another rank sends."""

_ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "broadcast": 1}
"""Round a ring of n ranks, each sends (n - 1) / n of the message so many times."""

GLOO_COPIES = frozenset({"all-gather", "reduce-scatter"})
"""torch's gloo backend gathers into a flat buffer and copies from there (ProcessGroupGloo.cpp, AsyncAllgatherWork); it
has no reduce-scatter, and sums a copy of the whole input by an all-reduce (reduce_scatter_tensor_coalesced). Either
copy is as large as the whole message, and torch dispatches nothing for it."""


@dataclass(frozen=True)
class Message:
    """A collective as one rank sees it.

    Attributes:
        group: name of the process group; ranks: how many are in it.
        size: bytes of the whole tensor: what was gathered, or goes into a sum; of a `send`, and of an `exchange`, in
            which ranks send each other different amounts, what the rank sends that sends most.
    """

    kind: str
    group: str
    ranks: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends, round a ring."""
        if self.kind in ("send", "exchange"):
            return self.size
        return _ROUNDS[self.kind] * self.size * (self.ranks - 1) / self.ranks


def _exchanged_states(
    state: Tensor, slopes: Tensor | None, connected: Tensor | None, n: int, group: str, send_all: bool, backwards: bool
) -> Iterator[Message]:
    """Of the ranks of a cut sequence, the first sends most, and backwards the last."""
    size = dist.distributed_c10d._resolve_process_group(group).size()
    with unset_fake_temporarily():
        heads = heads_by_distance(slopes, state, n, size, send_all)
    of_a_head = state[:, :1].numel() * state.itemsize
    yield Message("exchange", group, size, of_a_head * sum(len(indices) for indices in heads))


TRAFFIC: dict[str, Callable[..., Iterable[Message]]] = {"headway::exchange_states": _exchanged_states}
"""What an operation of our own sends, of which torch shows us the outside only: its name (`headway::exchange`) -> a
function of its arguments."""


def messages(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> list[Message]:
    """What this operation sends to, or exchanges with, other ranks. Groups of one rank are left out."""
    name = func._schema.name
    if name in TRAFFIC:
        return list(TRAFFIC[name](*args, **kwargs))
    if func.namespace not in ("c10d", "_c10d_functional"):
        return []
    word = name.partition("::")[2].replace("_", "")
    kind = next((kind for start, kind in _WORDS.items() if word.startswith(start)), None)
    if kind is None:
        return []
    group = _group(func, args, kwargs)
    size = max(_size(value) for value in (*args, *kwargs.values(), result))
    return [Message(kind, group.group_name, group.size(), size)] if group.size() > 1 else []


def _group(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dist.ProcessGroup:
    """The process group among the arguments, by its name or as itself."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if "group_name" in given:
        return torch._C._distributed_c10d._resolve_process_group(given["group_name"])
    return dist.ProcessGroup.unbox(given["process_group"])


def _size(value: Any) -> int:
    """Bytes of the tensors in one argument: the largest argument is the whole message."""
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
