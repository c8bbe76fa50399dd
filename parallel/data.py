"""Data parallelism by FSDP2: sharded (dp_shard), replicated (dp_replicate), or both (HSDP); and initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.feedforward.experts import Experts
from model.fragments import Fragment
from model.initialisation import Init, all_inits, draw
from model.stack import Model

View = Callable[[str, Tensor], Tensor]
"""From a parameter's name and what this process has of it to the parameter as a part of the whole model's."""


def shard(model: Model, mesh: DeviceMesh, expert_mesh: DeviceMesh, *, bf16: bool, keep_gathered: bool = False) -> None:
    """Shard the model's parameters over the mesh, block by block, and those of experts over theirs.

    One path for all: plain replication is a mesh whose `dp_shard` is 1 (unlike DDP, its reductions do not change
    their order after the first step, so a resumed run stays bit-equal). A process alone in full precision needs no
    wrapping at all. With `bf16`, parameters stay fp32 and are cast when gathered; gradients are reduced in fp32.

    Args:
        expert_mesh: of the ranks with the same experts; where it is the mesh itself, experts go with their blocks.
        keep_gathered: between forward and backward. A pipeline would gather again for every micro-batch, and torch's
            zero-bubble schedules compute wrong gradients, without a word, when parameters are put back in between.
    """
    if mesh.size() == 1 and not bf16:
        return
    # Inputs are left as they are: the stream is bf16 by itself, and FSDP would look into the context, where rotary
    # tables have to stay fp32.
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else wide
    if bf16:
        for module in list(model.modules()):
            if getattr(module, "keep_fp32", False):
                fully_shard(module, mesh=mesh, mp_policy=wide, reshard_after_forward=not keep_gathered)
    for block in model.layers.values():
        for module in block.modules() if expert_mesh != mesh else ():
            if isinstance(module, Experts):
                fully_shard(module, mesh=expert_mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)


def initialise(model: Model, seed: int, device: torch.device, view: View = lambda name, tensor: tensor) -> None:
    """Give a model on the meta device its memory and its initial values; each rank draws only what it holds."""
    inits = all_inits(model)
    model.to_empty(device=device)
    draw_all({name: view(name, parameter) for name, parameter in model.named_parameters()}, inits, seed)


def draw_all(parameters: Mapping[str, Tensor | Fragment], inits: Mapping[str, Init], seed: int) -> None:
    """Initial values of parameters, as parts of the whole model's."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            for local, rows, columns in held_boxes(parameter):
                part = draw(name, inits[name], parameter.shape, seed, rows)
                local.copy_(part[(slice(None), *columns)])


def fill(parameters: Mapping[str, Tensor | Fragment], read: Callable[[str], Tensor]) -> None:
    """Copy values into parameters, as parts of the whole model's. `read` gives a whole parameter by its name."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            boxes = list(held_boxes(parameter))
            whole = read(name) if boxes else None
            for local, rows, columns in boxes:
                assert whole is not None
                local.copy_(whole[rows.start : rows.stop][(slice(None), *columns)])


def held_boxes(parameter: Tensor | Fragment) -> Iterator[tuple[Tensor, range, tuple[slice, ...]]]:
    """As `held`, also of a fragment, which is none to several boxes."""
    if not isinstance(parameter, Fragment):
        yield held(parameter)
        return
    for offsets, values in parameter.boxes():
        columns = zip(offsets[1:], values.shape[1:], strict=True)
        yield values, range(offsets[0], offsets[0] + len(values)), tuple(slice(o, o + size) for o, size in columns)


def held(parameter: Tensor) -> tuple[Tensor, range, tuple[slice, ...]]:
    """The part of a parameter in this process's memory: the tensor, its global rows, and its slices in the rest."""
    if not isinstance(parameter, DTensor):
        return parameter, range(parameter.shape[0]), ()
    # In a plan tensors have no values, and torch finds offsets by looking into some.
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    rows = range(offset[0], offset[0] + shape[0])
    columns = tuple(slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True))
    return parameter.to_local(), rows, columns


def local(tensor: Tensor) -> Tensor:
    """What this process has in memory of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the coming backward reduces gradients over ranks: only the last micro-batch's does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def release_gathered(model: nn.Module) -> None:
    """Put the parameters back into their shards after a forward without a backward.

    FSDP2 leaves the outermost group gathered, for a backward that does not come; until the next one,
    `named_parameters` would give tensors that the optimizer does not know.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sum of each value over all ranks, in fp64. Collective; travels by gloo, so no GPU waits for it."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()
