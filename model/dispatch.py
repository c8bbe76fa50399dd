"""How tokens get to the experts that they have chosen, and back."""

from __future__ import annotations

from torch import Tensor

from kernels.grouped import group_sizes


class Dispatch:
    """Rows on their way to their experts and back, on one process: they are where they have to be.

    Attributes:
        sizes: how many rows come to each expert that is here.
    """

    def __init__(self, sizes: list[int]):
        self.sizes = sizes

    def send(self, rows_RD: Tensor) -> Tensor:
        """Rows of the tokens here, sorted by expert -> rows of all tokens for the experts here, sorted by them."""
        return rows_RD

    def bring_back(self, rows_RD: Tensor) -> Tensor:
        """What experts made of them -> that of the tokens here, as they were sorted."""
        return rows_RD


class WholeExperts:
    """The experts of one process: it has all of them.

    `parallel/` hands in an object with the same method where they are spread over as many processes.
    """

    def dispatch(self, counts_E: Tensor, rows: int) -> Dispatch:
        """For `rows` rows, of which `counts_E` (int64) go to each expert."""
        return Dispatch(group_sizes(counts_E, rows))
