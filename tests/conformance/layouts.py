"""Two training steps of a small model in a layout, to be compared with the same on one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from model.batch import Batch
from model.config import Architecture
from model.entropy import EntropyPenalty
from model.fragments import Fragment
from model.objective import NextToken
from model.reparam import ReparamConfig
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.data import local
from parallel.mesh import build_mesh, resolve_layout
from parallel.spread import Spread, spread
from parallel.zero import spread_by_zero
from parallel.zero_config import resolve_zero
from tests.conformance.models import D_MODEL, VOCAB, mixer_class, random_batch
from trainer.checkpoint import CheckpointWriter, Counters, load_training_state, training_state
from trainer.config import CheckpointConfig, OptimizerConfig
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

ROWS, LENGTH = 16, 24
FEEDFORWARDS = {1: ["swiglu"], 2: ["sglu", "gelu"], 4: ["swiglu", "gelu", "sglu", "swiglu"]}
LR, CLIP = 0.01, 0.5
EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert": "sglu", "balance_weight": 0.7, "z_loss_weight": 0.1}
"""A mixture whose losses have a good part in every gradient."""

SCALARS = ("losses", "norms", "evaluated", "auxiliary", "by_modality")
"""What two steps are told in, beside tensors."""

Tensors = dict[str, torch.Tensor]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Bounds:
    """How far a layout may be from one process, relatively: losses, gradient norms, and each tensor as a whole."""

    losses: float
    norms: float
    tensors: float


BOUNDS = {"fp64": Bounds(1e-12, 1e-11, 1e-9), "fp32": Bounds(1e-5, 1e-5, 1e-5)}

LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "fsdp2": (2, ParallelConfig()),
    "fsdp4": (4, ParallelConfig(microbatches=2)),
    "hsdp2x2": (4, ParallelConfig(dp_replicate=2, microbatches=2)),
    "replicate2": (2, ParallelConfig(dp_replicate=2)),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp4": (4, ParallelConfig(tp=4, microbatches=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp4 interleaved": (4, ParallelConfig(pp=4, pp_schedule="interleaved1f1b")),
    "pp2 zbv": (2, ParallelConfig(pp=2, pp_schedule="zbv")),
    "tp2 x pp2": (4, ParallelConfig(tp=2, pp=2)),
    "tp2 x fsdp2": (4, ParallelConfig(tp=2)),
    "pp2 x fsdp2": (4, ParallelConfig(pp=2)),
    "tp2 x pp2 x fsdp2": (8, ParallelConfig(tp=2, pp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "cp4": (4, ParallelConfig(cp=4, microbatches=2)),
    "tp2 x cp2": (4, ParallelConfig(tp=2, cp=2)),
    "pp2 x cp2": (4, ParallelConfig(pp=2, cp=2)),
    "cp2 x fsdp2": (4, ParallelConfig(cp=2)),
    "cp2 x pp2 x fsdp2": (8, ParallelConfig(cp=2, pp=2)),
    "tp2 x cp2 x pp2": (8, ParallelConfig(tp=2, cp=2, pp=2)),
}
"""Every mixer is compared in each of these; a name is processes and settings."""

PRODUCTS: dict[str, tuple[int, ParallelConfig]] = {
    "accumulate 4": (1, ParallelConfig(microbatches=4)),
    "recompute": (1, ParallelConfig(recompute="full")),
    "hsdp2x2, recompute": (4, ParallelConfig(dp_replicate=2, microbatches=2, recompute="full")),
    "tp2, sequence whole": (2, ParallelConfig(tp=2, sequence_parallel=False)),
    "tp2, selective recomputation": (2, ParallelConfig(tp=2, recompute="selective", microbatches=2)),
    "tp4 x fsdp2": (8, ParallelConfig(tp=4)),
    "tp2 x hsdp2x2": (8, ParallelConfig(tp=2, dp_replicate=2, microbatches=2)),
    "tp2 x replicate2": (4, ParallelConfig(tp=2, dp_replicate=2)),
    "pp4": (4, ParallelConfig(pp=4, microbatches=4)),
    "pp2, recompute": (2, ParallelConfig(pp=2, recompute="full")),
    "pp2 x hsdp2x2": (8, ParallelConfig(pp=2, dp_replicate=2)),
    "tp2 x pp2, sequence whole": (4, ParallelConfig(tp=2, pp=2, sequence_parallel=False)),
    "tp2 x pp2 interleaved": (4, ParallelConfig(tp=2, pp=2, pp_schedule="interleaved1f1b")),
    "pp2 interleaved x fsdp2": (4, ParallelConfig(pp=2, pp_schedule="interleaved1f1b")),
    "pp2 zbv x fsdp2": (4, ParallelConfig(pp=2, pp_schedule="zbv")),
    "tp2 x pp2 zbv": (4, ParallelConfig(tp=2, pp=2, pp_schedule="zbv")),
    "tp2 x pp2 zbv x fsdp2": (8, ParallelConfig(tp=2, pp=2, pp_schedule="zbv")),
    "tp2 x pp2 x fsdp2, recompute": (8, ParallelConfig(tp=2, pp=2, microbatches=8, recompute="full")),
    "tp2 x pp2 x replicate2": (8, ParallelConfig(tp=2, pp=2, dp_replicate=2)),
    "tp2 x pp4": (8, ParallelConfig(tp=2, pp=4)),
    "tp4 x pp2": (8, ParallelConfig(tp=4, pp=2)),
    "cp2, recompute": (2, ParallelConfig(cp=2, recompute="full")),
    "cp4, selective recomputation": (4, ParallelConfig(cp=4, recompute="selective")),
    "cp2 x hsdp2x2": (8, ParallelConfig(cp=2, dp_replicate=2)),
    "tp2 x cp4": (8, ParallelConfig(tp=2, cp=4, sequence_parallel=False)),
    "tp2 x cp2 x fsdp2": (8, ParallelConfig(tp=2, cp=2)),
    "pp4 interleaved x cp2": (8, ParallelConfig(pp=4, cp=2, pp_schedule="interleaved1f1b")),
    "pp2 zbv x cp2": (4, ParallelConfig(pp=2, cp=2, pp_schedule="zbv")),
}
"""Further products up to 8 processes, with accumulation and recomputation."""

EXPERT_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "ep2": (2, ParallelConfig(ep=2)),
    "ep4": (4, ParallelConfig(ep=4, microbatches=2)),
    "ep2 x fsdp2": (4, ParallelConfig(ep=2)),
    "ep2 x tp2": (4, ParallelConfig(tp=2, ep=2)),
    "ep2 x pp2": (4, ParallelConfig(pp=2, ep=2)),
    "ep2 on cp2": (2, ParallelConfig(cp=2, ep=2)),
    "ep2 x cp2 x fsdp2": (8, ParallelConfig(cp=2, ep=2)),
    "ep4 on cp2 x fsdp2 x tp2": (8, ParallelConfig(cp=2, tp=2, ep=4)),
    "ep2 x hsdp2x2": (4, ParallelConfig(dp_replicate=2, ep=2, microbatches=2)),
    "ep2 x tp2 x pp2": (8, ParallelConfig(tp=2, pp=2, ep=2, recompute="full")),
    "ep2 x pp2 zbv": (4, ParallelConfig(pp=2, ep=2, pp_schedule="zbv")),
    "ep2 x fsdp2, selective recomputation": (4, ParallelConfig(ep=2, recompute="selective", microbatches=2)),
}
"""With experts spread: ep regroups the ranks of dp_shard x cp, so in "ep2 on cp2" those of cp2 are the ranks of ep2."""
KNOWN = LAYOUTS | PRODUCTS | EXPERT_LAYOUTS


def depth(name: str, precision: str) -> int:
    """Layers of the model that is compared in a layout: as few as will do, and one at least for each stage."""
    _, parallel = KNOWN[name]
    stages = resolve_layout(parallel, 8).num_stages
    return max(stages, 4 if precision == "fp64" else 2)


@dataclass(frozen=True)
class Case:
    """What is trained, and by which optimizer: a mixer (or several, joined by +), one of its examples, what its model
    is like, and how its matrices are reparametrised.

    `isolated`: whether rows are of several documents; otherwise each is one.

    In fp32 two layers are compared and in fp64 four: rounding inside forward grows with the depth, and in fp32 it comes
    near the bound where heads are few and their products small (as near for one process, against fp64).

    `experts`: settings of a mixture of experts, which is then the feed-forward of the last layers.

    `untie`: what each modality has for itself. Where ids do not say which one a token is of, the first half of the rows
    is of the first one alone, and there is none of the last.

    `kept_ids`: token ids whose rows of embedding and head are not trained, first and one beyond the last.

    `entropy`: a penalty that is trained on beside the cross-entropy. `mixer`: what the example is changed by.

    `fused_loss`: whether there are no logits where the head is whole. So layouts with them are compared with one
    process that has none.
    """

    kind: str
    example: int = 0
    num_layers: int = 4
    model: dict[str, Any] = field(default_factory=dict)
    isolated: bool = True
    optimizer: Optimizer = "adamw"
    reparam: dict[str, Any] = field(default_factory=dict)
    entropy: EntropyPenalty | None = None
    mixer: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    untie: dict[str, Any] = field(default_factory=dict)
    kept_ids: tuple[tuple[int, int], ...] = ()
    fused_loss: bool = True

    @classmethod
    def of(cls, kind: str, name: str, precision: str) -> Case:
        """What is compared in a layout of that name: rows of one document where the layout wants them so."""
        _, parallel = KNOWN[name]
        crossings = {mixer_class(part).context for part in kind.split("+")}
        isolated = parallel.cp == 1 or "none" not in crossings
        # In fp32 the scores of some token come so near each other, after an update, that rounding chooses its experts.
        experts = EXPERTS if precision == "fp64" else EXPERTS | {"top_k": EXPERTS["num_experts"]}
        return cls(kind, num_layers=depth(name, precision), isolated=isolated, experts=experts)

    def _changes(self, kind: str) -> dict[str, Any]:
        """In a hybrid, of the first mixer and others of its kind."""
        return self.mixer if kind == self.kind.split("+")[0] else {}

    def architecture(self) -> Architecture:
        """Width 32, a vocabulary that no tp divides, all feed-forwards; tied, with biases, unless `model` says else."""
        kinds = self.kind.split("+")
        names = kinds if len(kinds) > 1 else ["it"]
        feedforwards = FEEDFORWARDS[min(self.num_layers, 4)]
        if self.experts:
            feedforwards = [*feedforwards[:-1], "moe"]
        settings: dict[str, Any] = {
            "d_model": D_MODEL,
            "num_layers": self.num_layers,
            "vocab_size": VOCAB,
            "pattern": names,
            "feedforward_pattern": feedforwards,
            "tie_embeddings": True,
            "bias": True,
            "init_std": 0.1,
        }
        tables = {
            "model": settings | self.model,
            "mixers": {
                name: {"kind": kind} | mixer_class(kind).examples[self.example] | self._changes(kind)
                for name, kind in zip(names, kinds, strict=True)
            },
            "feedforwards": {"swiglu": {"d_ff": 48}, "sglu": {"d_ff": 24}, "gelu": {"d_ff": 64}},
        }
        if self.experts:
            tables["feedforwards"]["moe"] = self.experts
        if self.untie:
            tables["untie"] = self.untie
        faults: list[str] = []
        _, built = build_architecture(tables, faults, allow_code=True)
        assert built is not None, faults
        return built


def build(case: Case, parallel: ParallelConfig, precision: str, compiled: bool = False) -> Spread:
    """The model in a layout, with its initial values. Collective."""
    layout = resolve_layout(parallel, dist.get_world_size())
    what: tuple[Any, ...] = (case.architecture(), build_mesh(layout, "cpu"), torch.device("cpu"))
    how: dict[str, Any] = {"precision": precision, "recompute": parallel.recompute, "compiled": compiled}
    model: Spread
    if (zero := resolve_zero(parallel)) is not None:
        rows = ROWS // layout.data_parallel // layout.microbatches
        model = spread_by_zero(*what, zero, micro_batch_size=rows, **how)
    else:
        model = spread(*what, seq_len=LENGTH, reparam=ReparamConfig(**case.reparam), **how)
    model.initialise(seed=3)
    model.reparam.begin()
    if case.entropy is not None:
        model.penalise_entropy(case.entropy)
    return model


def updater_of(model: Spread, case: Case, frozen: tuple[str, ...] = ()) -> Updater:
    # Adam makes a whole step of a gradient that is nothing but rounding (that of a key's bias under a softmax is zero
    # in exact arithmetic). Its eps is put well above rounding, so that what is compared is the layout.
    eps = 1e-6 if model.dtype == torch.float64 else 1e-3
    config = OptimizerConfig(kind=case.optimizer, lr=LR, eps=eps, grad_clip=CLIP)
    thresholds = [name for name in model.beside if name.endswith("entropy_threshold")]
    optimizer = build_optimizer(model, config, frozen=list(frozen), lr_factors=dict.fromkeys(thresholds, 3.0))
    model.keep_rows(case.kept_ids)
    objective = NextToken(model.cross_entropy, takes_head=case.fused_loss and model.has_whole_head)
    return Updater(model, optimizer, objective, grad_clip=CLIP, seed=0, stop=StopRequest())


def share_of(model: Spread, step: int, isolated: bool = True) -> Batch:
    """This process's rows of the global batch of a step; rows count 5 to 95% of their tokens."""
    share = ROWS // model.layout.data_parallel
    rows = slice(model.mesh.data_rank * share, (model.mesh.data_rank + 1) * share)
    batch, untie = random_batch(ROWS, LENGTH, seed=step, isolated=isolated), model.architecture.untie
    if untie is not None and not untie.by_ids:
        batch = with_modalities(batch, untie.modalities, step)
    return batch.rows(rows)


