"""One optimizer step: the same numbers however the batch is spread over ranks and micro-batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.objective import Objective
from model.stack import Model
from parallel.data import gradient_divisor, sum_over_ranks, synchronise_gradients
from parallel.gradients import clip_gradients, gradient_norm
from parallel.mesh import Layout
from trainer.data.batch import Batch
from trainer.optimizer import set_learning_rate
from trainer.signals import StopRequest


@dataclass(frozen=True)
class Outcome:
    """What one step came to. `loss` in nats per counted token; `stop`: some rank was asked to stop."""

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool


class Updater:
    """Forward, backward, clip, update.

    Args:
        seed: of whatever a user's own layer draws from torch's generators: they are seeded anew in every step from
            (seed, step, rank), so there is no generator state to resume.
    """

    def __init__(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        layout: Layout,
        *,
        device: torch.device,
        grad_clip: float,
        seed: int,
        rank: int,
        stop: StopRequest,
    ):
        self.model, self.optimizer, self.objective, self.layout = model, optimizer, objective, layout
        self.device, self.grad_clip, self.seed, self.rank, self.stop = device, grad_clip, seed, rank, stop
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def update(self, batch: Batch, step: int, lr: float) -> Outcome:
        """Train on this rank's share of the global batch. Collective."""
        seed_generators(self.seed, step, self.rank)
        (counted,) = sum_over_ranks([batch.counted.sum().item()])
        nats = self._accumulate_gradients(batch, counted)
        total_nats, stops = sum_over_ranks([nats, float(self.stop.requested)])
        loss = total_nats / max(counted, 1.0)
        grad_norm = gradient_norm(self.trained).item()
        # Both numbers are the same on all ranks, so all of them skip or none does.
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            clip_gradients(self.trained, grad_norm, self.grad_clip)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(loss, grad_norm, skipped, stop=stops > 0)

    def _accumulate_gradients(self, batch: Batch, counted: float) -> float:
        """Gradients of the mean over the `counted` tokens of the global batch; returns this rank's sum of nats."""
        scale = gradient_divisor(self.model, self.layout.data_parallel) / max(counted, 1.0)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, part in enumerate(micro_batches(batch, self.layout.microbatches, self.device)):
            synchronise_gradients(self.model, index == self.layout.microbatches - 1)
            nats = loss_sum(self.model, self.objective, part)
            (nats * scale).backward()
            total += nats.detach()
        return total.item()


def loss_sum(model: Model, objective: Objective, batch: Batch) -> Tensor:
    """Nats summed over the counted tokens of one micro-batch."""
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    return objective.loss_sum(logits, batch.targets, batch.counted)


def micro_batches(batch: Batch, count: int, device: torch.device) -> Iterator[Batch]:
    """Cut a batch into `count` equal parts along B, moved to the device."""
    size = batch.tokens.shape[0] // count
    for first in range(0, count * size, size):
        parts = {
            name: None if tensor is None else tensor[first : first + size].to(device, non_blocking=True)
            for name, tensor in vars(batch).items()
        }
        yield replace(batch, **parts)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators as a function of (seed, step, rank)."""
    digest = hashlib.blake2b(f"{seed}/step {step}/rank {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
