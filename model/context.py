"""What a layer is told beside its input: positions, documents, the causal flag, and what crosses a sequence cut."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class WholeSequence:
    """The sequence cut of one process: there is none, so nothing is exchanged.

    `parallel/` hands in an object with the same methods when the sequence is spread over ranks; a mixer never sees
    a process group.
    """

    def states(self, state_BHde: Tensor, log_decay_H: Tensor) -> Tensor | None:
        """The state that enters this piece of the sequence; None where the piece is the whole."""
        return None

    def keys_values(self, k_BNHd: Tensor, v_BNHd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, from those of this piece."""
        return k_BNHd, v_BNHd

    def to_heads(self, x_BNHd: Tensor) -> Tensor:
        """Exchange: a piece of the sequence with all heads -> the whole sequence with a part of the heads."""
        return x_BNHd

    def from_heads(self, x_BNHd: Tensor) -> Tensor:
        """The exchange undone."""
        return x_BNHd


@dataclass
class Context:
    """Carried through the stack beside the residual stream. Integers are int64, `[B, N]`.

    Attributes:
        positions: place of each token in its document.
        documents: document ids, non-decreasing along N; None when tokens may see across documents.
        causal: whether a token sees only itself and earlier ones.
        modalities: modality ids, for layers that are untied by modality.
        cut: what crosses a sequence cut.
        key_documents: `[B, M]`, document ids of all keys, the cached ones included.
        first_index: index among the M keys of the first of the N queries.
        previous_documents: `[B]`, document id of the last cached token; None when nothing is cached.
        head_gates: layer index -> `[H]` or `[B, N, H]`, a factor for each head's contribution; 1 where absent.
        shared: tensors computed once per forward pass and read by several layers.
    """

    positions: Tensor
    documents: Tensor | None = None
    causal: bool = True
    modalities: Tensor | None = None
    cut: WholeSequence = field(default_factory=WholeSequence)
    key_documents: Tensor | None = None
    first_index: int = 0
    previous_documents: Tensor | None = None
    head_gates: dict[int, Tensor] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def share(self, key: Hashable, compute: Callable[[], Any]) -> None:
        """Compute something once for all layers that ask for the same key.

        The stack calls each layer's `prepare` before the first block, so inside a block (which may be compiled or
        recomputed) `shared` is only read.
        """
        if key not in self.shared:
            self.shared[key] = compute()
