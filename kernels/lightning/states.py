"""How states travel from chunk to chunk: one lower-triangular matrix of decays per head instead of a loop.

The sequence is cut at T + 1 boundaries p_0 = 0, p_1, ..., p_T = N. What stands at boundary i reaches boundary j >= i
multiplied by exp(-s (p_j - p_i)) if one document is open at both, and not at all otherwise. Everything here follows
from that one matrix, `transfer`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Boundaries are treated in groups of this many chunks, the groups in groups again: the (T x T) product would make the
# cost per token grow with the length. Groups of 8 to 32 measure alike on a CPU.
GROUP = 16


class Boundaries(NamedTuple):
    """The cuts between chunks: how many tokens lie before each, and which document is open there.

    The document open at boundary 0 is that of the first token, at every other boundary that of the token before it.
    """

    position_P: Tensor
    document_BP: Tensor | None

    def padded(self, count: int) -> "Boundaries":
        """Repeat the last boundary `count` times: chunks of no tokens."""
        documents = self.document_BP
        if documents is not None:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, count)], dim=1)
        return Boundaries(torch.cat([self.position_P, self.position_P[-1:].expand(count)]), documents)

    def grouped(self, size: int) -> "Boundaries":
        """View as [..., groups, size + 1]: neighbouring groups share a boundary."""
        documents = None if self.document_BP is None else self.document_BP.unfold(1, size + 1, size)
        return Boundaries(self.position_P.unfold(0, size + 1, size), documents)

    def every(self, size: int) -> "Boundaries":
        """Keep the boundaries between groups of `size` chunks."""
        return Boundaries(self.position_P[::size], None if self.document_BP is None else self.document_BP[:, ::size])


def transfer(boundaries: Boundaries, slopes_H: Tensor) -> Tensor:
    """Return what is left at each boundary (row) of what stood at each earlier one (column), [1 or B, H, ..., P, P].

    Entries above the diagonal are zero. No exponent is positive.
    """
    position = boundaries.position_P
    distance = (position[..., :, None] - position[..., None, :]).clamp(min=0)
    slopes = slopes_H.view(-1, *[1] * distance.dim())
    weight = torch.exp(-slopes * distance).tril().unsqueeze(0)
    if boundaries.document_BP is None:
        return weight
    document = boundaries.document_BP
    return weight * (document[..., :, None] == document[..., None, :]).unsqueeze(1)


def carry_states(
    value_BHTx: Tensor, carry_BHx: Tensor | None, boundaries: Boundaries, slopes_H: Tensor, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Add up what the chunks hand on to each other.

    Forward, `value` is what each chunk adds to the state by its end and `carry` the state at boundary 0 (None: zero);
    returns the state before each chunk, [B, H, T, x], and the state at the last boundary, [B, H, x].

    `transposed` runs the same sums backwards, which is the derivative: `value` is then the cotangent of the state
    before each chunk and `carry` that of the last state; returns the cotangents of what each chunk adds and of the
    state at boundary 0.
    """
    chunks = value_BHTx.shape[2]
    if chunks > GROUP:
        return _carry_states_in_groups(value_BHTx, carry_BHx, boundaries, slopes_H, transposed)
    inside, to_end, from_start, whole = _roles(transfer(boundaries, slopes_H), transposed)
    states_BHTx = torch.matmul(inside, value_BHTx)
    total_BHx = torch.matmul(to_end.unsqueeze(-2), value_BHTx).squeeze(-2)
    if carry_BHx is not None:
        states_BHTx.addcmul_(from_start.unsqueeze(-1), carry_BHx.unsqueeze(-2))
        total_BHx.addcmul_(whole.unsqueeze(-1), carry_BHx)
    return states_BHTx, total_BHx


def _carry_states_in_groups(
    value_BHTx: Tensor, carry_BHx: Tensor | None, boundaries: Boundaries, slopes_H: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Do the work of `carry_states` in two levels: among the groups' totals, then inside all groups at once."""
    chunks = value_BHTx.shape[2]
    groups = -(-chunks // GROUP)
    size = -(-chunks // groups)
    missing = groups * size - chunks
    if missing:
        value_BHTx, boundaries = F.pad(value_BHTx, (0, 0, 0, missing)), boundaries.padded(missing)
    value_BHGtx = value_BHTx.unflatten(2, (groups, size))
    inside, to_end, from_start, _ = _roles(transfer(boundaries.grouped(size), slopes_H), transposed)

    totals_BHGx = torch.matmul(to_end.unsqueeze(-2), value_BHGtx).squeeze(-2)
    carries_BHGx, last_BHx = carry_states(
        totals_BHGx, carry_BHx, boundaries.every(size), slopes_H, transposed=transposed
    )
    states_BHGtx = torch.matmul(inside, value_BHGtx)
    states_BHGtx.addcmul_(from_start.unsqueeze(-1), carries_BHGx.unsqueeze(-2))
    states_BHTx = states_BHGtx.flatten(2, 3)
    return (states_BHTx[:, :, :chunks] if missing else states_BHTx), last_BHx


def _roles(weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut a transfer matrix [..., T + 1, T + 1] into its uses.

    A chunk's value stands at the boundary after it, the state before a chunk at the boundary before it. Returns the
    weights from values to states [..., T, T], from values to the last boundary [..., T], from boundary 0 to the states
    [..., T], and from boundary 0 to the last one [...].
    """
    inside, to_end = weight[..., :-1, 1:], weight[..., -1, 1:]
    from_start, whole = weight[..., :-1, 0], weight[..., -1, 0]
    return (inside.mT, from_start, to_end, whole) if transposed else (inside, to_end, from_start, whole)