def with_modalities(batch: Batch, count: int, seed: int) -> Batch:
    """Of so many modalities, in the first half of the rows only the first, and nowhere the last."""
    generator = torch.Generator().manual_seed(seed)
    rows, n = batch.tokens.shape
    of_all = torch.randint(count - 1, (rows, n + 1), generator=generator)
    of_all[: rows // 2] = 0
    return replace(batch, modalities=of_all[:, :-1], target_modalities=of_all[:, 1:])


def whole(model: Spread, tensors: dict[str, torch.Tensor | None]) -> Tensors:
    """Full copies, by name, of what this process has parts of. Collective."""
    found = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            found[name] = full(model.whole(name, tensor)).detach().clone()
    return found


def full(logical: torch.Tensor | Fragment) -> torch.Tensor:
    """All of a tensor, of which this process has a part. Collective."""
    if isinstance(logical, Fragment):
        flat = logical.values.new_zeros(logical.shape.numel())
        flat[logical.begin : logical.begin + len(logical.values)] = logical.values
        dist.all_reduce(flat)
        return flat.view(logical.shape)
    return logical.full_tensor() if isinstance(logical, DTensor) else logical


def beside(model: Spread) -> Tensors:
    """Copies of what stands beside the model here; of vectors the first, with a sign that two of them share."""
    found = {}
    for name, tensor in (model.beside | model.kept).items():
        x = tensor.detach().clone()
        if name.endswith("spectral_u"):
            x = x[:, 0]
        if name.endswith(("spectral_u", "spectral_v")):
            x = x * x[x.abs().argmax()].sign()
        found[name] = x
    return found


def told(model: Spread) -> dict[str, torch.nn.Parameter]:
    """What this process has to say something about: of what stands beside the model, all have the same to say."""
    return model.parameters if model.mesh.rank("pp") else model.learned


def spoken(model: Spread, tensors: Tensors) -> Tensors:
    """Those that this process, of all that hold them with the same stages, says."""
    return {name: x for name, x in tensors.items() if not any(model.holders(name).get_coordinate() or ())}


def two_steps(
    case: Case,
    parallel: ParallelConfig,
    precision: str = "fp64",
    frozen: tuple[str, ...] = (),
    compiled: bool = False,
) -> dict[str, Any]:
    """Losses and norms of two steps, a validation loss, the gradients of the first step, and the parameters at the end.

    Tensors come from one process for each pipeline rank; what stands beside the model, from all.
    """
    model = build(case, parallel, precision, compiled)
    updater = updater_of(model, case, frozen)
    seen: dict[str, Any] = {what: [] for what in SCALARS} | {"gradients": {}}
    plain_step = updater.optimizer.step

    def noting_step() -> None:
        if not seen["gradients"]:
            seen["gradients"] = whole(model, {name: p.grad for name, p in told(model).items()})
        plain_step()

    updater.optimizer.step = noting_step  # type: ignore[method-assign, assignment]
    for step in (1, 2):
        note_step(seen, model, updater, case, step)
    seen["parameters"] = whole(model, dict(told(model)))
    seen["beside"] = beside(model)
    seen["gradients"] = spoken(model, seen["gradients"])
    seen["parameters"] = spoken(model, seen["parameters"])
    return seen


def note_step(seen: dict[str, Any], model: Spread, updater: Updater, case: Case, step: int) -> None:
    """Make a step, and say what it came to, with a validation loss. Collective."""
    outcome = updater.update(share_of(model, step, case.isolated), step, lr=LR)
    seen["losses"].append(outcome.loss)
    seen["norms"].append(outcome.grad_norm)
    seen["auxiliary"] += outcome.auxiliary.values()
    seen["by_modality"] += [-1.0 if value is None else value for value in outcome.by_modality.values()]
    # Between training steps, as validation comes: it must leave no trace.
    model.evaluating(True)
    nats = torch.tensor(model.evaluate(share_of(model, 100, case.isolated), updater.objective), dtype=torch.float64)
    model.evaluating(False)
    dist.all_reduce(nats)
    seen["evaluated"].append(nats.item())


def plain_gradients(case: Case) -> tuple[float, Tensors]:
    """Loss and gradients of the first step by plain autograd: the mean over the counted tokens of the whole batch."""
    model = build(case, ParallelConfig(), "fp64").stages[0]
    batch = random_batch(ROWS, LENGTH, seed=1)
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    loss = F.cross_entropy(logits[batch.counted], batch.targets[batch.counted])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compiled_steps(case: Case, parallel: ParallelConfig, precision: str, cache: str) -> dict[str, Any]:
    """As `two_steps`, with compiled blocks; and what the compiler counted: graph breaks, and hits of its cache."""
    from torch._dynamo.utils import counters

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch._dynamo.reset()
    counters.clear()
    seen = two_steps(case, parallel, precision, compiled=True)
    return seen | {"breaks": dict(counters["graph_break"]), "hits": counters["inductor"]["fxgraph_cache_hit"]}


def merged(results: list[dict[str, Any]], what: str) -> Tensors:
    """The tensors of all pipeline ranks; each name comes from one of them."""
    found: Tensors = {}
    for result in results:
        assert not found.keys() & result[what].keys(), "a parameter in two places"
        found |= result[what]
    return found


def differences(found: Tensors, wanted: Tensors, floor: float) -> Iterator[tuple[float, str]]:
    """||a - b|| / ||b|| of each tensor and its name; where ||b|| is below the floor, over the floor."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        error = (found[name].double() - value.double()).norm() / max(value.double().norm().item(), floor)
        yield error.item(), name


def assert_equal(results: list[dict[str, Any]], alone: dict[str, Any], bounds: Bounds) -> None:
    """Every rank's losses and norms, and every tensor, within the bounds of one process's."""
    scalars = dict.fromkeys(("losses", "auxiliary", "evaluated", "by_modality"), bounds.losses)
    for what, bound in (scalars | {"norms": bounds.norms}).items():
        for rank, result in enumerate(results):
            assert result[what] == pytest.approx(alone[what], rel=bound, abs=0), f"{what} on rank {rank}"
    for result in results:
        # What every process has, it has to the bit: otherwise they would drift apart.
        same = [torch.equal(x, results[0]["beside"][name]) for name, x in result["beside"].items()]
        assert all(same), "what stands beside the model differs"
    for error, name in differences(results[0]["beside"], alone["beside"], floor=1e-3):
        # Where two singular values are near each other, rounding turns their vectors: in fp32 by more than the bound.
        sharp = bounds == BOUNDS["fp64"] or not name.endswith(("spectral_u", "spectral_v"))
        assert error <= bounds.tensors or not sharp, f"beside the model: {name}: {error:.1e}"
    for what, floor in (("gradients", 1e-3 * alone["norms"][0]), ("parameters", 1e-3)):
        errors = differences(merged(results, what), alone[what], floor)
        wrong = [f"{name}: {error:.1e}" for error, name in errors if not error <= bounds.tensors]
        assert not wrong, f"{what} differ: {', '.join(wrong)}"


def kept_wide(kind: str) -> set[str]:
    """Names of parameters that forward sees in fp32 under bf16."""
    model = build(Case(kind, num_layers=2), ParallelConfig(), "bf16")
    seen = set()

    def note(module: torch.nn.Module, prefix: str) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.float32:
                seen.add(f"{prefix}.{name}".lstrip("."))

    for prefix, module in model.stages[0].named_modules():
        module.register_forward_hook(lambda m, a, o, prefix=prefix: note(m, prefix))
    model.stages[0](random_batch(2, 8).tokens)
    return seen


def shared_dtypes(kind: str) -> set[torch.dtype]:
    """Under bf16, of what blocks are told that was computed once for all of them."""
    model = build(Case(kind, num_layers=2), ParallelConfig(), "bf16")
    seen: set[torch.dtype] = set()

    def note(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        leaves = torch.utils._pytree.tree_leaves(list(args[1].shared.values()))
        seen.update(leaf.dtype for leaf in leaves if torch.is_tensor(leaf) and leaf.is_floating_point())

    for block in model.stages[0].layers.values():
        block.register_forward_pre_hook(note)
    model.stages[0](random_batch(2, 8).tokens)
    return seen


def train_and_write(
    case: Case, parallel: ParallelConfig, precision: str, run_dir: Path, steps: int, write: bool
) -> dict[str, Any]:
    """Go on from step `steps - 1`, if it was written, to `steps`; write that, or say what came of it."""
    model = build(case, parallel, precision)
    updater = updater_of(model, case)
    began = Counters(steps - 1, ROWS, ROWS * LENGTH, skipped=3, skipped_in_a_row=2)
    folder = run_dir / "checkpoints" / f"step-{steps - 1:08d}"
    if folder.exists():
        assert load_training_state(folder, model, updater.optimizer) == began
    outcome = updater.update(share_of(model, steps, case.isolated), steps, lr=LR)
    if write:
        writer = CheckpointWriter(run_dir, CheckpointConfig(), lambda _: {}, lambda *_, **__: None)
        ended = Counters(steps, ROWS, ROWS * LENGTH, skipped=3, skipped_in_a_row=2)
        writer.save(training_state(model, updater.optimizer, ended), steps)
        # What is changed after the call must not reach the file.
        with torch.no_grad():
            for tensor in [*model.learned.values(), *model.kept.values()]:
                local(tensor).zero_()
        writer.close()
        return {}
    parameters, moments = spoken(model, whole(model, dict(told(model)))), {}
    for name, parameter in told(model).items():
        for key, moment in updater.optimizer.state[parameter].items():
            if key != "step":
                moments |= {f"{said}.{key}": x for said, x in spoken(model, whole(model, {name: moment})).items()}
    seen: dict[str, Any] = {"losses": [outcome.loss], "norms": [outcome.grad_norm]}
    return seen | {"parameters": parameters, "moments": moments, "beside": beside(model)}
