"""What a layer is told beside its input: positions, documents, the causal flag, and what crosses a sequence cut."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.grouped import Groups
from model.dispatch import WholeExperts
from model.observer import Observer


class WholeSequence:
    """The sequence cut of one process: there is none, so nothing is exchanged.

    `parallel/` hands in an object with the same methods when the rows are cut along N into `size` equal, contiguous
    pieces over as many processes; a mixer never sees a process group. What a mixer calls is what it declares as its
    `context`: `states`, `keys_values`, or `to_heads` and `from_heads`.
    """

    size: int = 1

    def over(self, documents_BN: Tensor | None) -> WholeSequence:
        """The cut of rows with these document ids, of whole rows."""
        return self

    def before(self, n: int) -> int:
        """How many tokens of a row stand before this piece of n."""
        return 0

    def piece(self, x_BN: Tensor) -> Tensor:
        """This process's piece `[B, n, ...]` of whole rows."""
        return x_BN

    def states(self, state_BHde: Tensor, slopes_H: Tensor | None, n: int) -> Tensor:
        """The state that enters this piece, from what each piece of n tokens leaves behind by itself.

        Both belong to documents: what is given to that of the piece's last token, what is returned to that of its
        first. `slopes_H`, fixed numbers >= 0: a state shrinks by exp(-slope) a token; None where it does not.
        """
        return torch.zeros_like(state_BHde)

    def keys_values(self, k_BNHd: Tensor, v_BNHe: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, M, H, .]` of all tokens that this piece may see, from those of its own.

        M counts from the beginning of the row to the end of the piece where `causal`, otherwise to the row's.
        """
        return k_BNHd, v_BNHe

    def to_heads(self, x_BNHd: Tensor) -> Tensor:
        """Exchange: a piece of the sequence with all heads -> the whole sequence with a part of the heads."""
        return x_BNHd

    def from_heads(self, x_BNHd: Tensor) -> Tensor:
        """The exchange undone."""
        return x_BNHd

    def heads_here(self, x_H: Tensor) -> Tensor:
        """Of what has an entry for each head, the entries of the heads that `to_heads` leaves here."""
        return x_H


class WholeHeads:
    """The heads of one process: it has all of them.

    `parallel/` hands in an object with the same methods where heads are spread over as many processes.
    """

    def gather(self, x_BNh: Tensor) -> Tensor:
        """What all heads of a layer have, `[B, N, H]`, from what those that are here have."""
        return x_BNh

    def stream_piece(self, x_BN: Tensor) -> Tensor:
        """Of what layers have for all tokens, the part of the tokens that the residual stream has here."""
        return x_BN


@dataclass
class Context:
    """Carried through the stack beside the residual stream. Integers are int64, `[B, N]`.

    Attributes:
        positions: place of each token in its document.
        documents: document ids, non-decreasing along N; None when tokens may see across documents.
        causal: whether a token sees only itself and earlier ones.
        modalities: modality ids; None where the model does not tell them apart.
        groups: the tokens of a layer, by modality; stream_groups: those of the residual stream.
        tower: of which modality all tokens are, inside of what only they run through.
        cut: what crosses a sequence cut.
        heads: where the heads of a layer are.
        experts: where the experts of a layer are.
        key_documents: `[B, M]`, document ids of whole rows: cached tokens included, and the pieces of other processes.
        first_index: index among those M of the first of the N queries.
        previous_documents: `[B]`, document id of the last cached token; None when nothing is cached.
        head_gates: layer index -> `[H]` or `[B, N, H]`, a factor for each head's contribution; 1 where absent.
        observer: is shown the residual stream, attention weights and routing of every layer.
        shared: tensors computed once per forward pass and read by several layers.
    """

    positions: Tensor
    documents: Tensor | None = None
    causal: bool = True
    modalities: Tensor | None = None
    groups: Groups | None = None
    stream_groups: Groups | None = None
    tower: int | None = None
    cut: WholeSequence = field(default_factory=WholeSequence)
    heads: WholeHeads = field(default_factory=WholeHeads)
    experts: WholeExperts = field(default_factory=WholeExperts)
    key_documents: Tensor | None = None
    first_index: int = 0
    previous_documents: Tensor | None = None
    head_gates: dict[int, Tensor] = field(default_factory=dict)
    observer: Observer | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def share(self, key: Hashable, compute: Callable[[], Any]) -> None:
        """Compute something once for all layers that ask for the same key.

        The stack calls each layer's `prepare` before the first block, so inside a block (which may be compiled or
        recomputed) `shared` is only read.
        """
        if key not in self.shared:
            self.shared[key] = compute()
