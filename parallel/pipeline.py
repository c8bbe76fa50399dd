"""Pipeline parallelism: where the model is cut into stages, what a stage is, and the order in which they run.

The schedules are torch's (`torch.distributed.pipelining`). Evaluation has a forward-only order of its own: torch's
zero-bubble schedule cannot evaluate, and a stage that changes between training and evaluation is set up anew each time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from model.batch import Batch
from model.config import Architecture
from model.objective import IGNORED, Objective, sums
from model.stack import Model
from parallel.mesh import Layout, stages_of_rank

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
}


class Stage(Model):
    """The blocks of one stage, with the embedding in the first and the final norm and head in the last.

    Names are those of the whole model. Where embedding and head are one matrix, the last stage holds a copy under the
    name `head.weight`, which the optimizer does not know: its gradient is added to the embedding's, and its values
    follow it.
    """

    def __init__(self, architecture: Architecture, index: int, layers: list[range]):
        super().__init__(architecture)
        self.index = index
        self.is_first, self.is_last = index == 0, index == len(layers) - 1
        self.layers = nn.ModuleDict({str(layer): self.layers[str(layer)] for layer in layers[index]})
        self.holds_copy = self.is_last and architecture.model.tie_embeddings
        if self.holds_copy:
            self.head = nn.Linear(architecture.model.d_model, architecture.model.vocab_size, bias=False)
        if not self.is_first:
            self.embedding = self.positions = None
        if not self.is_last:
            self.final_norm = self.head = None

    def forward(  # type: ignore[override]
        self, x: Tensor, *, positions: Tensor, documents: Tensor | None = None, modalities: Tensor | None = None
    ) -> Tensor:
        """Tokens `[B, N]` or the residual stream -> the residual stream, or logits."""
        ctx = self.context(positions, documents, positions, modalities=modalities)
        if self.is_first:
            x = self.embed(x, ctx)
        for block in self.layers.values():
            x = block(x, ctx)
        return self.logits(x) if self.is_last else x


def cut_by_cost(costs: list[float], count: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Layers of each of `count` stages, so that the costliest stage costs as little as can be.

    Args:
        costs: of the layers, in any unit. first, last: what the first stage has beside its layers (the embedding), and
            the last one (the head).
    """
    assert len(costs) >= count
    costs = [*costs]
    costs[0] += first
    costs[-1] += last
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    # best[stages][layers]: (cost of the costliest stage, sum of squares to break ties evenly, where the last begins)
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stages in range(1, count + 1):
        row = {}
        for end in range(stages, len(costs) - (count - stages) + 1):
            options = []
            for begin in best[-1]:
                if begin < end:
                    cost = total[end] - total[begin]
                    peak, squares, _ = best[-1][begin]
                    options.append((max(peak, cost), squares + cost**2, begin))
            row[end] = min(options)
        best.append(row)
    ends = [len(costs)]
    for stages in range(count, 0, -1):
        ends.append(best[stages][ends[-1]][2])
    ends.reverse()
    return [range(begin, end) for begin, end in pairwise(ends)]


def layers_of_stages(uncut: Model, layout: Layout, seq_len: int) -> list[range]:
    """Which layers each stage of the pipeline has; costs are forward operations a token."""
    blocks = [block.mixer.flops(seq_len) + block.feedforward.flops(seq_len) for block in uncut.layers.values()]
    m = uncut.architecture.model
    # The embedding is looked up, not multiplied: it costs one operation a channel.
    return cut_by_cost(blocks, layout.num_stages, first=m.d_model, last=2 * m.d_model * m.vocab_size)


