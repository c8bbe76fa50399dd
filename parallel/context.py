"""Context parallelism: rows are cut along N, and this is what crosses the cuts.

Every rank of a group has one contiguous piece, all of one length. A recurrent state crosses in one exchange for each
layer and direction (LASP-2, arXiv 2502.07563, with a fixed decay: the derivation is in docs/parallelism.md), keys and
values are gathered, and what is sequential in neither way trades its piece of the sequence for a part of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.weak import WeakTensorKeyDictionary

from model.context import Context, WholeSequence
from model.stack import Model
from parallel.collectives import Gather, Trade

VANISHED = {torch.float32: 20.0, torch.float64: 40.0}
"""A state that has shrunk by exp(-this) is below rounding beside any other, and is not sent."""


@dataclass
class SequenceCut(WholeSequence):
    """The sequence cut of one of `size` ranks; what its methods do is said in `WholeSequence`.

    Attributes:
        group: name of the process group.
        send_all: whether states are sent on also where they have vanished: the reference for when they are not.
        connected_BW: for each rank before this one, whether the document open at the end of its piece is that of our
            first token; for each rank behind, whether its first token continues the document open at our end. None
            where there are no documents.
    """

    group: str
    rank: int
    size: int
    send_all: bool = False
    connected_BW: Tensor | None = None

    def over(self, documents_BN: Tensor | None) -> SequenceCut:
        if documents_BN is None:
            return self
        first_BW = documents_BN[:, :: self._length(documents_BN)]
        last_BW = documents_BN[:, self._length(documents_BN) - 1 :: self._length(documents_BN)]
        from_before_BW = last_BW == first_BW[:, self.rank, None]
        to_behind_BW = first_BW == last_BW[:, self.rank, None]
        behind_W = torch.arange(self.size, device=documents_BN.device) > self.rank
        return replace(self, connected_BW=torch.where(behind_W, to_behind_BW, from_before_BW))

    def before(self, n: int) -> int:
        return self.rank * n

    def piece(self, x_BN: Tensor) -> Tensor:
        return x_BN.narrow(1, self.rank * self._length(x_BN), self._length(x_BN))

    def states(self, state_BHde: Tensor, slopes_H: Tensor | None, n: int) -> Tensor:
        return torch.ops.headway.exchange_states(
            state_BHde, slopes_H, self.connected_BW, n, self.group, self.send_all, False
        )

    def keys_values(self, k_BNHd: Tensor, v_BNHe: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
        # One message for both.
        both_BMHx = Gather.apply(torch.cat((k_BNHd, v_BNHe), dim=-1), self.group, self.size)
        if causal:
            both_BMHx = both_BMHx[:, : (self.rank + 1) * k_BNHd.shape[1]]
        k_BMHd, v_BMHe = both_BMHx.split([k_BNHd.shape[-1], v_BNHe.shape[-1]], dim=-1)
        return k_BMHd, v_BMHe

    def to_heads(self, x_BNHd: Tensor) -> Tensor:
        return Trade.apply(x_BNHd, 2, 1, self.group, self.size)

    def from_heads(self, x_BNHd: Tensor) -> Tensor:
        return Trade.apply(x_BNHd, 1, 2, self.group, self.size)

    def heads_here(self, x_H: Tensor) -> Tensor:
        return x_H.chunk(self.size)[self.rank]

    def _length(self, x_BN: Tensor) -> int:
        assert x_BN.shape[1] % self.size == 0, f"{x_BN.shape[1]} tokens are not cut into {self.size} equal pieces"
        return x_BN.shape[1] // self.size


class _Noted(WholeSequence):
    """The first of two pieces as far as shapes go, without another process; notes what a mixer asks of it."""

    size = 2

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def states(self, state_BHde: Tensor, slopes_H: Tensor | None, n: int) -> Tensor:
        self.asked.add("states")
        return torch.zeros_like(state_BHde)

    def keys_values(self, k_BNHd: Tensor, v_BNHe: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
        self.asked.add("keys_values")
        return k_BNHd, v_BNHe

    def to_heads(self, x_BNHd: Tensor) -> Tensor:
        self.asked.add("to_heads")
        return torch.cat(x_BNHd.chunk(2, dim=2), dim=1)

    def from_heads(self, x_BNHd: Tensor) -> Tensor:
        return torch.cat(x_BNHd.chunk(2, dim=1), dim=2)

    def heads_here(self, x_H: Tensor) -> Tensor:
        return x_H.chunk(2)[0]


ASKED_FOR = {"state": "states", "kv": "keys_values", "heads": "to_heads", "none": None}
"""What a mixer with this `context` has to ask of the cut."""


def crossing_faults(model: Model, n: int = 8) -> list[str]:
    """Mixers, a user's own perhaps, that do not ask for what they say crosses a cut: each piece would be a sequence of
    its own, without a word.

    Args:
        model: on the meta device, where each mixer is run once, on n tokens. One that cannot be run there goes unsaid.
    """
    faults: dict[str, None] = {}
    for block in model.layers.values():
        mixer, cut = block.mixer, _Noted()
        wanted = ASKED_FOR[mixer.context]
        positions = torch.zeros(1, n, dtype=torch.int64, device="meta")
        ctx = Context(positions, cut=cut)
        try:
            mixer.prepare(ctx)
            mixer(torch.empty(1, n, model.architecture.model.d_model, device="meta"), ctx)
        except RuntimeError:
            continue  # An operation has no form there, or asks for values.
        if wanted is not None and wanted not in cut.asked:
            faults[
                f'{type(mixer).__name__} says "{mixer.context}" crosses a cut of the sequence, but its forward never '
                f"calls ctx.cut.{wanted}."
            ] = None
    return list(faults)


def reaching_heads(slopes: list[float], tokens: int, dtype: torch.dtype) -> list[int]:
    """The heads whose state is still there after passing through so many tokens of others, by their slopes."""
    return [head for head, slope in enumerate(slopes) if slope * tokens <= VANISHED[dtype]]


_reaching: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Slopes -> (what was asked, the heads as index tensors): slopes stand on the device, and asking for them waits."""


