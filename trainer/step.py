"""One optimizer step: the same numbers however the batch is spread over ranks and micro-batches."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch

from model.batch import Batch
from model.objective import Objective
from parallel.data import sum_over_ranks
from parallel.spread import Spread
from trainer.modalities import counted_of_each, losses_of_each, tokens_of_each
from trainer.optimizer import set_learning_rate
from trainer.signals import StopRequest


@dataclass(frozen=True)
class Outcome:
    """What one step came to. `loss` in nats per counted token; `stop`: some rank was asked to stop.

    `auxiliary`: name -> what else was minimised, with its weight; `total_loss`: all of it. `by_modality`: name -> what
    is known of each modality, where the model tells them apart.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool
    auxiliary: dict[str, float] = field(default_factory=dict)
    by_modality: dict[str, float | None] = field(default_factory=dict)

    @property
    def total_loss(self) -> float:
        return self.loss + sum(self.auxiliary.values())


class Updater:
    """Forward, backward, clip, update.

    Args:
        seed: of whatever a user's own layer draws from torch's generators: they are seeded anew in every step from
            (seed, step, share of the batch), so there is no generator state to resume.
    """

    def __init__(
        self,
        model: Spread,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        *,
        grad_clip: float,
        seed: int,
        stop: StopRequest,
    ):
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.grad_clip, self.seed, self.stop = grad_clip, seed, stop

    def update(self, batch: Batch, step: int, lr: float) -> Outcome:
        """Train on this rank's share of the global batch. Collective."""
        mesh, untie = self.model.mesh, self.model.architecture.untie
        seed_generators(self.seed, step, mesh.data_rank)
        batch = self.model.labelled(batch)
        here = [float(batch.counted.sum()), *counted_of_each(batch, untie)]
        counted, *of_each = sum_over_ranks([count if mesh.is_first_of_share else 0.0 for count in here])
        # The mean over the counted tokens of the global batch: one normaliser, whoever has how many of them.
        nats = self.model.train(batch, self.objective, 1.0 / max(counted, 1.0))
        total_nats, stops, *nats_of_each = sum_over_ranks([nats, float(self.stop.requested), *self.model.modality_nats])
        loss = total_nats / max(counted, 1.0)
        self.model.reparam.complete_gradients()
        norm = self.model.gradient_norm()
        # These numbers are the same on all ranks, so all of them skip or none does.
        skipped = not all(map(math.isfinite, (loss, norm, *self.model.auxiliary.values())))
        if not skipped:
            self.model.clip_gradients(norm, self.grad_clip)
            set_learning_rate(self.optimizer, lr)
            with self.model.reparam.raw_weights(), self.model.kept_rows.kept():
                self.optimizer.step()
            self.model.finish_update()
        self.optimizer.zero_grad(set_to_none=True)
        by_modality = losses_of_each(untie, nats_of_each, of_each) | tokens_of_each(untie, of_each)
        return Outcome(loss, norm, skipped, stops > 0, self.model.auxiliary, by_modality)


def seed_generators(seed: int, step: int, share: int) -> None:
    """Seed torch's generators as a function of (seed, step, share of the batch)."""
    digest = hashlib.blake2b(f"{seed}/step {step}/rank {share}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