class Pipeline:
    """Runs this rank's stages over micro-batches.

    Args:
        residual: gives the shape `[B, n, D]` and dtype of what passes between stages, from B and N.
        group: the ranks that hold the other stages.
        modalities: how many are told apart; 0: none.
    """

    def __init__(
        self,
        stages: list[Stage],
        layout: Layout,
        device: torch.device,
        group: dist.ProcessGroup,
        residual: Callable[[int, int], Tensor],
        modalities: int = 0,
    ):
        self.stages, self.layout, self.device, self.group, self.residual = stages, layout, device, group, residual
        self.modalities = modalities
        self._schedule: Any = None
        self._shape: Any = None
        self._objective: Objective | None = None
        self._scale = 1.0
        self._nats = torch.zeros(1 + modalities)

    def train(self, batch: Batch, objective: Objective, scale: float) -> Tensor:
        """Forward and backward of `scale` times the nats of all micro-batches; the nats `[1 + M]`, of all and of each
        modality's, on the last stage's rank, 0 elsewhere. Collective."""
        self._objective, self._scale = objective, scale
        self._nats = torch.zeros(1 + self.modalities, dtype=torch.float64, device=self.device)
        if self._shape != batch.tokens.shape:
            self._schedule, self._shape = self._new_schedule(*batch.tokens.shape), batch.tokens.shape
        inputs = {"positions": batch.positions.contiguous()}
        if batch.documents is not None:
            inputs["documents"] = batch.documents
        if batch.modalities is not None:
            inputs["modalities"] = batch.modalities.contiguous()
        tokens = [batch.tokens] if any(stage.is_first for stage in self.stages) else []
        if any(stage.is_last for stage in self.stages):
            targets = torch.where(batch.counted, batch.targets, IGNORED)
            if batch.target_modalities is not None:
                # Schedules hand on one tensor.
                targets = torch.stack((targets, batch.target_modalities), dim=1)
            self._schedule.step(*tokens, target=targets, return_outputs=False, **inputs)
        else:
            self._schedule.step(*tokens, return_outputs=False, **inputs)
        return self._nats

    def _new_schedule(self, batch_size: int, n: int) -> Any:
        rows = batch_size // self.layout.microbatches
        tokens = torch.empty(rows, n, dtype=torch.int64, device="meta")
        stream = self.residual(rows, n).to("meta").requires_grad_()
        stages = [
            PipelineStage(
                stage,
                stage.index,
                self.layout.num_stages,
                self.device,
                # Without these, torch finds shapes out by a hidden step on memory that nobody has written to.
                input_args=tokens if stage.is_first else stream,
                output_args=self._logits(rows, n) if stage.is_last else stream,
                group=self.group,
            )
            for stage in self.stages
        ]
        several = self.layout.num_stages > self.layout.pp
        return SCHEDULES[self.layout.pp_schedule](
            stages if several else stages[0],
            n_microbatches=self.layout.microbatches,
            loss_fn=self._loss,
            # We divide by the tokens of the global batch; torch would divide by the number of micro-batches.
            scale_grads=False,
        )

    def _logits(self, rows: int, n: int) -> Tensor:
        head = self.stages[-1].head
        assert head is not None
        return torch.empty(rows, n, head.out_features, dtype=self.residual(1, n).dtype, device="meta").requires_grad_()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        assert self._objective is not None
        targets, modalities = targets.unbind(1) if self.modalities else (targets, None)
        nats_BN = self._objective.nats(logits, targets, targets != IGNORED)
        self._nats += sums(nats_BN, modalities, self.modalities)
        return nats_BN.sum() * self._scale

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> Tensor:
        """The nats of all micro-batches on the last stage's rank, as in training, 0 elsewhere. Collective."""
        parts = list(batch.micro_batches(self.layout.microbatches))
        nats = torch.zeros(1 + self.modalities, dtype=torch.float64, device=self.device)
        for logits, part in zip(self.forward(parts), parts, strict=False):
            nats_BN = objective.nats(logits, part.targets, part.counted)
            nats += sums(nats_BN, part.target_modalities, self.modalities)
        return nats

    @torch.no_grad()
    def forward(self, parts: list[Batch]) -> list[Tensor]:
        """The logits of each micro-batch on the last stage's rank, nothing elsewhere. Collective."""
        passed: list[Tensor] = []
        logits: list[Tensor] = []
        for stage in self.stages:
            inputs = [part.tokens for part in parts] if stage.is_first else None
            passed = self._forward_stage(stage, parts, inputs, passed)
            if stage.is_last:
                logits = passed
        return logits

    def _forward_stage(
        self, stage: Stage, parts: list[Batch], inputs: list[Tensor] | None, passed: list[Tensor]
    ) -> list[Tensor]:
        """All micro-batches through one stage: from the rank before, to the rank after, or from and to our own next."""
        holders = stage_holders(self.layout)
        me = dist.get_rank(self.group)
        outputs, sent = [], []
        for index, part in enumerate(parts):
            if inputs is not None:
                x = inputs[index]
            elif holders[stage.index - 1] == me:
                x = passed[index]
            else:
                x = self.residual(*part.tokens.shape)
                dist.recv(x, group=self.group, group_src=holders[stage.index - 1])
            out = stage(x, positions=part.positions, documents=part.documents, modalities=part.modalities)
            if stage.is_last or holders[stage.index + 1] == me:
                outputs.append(out)
            else:
                out = out.contiguous()
                sent.append((dist.isend(out, group=self.group, group_dst=holders[stage.index + 1]), out))
        for work, _ in sent:
            work.wait()
        return outputs


def stage_holders(layout: Layout) -> list[int]:
    """Rank in the pipeline of the holder of each stage."""
    holders = {stage: rank for rank in range(layout.pp) for stage in stages_of_rank(layout, rank)}
    return [holders[stage] for stage in range(layout.num_stages)]