def heads_by_distance(slopes_H: Tensor | None, state: Tensor, n: int, size: int, send_all: bool) -> list[Tensor]:
    """For 0, 1, ... pieces of n tokens in between: indices of the heads that are sent so far."""
    if slopes_H is None or send_all:
        return [torch.arange(state.shape[1], device=state.device)] * (size - 1)
    asked = (n, size, state.dtype, slopes_H._version)
    known, heads = _reaching.get(slopes_H, (None, []))
    if known != asked:
        slopes = slopes_H.tolist()
        # The neighbour gets all: it is nearer than any.
        reaching = [reaching_heads(slopes, n * between, state.dtype) for between in range(size - 1)]
        heads = [torch.tensor(indices, dtype=torch.int64, device=state.device) for indices in reaching]
        _reaching[slopes_H] = (asked, heads)
    return heads


@torch.library.custom_op("headway::exchange_states", mutates_args=())
def exchange_states(
    state: Tensor,
    slopes: Tensor | None,
    connected: Tensor | None,
    n: int,
    group: str,
    send_all: bool,
    backwards: bool,
) -> Tensor:
    """What enters this rank's piece of the sequence from the pieces before it (`backwards`: from those behind it).

        P_r = sum over j < r of exp(-slope n (r - 1 - j)) S_j,     over those j whose document reaches r

    where S_j is what rank j gives. Backwards the same sum over j > r, which is its derivative. One collective, in which
    a rank sends to each later (earlier) one the heads whose state is not nothing by then. An operator of its own, since
    which heads these are is no business of a compiler's, and recomputation must not ask for them again.

    Args:
        state: [B, H, d, e], float32 or float64.
        slopes: [H] >= 0, or None.
        connected: [B, W] bool, or None; see `SequenceCut`.
        n: tokens in a piece.
    """
    process_group = _resolve_process_group(group)
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    heads = heads_by_distance(slopes, state, n, size, send_all)
    before, behind = range(rank), range(rank + 1, size)
    sources, targets = (behind, before) if backwards else (before, behind)

    def heads_between(other: int) -> Tensor:
        return heads[abs(other - rank) - 1]

    sent = [state[:, heads_between(target)].flatten() for target in targets]
    per_head = state[:, :1].numel()
    out_sizes = [len(heads_between(other)) * per_head if other in sources else 0 for other in range(size)]
    in_sizes = [len(heads_between(other)) * per_head if other in targets else 0 for other in range(size)]
    received = state.new_empty(sum(out_sizes))
    dist.all_to_all_single(
        received, torch.cat(sent) if sent else state.new_empty(0), out_sizes, in_sizes, group=process_group
    )
    entering = torch.zeros_like(state)
    for source, part in zip(range(size), received.split(out_sizes), strict=True):
        if source not in sources:
            continue
        indices, between = heads_between(source), abs(source - rank) - 1
        part_BHde = part.view(state.shape[0], len(indices), *state.shape[2:])
        if slopes is not None and between > 0:
            part_BHde = part_BHde * torch.exp(-slopes[indices].to(state.dtype) * (n * between))[:, None, None]
        if connected is not None:
            part_BHde = part_BHde * connected[:, source, None, None, None]
        entering.index_add_(1, indices, part_BHde)
    return entering


@exchange_states.register_fake
def _(state: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(state)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slopes, connected, *ctx.rest, ctx.backwards = inputs
    ctx.save_for_backward(slopes, connected)


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slopes, connected = ctx.saved_tensors
    back = exchange_states(grad.contiguous(), slopes, connected, *ctx.rest, not ctx.backwards)
    return back, None, None, None, None, None, None


exchange_states.register_autograd(_exchange_back, setup_context=_keep_for_backward)
