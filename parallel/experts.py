"""Expert parallelism: the experts of each layer are spread over `ep` of the processes that have different tokens.

Each of these has num_experts / ep of them, whole (or its tensor-parallel share of each), and sends every other one the
tokens that have chosen an expert there: as many as there are, so none is dropped. What stands beside the experts, the
router among it, is on all of them as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.grouped import group_sizes, inverse_of, permuted
from model.dispatch import Dispatch, WholeExperts
from model.feedforward.experts import Experts
from model.stack import Model
from parallel.collectives import ExchangeRows, exchange


def keep_share(model: Model, rank: int, size: int) -> None:
    """Leave a model those experts that rank `rank` of `size` has, under the numbers that they have in the whole."""
    for module in model.modules():
        if isinstance(module, Experts):
            each = len(module) // size
            for number in list(module):
                if int(number) // each != rank:
                    del module[number]


def expert_names(model: Model) -> set[str]:
    """Names of the parameters that expert parallelism spreads."""
    found = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            found |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    return found


class SpreadExperts(WholeExperts):
    """The experts of a layer, of which every rank of a group has an equal share, in order."""

    def __init__(self, group: str, size: int):
        self.group, self.size = group, size

    def dispatch(self, counts_E: Tensor, rows: int) -> Dispatch:
        # Of each rank, how many rows go to each expert there; and to each expert here, how many come from each.
        going_RE = counts_E.unflatten(0, (self.size, -1))
        coming_RE = exchange(going_RE, self.group, self.size)
        # One look at values for both: until then a GPU goes on without waiting.
        numbers = group_sizes(torch.stack((going_RE, coming_RE)).flatten(), 2 * rows)
        going, coming = numbers[: len(counts_E)], numbers[len(counts_E) :]
        return _SpreadDispatch(self, going, coming, counts_E.device)


class _SpreadDispatch(Dispatch):
    """Rows that go by rank, and by expert among those of a rank, and come so."""

    def __init__(self, experts: SpreadExperts, going: list[int], coming: list[int], device: torch.device):
        each = len(coming) // experts.size
        super().__init__([sum(coming[expert::each]) for expert in range(each)])
        self._group = experts.group
        self._sent = [sum(going[first : first + each]) for first in range(0, len(going), each)]
        self._received = [sum(coming[first : first + each]) for first in range(0, len(coming), each)]
        # From the order in which they come, by rank, to that of the experts here.
        numbers = torch.arange(each).repeat(experts.size)
        of_expert = numbers.repeat_interleave(torch.tensor(coming), output_size=sum(coming))
        self._order = of_expert.argsort(stable=True).to(device)
        self._inverse = inverse_of(self._order)

    def send(self, rows_RD: Tensor) -> Tensor:
        received = ExchangeRows.apply(rows_RD, self._sent, self._received, self._group)
        return permuted(received, self._order, self._inverse)

    def bring_back(self, rows_RD: Tensor) -> Tensor:
        return ExchangeRows.apply(
            permuted(rows_RD, self._inverse, self._order), self._received, self._sent, self._group
        )
