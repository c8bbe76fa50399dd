"""A model spread over the processes of a run: what this process holds of it, and how all of them run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from model.batch import Batch
from model.config import Architecture
from model.entropy import EntropyPenalty
from model.objective import CrossEntropy, Objective, batch_nats, cross_entropy, sums
from model.observer import Observer
from model.reparam import ReparamConfig
from model.stack import Model
from parallel.auxiliary import AuxiliaryLoss, StepFacts, Watcher, watching
from parallel.balance import ChoiceCounter, SelectionBias, SpreadBalance, router_losses
from parallel.collectives import sum_lists
from parallel.context import SequenceCut
from parallel.data import held, initialise, local, release_gathered, shard, synchronise_gradients
from parallel.entropy import SpreadEntropyPenalty, threshold_name
from parallel.experts import SpreadExperts, expert_names, keep_share
from parallel.gradients import clip_gradients, counts_here, gradient_norm
from parallel.mesh import Mesh, stages_of_rank
from parallel.pipeline import Pipeline, Stage, layers_of_stages, stage_holders
from parallel.recompute import Recompute, compile_blocks, observed, recompute_blocks
from parallel.region import Region
from parallel.reparam import PlainWeights, SigmaReparam
from parallel.rows import KeptRows
from parallel.tensor import Cuts, cut
from parallel.vocabulary import VocabularyCrossEntropy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def spread(
    architecture: Architecture,
    mesh: Mesh,
    device: torch.device,
    *,
    precision: str,
    seq_len: int,
    recompute: Recompute = "none",
    compiled: bool = False,
    reparam: ReparamConfig | None = None,
) -> Spread:
    """Build this process's part of a model, on the meta device: stage, tensor-parallel share, FSDP shards.

    Args:
        precision: of matrix products: bf16, fp32 or fp64.
        seq_len: for which the stages of a pipeline are balanced.
        reparam: which matrices are reparametrised; `reparam.begin()` once they have values. Default: none.
    """
    layout = mesh.layout
    with torch.device("meta"):
        uncut = Model(architecture)
        if layout.pp > 1:
            layers = layers_of_stages(uncut, layout, seq_len)
            mine = stages_of_rank(layout, mesh.rank("pp"))
            stages: list[Model] = [Stage(architecture, index, layers) for index in mine]
        else:
            stages = [Model(architecture)]
    region = None
    if layout.tp > 1:
        group = mesh.group("tp").group_name
        region = Region(group, mesh.rank("tp"), layout.tp, cuts_sequence=layout.sequence_parallel)
    cuts = []
    for stage in stages:
        if precision == "fp64":
            stage.double()
        if mesh.experts is not None:
            keep_share(stage, mesh.expert_rank, layout.ep)
            stage.experts = SpreadExperts(mesh.experts.group_name, layout.ep)
        cuts.append(Cuts.none(stage) if region is None else cut(stage, region))
        if layout.cp > 1:
            stage.cut = SequenceCut(mesh.group("cp").group_name, mesh.rank("cp"), layout.cp)
        recompute_blocks(stage, recompute)
        if compiled:
            compile_blocks(stage)
        shard(stage, mesh.data, mesh.expert_data, bf16=precision == "bf16", keep_gathered=layout.pp > 1)
    return Spread(uncut, mesh, device, stages, cuts, region, DTYPES[precision], reparam or ReparamConfig())


class Spread:
    """What one process holds of a model, under the names of the whole, and how it is run.

    Attributes:
        stages: the modules here: stages of a pipeline, or the one model.
        parameters: name -> parameter, as the optimizer sees it; each parameter of the whole model is here, or on
            another process, under the same name.
        beside: name -> small parameters that are trained with the model and are no part of it (the gains of
            reparametrised matrices, thresholds of an objective): plain tensors, whole and alike on every process, as
            their gradients have to be. Those names are of the whole model.
        kept: name -> state that is no gradient's (vectors of a power iteration), whole and alike on every process.
        reparam: what parameters stand for, where that is not what is multiplied.
        auxiliary: name -> what the last `train` came to beside the nats: means over the whole global batch.
        modality_nats: of what `train` or `evaluate` returned last, that of the targets of each modality; empty where
            the model does not tell them apart.
        kept_rows: of embedding and head, those that training leaves as they are.
        uncut: the whole model, on the meta device: for what is asked of all layers, and of all names.
    """

    def __init__(
        self,
        uncut: Model,
        mesh: Mesh,
        device: torch.device,
        stages: list[Model],
        cuts: list[Cuts],
        region: Region | None,
        dtype: torch.dtype,
        reparam: ReparamConfig,
    ):
        self.uncut, self.architecture = uncut, uncut.architecture
        self.mesh, self.layout, self.device = mesh, mesh.layout, device
        self.stages, self.dtype, self._region = stages, dtype, region
        self.cuts = Cuts({}, {})
        for part in cuts:
            self.cuts.shapes |= part.shapes
            self.cuts.dimensions |= part.dimensions
            self.cuts.summed |= part.summed
        self.frozen: set[str] = set()
        self.beside: dict[str, nn.Parameter] = {}
        self.kept: dict[str, Tensor] = {}
        self.reparam = SigmaReparam(self, reparam) if reparam.kind == "sigma" else PlainWeights()
        self.auxiliary: dict[str, float] = {}
        self.modality_nats: list[float] = []
        self.modalities = 0 if self.architecture.untie is None else self.architecture.untie.modalities
        self._losses: list[AuxiliaryLoss] = [*router_losses(uncut, mesh, device)]
        self._selection = SelectionBias(uncut, mesh)
        self._of_experts = expert_names(uncut)
        self._untrained = {name for name, parameter in uncut.named_parameters() if not parameter.requires_grad}
        self.kept_rows = KeptRows({}, self.whole, [])
        self._counted: set[str] | None = None
        self.pipeline = None
        if self.layout.pp > 1:
            held = cast("list[Stage]", stages)
            self.pipeline = Pipeline(held, self.layout, device, mesh.group("pp"), self._residual, self.modalities)
        self.parameters = self._named_parameters()

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for stage in self.stages:
            own = dict(stage.named_parameters())
            if getattr(stage, "holds_copy", False):
                del own["head.weight"]
            found |= own
        return found

    @property
    def gradient_divisor(self) -> int:
        """By how much the engine divides summed gradients (FSDP2 averages; gloo cannot be told otherwise)."""
        return self.mesh.data.size() if isinstance(self.stages[0], FSDPModule) else 1

    @property
    def cross_entropy(self) -> CrossEntropy:
        """The loss for the logits that come out of this model."""
        if self._region is None:
            return cross_entropy
        return VocabularyCrossEntropy(self._region, self.architecture.model.vocab_size)

    @property
    def has_whole_head(self) -> bool:
        """Whether the model can be asked for losses in place of logits: it ends here, and the vocabulary is not cut."""
        return self.pipeline is None and self._region is None

    def holders(self, name: str) -> DeviceMesh:
        """Those that have a parameter between them: `[dp_replicate, tp, shards]`."""
        return self.mesh.expert_tensors if name in self._of_experts else self.mesh.tensors

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor like the parameter `name` (itself, its gradient, a moment) as a part of the whole model's.

        It shares memory with what is given. Alone, that is the tensor itself; of `beside` and `kept` it always is.
        """
        if name in self.beside or name in self.kept:
            return tensor
        if self.mesh.whole.size() == 1 and not isinstance(tensor, DTensor):
            return tensor
        placements: list[Placement] = [Replicate(), Replicate(), Replicate()]
        if (dimension := self.cuts.dimensions[name]) is not None:
            placements[1] = Shard(dimension)
        if isinstance(tensor, DTensor):
            placements[2] = Shard(0)
        shape = self.cuts.shapes[name]
        return DTensor.from_local(
            local(tensor.detach()),
            self.holders(name),
            placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def whole_parameters(self) -> dict[str, Tensor]:
        """Name -> parameter as a part of the whole model's."""
        return {name: self.whole(name, parameter) for name, parameter in self.parameters.items()}

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """All that an optimizer may know here: the parameters, and those beside the model."""
        return self.parameters | self.beside

    @property
    def apart(self) -> set[str]:
        """Those that are plain tensors, whole and alike on every process, where others are cut."""
        return set(self.beside)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """After `train`: all gradients here, and those of them that count here in the global norm."""
        if self._counted is None:
            self._counted = {name for name, p in self.learned.items() if counts_here(self.whole(name, p))}
        found = {name: p.grad for name, p in self.learned.items() if p.requires_grad and p.grad is not None}
        return list(found.values()), [gradient for name, gradient in found.items() if name in self._counted]

    def gradient_norm(self) -> float:
        """After `train`: the Euclidean norm of all gradients of the model, and of what stands beside it. Collective."""
        return gradient_norm(self._gradients()[1], self.device).item()

    def clip_gradients(self, norm: float, limit: float) -> None:
        """Scale all gradients, whose norm is given, so that it is at most `limit`; 0 means no limit."""
        clip_gradients(self._gradients()[0], norm, limit)

    def initialise(self, seed: int) -> None:
        """Memory and initial values for what was built on the meta device. Collective."""
        for stage in self.stages:
            initialise(stage, seed, self.device, self.whole)
        # What was on the meta device has been exchanged. (And while FSDP has parameters gathered, modules name others.)
        self.parameters = self._named_parameters()
        self.reparam.allocate()
        self.update_copies()

    def allocate(self) -> None:
        """Memory for what was built on the meta device, without values: for planning."""
        for stage in self.stages:
            stage.to_empty(device=self.device)
            # What is computed from the configuration alone (decay slopes) has values all the same: how many states
            # cross a cut of the sequence depends on them.
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                for block in stage.layers.values():
                    block.mixer.remake_buffers()
        self.parameters = self._named_parameters()
        self.reparam.allocate()

    def freeze(self, names: set[str]) -> None:
        """Train all parameters but these, of the whole model's."""
        self.frozen = names
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in names | self._untrained)
        for name, parameter in self.beside.items():
            parameter.requires_grad_(name not in names)
        self.reparam.freeze(names)
        if (copied := self._copy()) is not None:
            copied.requires_grad_("embedding.weight" not in names)

    def keep_rows(self, ids: Sequence[tuple[int, int]]) -> None:
        """Train embedding and head, but leave the rows of these ids, first and one beyond the last, as they are."""
        self.kept_rows = KeptRows(self.parameters, self.whole, ids)

    def penalise_entropy(self, penalty: EntropyPenalty) -> list[str]:
        """From now on training is on this penalty, too; the names of its thresholds, which are trained beside."""
        wide = torch.promote_types(self.dtype, torch.float32)
        entropy = SpreadEntropyPenalty(penalty, self.uncut, self.mesh, self._region, self.device, wide)
        self._losses.append(entropy)
        thresholds = {threshold_name(layer): theta for layer, theta in entropy.thresholds.items()}
        self.beside |= thresholds
        return list(thresholds)

    def train(self, batch: Batch, objective: Objective, scale: float) -> float:
        """Gradients of `scale` times the nats of this process's share of the batch, of whole rows, and of the auxiliary
        losses, which are means over the global batch. Collective.

        Returns:
            The nats of its piece of these rows, on one of the processes that have the piece; 0 on the others.
        """
        facts = StepFacts(len(batch.tokens) * self.layout.data_parallel, self.gradient_divisor)
        batch, scale = self._piece(batch), scale * self.gradient_divisor
        self._count_choices(batch)
        watchers: list[Watcher] = [*self._losses, *([self._selection] if self._selection.layers else [])]
        for watcher in watchers:
            watcher.begin(facts)
        with watching(self.stages, watchers):
            nats = self._train(batch, objective, scale)
        self._finish_gradients()
        self.auxiliary = {loss.name: loss.finish() for loss in self._losses}
        if self._selection.layers:
            self._selection.finish()
        return self._told(nats)

    def _told(self, nats: Tensor) -> float:
        """Of sums that several processes have alike, what this one tells the others."""
        first, *self.modality_nats = nats.tolist() if self._speaks else [0.0] * len(nats)
        return first

    def _train(self, batch: Batch, objective: Objective, scale: float) -> Tensor:
        """Forward and backward of all micro-batches; their nats `[1 + M]`, of all and of each modality's."""
        if self.pipeline is not None:
            return self.pipeline.train(batch, objective, scale)
        nats = torch.zeros(1 + self.modalities, dtype=torch.float64, device=self.device)
        for index, part in enumerate(batch.micro_batches(self.layout.microbatches)):
            self._reduce_after(index == self.layout.microbatches - 1)
            total, nats_BN = batch_nats(self.runs, objective, part)
            self._backward(total * scale)
            nats += sums(nats_BN, part.target_modalities, self.modalities)
        return nats

    @property
    def runs(self) -> nn.Module:
        """What is called, where there is no pipeline: the model."""
        return self.stages[0]

    def _reduce_after(self, last: bool) -> None:
        """Whether the coming backward is that of the last micro-batch, after which gradients are reduced."""
        synchronise_gradients(self.stages[0], last)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def _count_choices(self, batch: Batch) -> None:
        """How often routers choose each unit, where training on this batch has to know it. Collective."""
        balances = [loss for loss in self._losses if isinstance(loss, SpreadBalance) and loss.counts_first]
        if not balances:
            return
        counter = ChoiceCounter(self.mesh)
        self._show(list(batch.micro_batches(self.layout.microbatches)), counter)
        for balance in balances:
            balance.take_counts(counter)

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> float:
        """The nats of this process's piece of its share of the batch, on one of those that have it. Collective."""
        batch = self._piece(batch)
        if self.pipeline is not None:
            return self._told(self.pipeline.evaluate(batch, objective))
        nats = torch.zeros(1 + self.modalities, dtype=torch.float64, device=self.device)
        for part in batch.micro_batches(self.layout.microbatches):
            nats += sums(batch_nats(self.runs, objective, part)[1], part.target_modalities, self.modalities)
        return self._told(nats)

    @torch.no_grad()
    def observe(self, batch: Batch, observer: Observer) -> None:
        """Show an observer one forward pass as in evaluation, over whole rows in one micro-batch. Collective."""
        self._show([self._piece(batch)], observer)

    def _show(self, parts: list[Batch], observer: Observer) -> None:
        self.evaluating(True)
        try:
            with observed(self.stages, observer):
                if self.pipeline is not None:
                    self.pipeline.forward(parts)
                    return
                for part in parts:
                    self.stages[0](
                        part.tokens, documents=part.documents, positions=part.positions, modalities=part.modalities
                    )
        finally:
            self.evaluating(False)

    @property
    def stream_is_cut(self) -> bool:
        """Whether tensor-parallel ranks have pieces of the residual stream (sequence parallelism)."""
        return self._region is not None and self._region.cuts_sequence

    def stream_begin(self, n: int) -> int:
        """Where in rows of n tokens the residual stream here begins."""
        begin = self.mesh.rank("cp") * (n // self.layout.cp)
        return begin + self.mesh.rank("tp") * (n // self.layout.cp // self.layout.tp) * self.stream_is_cut

    def evaluating(self, yes: bool) -> None:
        """Between training and evaluation, and back."""
        for stage in self.stages:
            stage.train(not yes)
            if not yes:
                release_gathered(stage)

    def _piece(self, batch: Batch) -> Batch:
        """On the device, and cut along the sequence."""
        return self.labelled(batch).cut_by(self.stages[0].cut.piece).to(self.device)

    def labelled(self, batch: Batch) -> Batch:
        """A batch that knows of which modality its tokens are, where the model tells them apart by their ids."""
        untie = self.architecture.untie
        if untie is None or batch.modalities is not None:
            return batch
        modalities, of_targets = untie.of_tokens(batch.tokens), untie.of_tokens(batch.targets)
        return replace(batch, modalities=modalities, target_modalities=of_targets)

    @property
    def _speaks(self) -> bool:
        # All tensor-parallel ranks compute the same loss. (Pipeline stages before the last have none.)
        return self.mesh.rank("tp") == 0

    def _finish_gradients(self) -> None:
        """Add up what the backward passes of different ranks have of one parameter's gradient. Collective."""
        if self.layout.ep > 1:
            # Those of experts were divided by fewer ranks: what they have to say of other ranks' rows came with these.
            found = [self.parameters[name].grad for name in self._of_experts & self.parameters.keys()]
            if gradients := [local(gradient) for gradient in found if gradient is not None]:
                torch._foreach_div_(gradients, self.layout.ep)
        if self.cuts.summed:
            summands = [self.parameters[name].grad for name in sorted(self.cuts.summed & self.parameters.keys())]
            sum_lists([local(gradient) for gradient in summands if gradient is not None], self.mesh.group("tp"))
        self._from_copy()
        self.kept_rows.drop_gradients()

    # One matrix for the embedding and the head, in two stages: the first one's is the parameter, the last one's a copy.

    def _embedding(self) -> nn.Parameter | None:
        """The tied embedding, in the process that has the first stage of a pipeline."""
        if self.pipeline is None or not self.architecture.model.tie_embeddings:
            return None
        return self.parameters.get("embedding.weight")

    def _copy(self) -> nn.Parameter | None:
        """Its copy, in the process that has the last stage."""
        heads = [stage.head for stage in self.stages if getattr(stage, "holds_copy", False)]
        return heads[0].weight if heads and heads[0] is not None else None

    def _from_copy(self) -> None:
        """Add the gradient of the head to that of the embedding that it is a copy of."""
        original, copied = self._embedding(), self._copy()
        if "embedding.weight" not in self.frozen:
            received = None if original is None else torch.empty_like(local(original))
            self._between(None if copied is None else local(copied.grad), received, last_to_first=True)
            if original is not None:
                local(original.grad).add_(received)
        if copied is not None:
            copied.grad = None

    @torch.no_grad()
    def finish_update(self) -> None:
        """An optimizer has changed the parameters: what follows them, or moves once in each update. Collective."""
        self._move_selection()
        self.update_copies()

    @torch.no_grad()
    def _move_selection(self) -> None:
        for name, move in self._selection.moves.items():
            if name in self.parameters and name not in self.frozen:
                here, rows, _ = held(self.whole(name, self.parameters[name]))
                here += move[rows.start : rows.stop].to(here)

    @torch.no_grad()
    def update_copies(self) -> None:
        """After the parameters have changed: the head that is a copy of the embedding follows it. Collective."""
        original, copied = self._embedding(), self._copy()
        self._between(
            None if original is None else local(original),
            None if copied is None else local(copied),
            last_to_first=False,
        )

    def _between(self, sent: Tensor | None, received: Tensor | None, *, last_to_first: bool) -> None:
        """Hand a tensor from the process with the last stage to the one with the first, or back."""
        if sent is None and received is None:
            return
        if sent is not None and received is not None:
            received.copy_(sent)
            return
        holders = stage_holders(self.layout)
        group = self.mesh.group("pp")
        if sent is not None:
            dist.send(sent.contiguous(), group=group, group_dst=holders[0 if last_to_first else -1])
        elif received is not None:
            dist.recv(received, group=group, group_src=holders[-1 if last_to_first else 0])

    def _residual(self, rows: int, n: int) -> Tensor:
        """An empty residual stream `[B, n, D]` as it passes between stages."""
        if self._region is not None and self._region.cuts_sequence:
            n //= self._region.size
        return torch.empty(rows, n, self.architecture.model.d_model, dtype=self.dtype, device=self.device)
