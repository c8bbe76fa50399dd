"""Data parallelism by DeepSpeed's ZeRO: a model whose optimizer states, gradients or parameters DeepSpeed cuts up.

DeepSpeed runs the hooks around forward and backward, reductions, offload and the update. Which numbers go in and come
out is ours: initial values, the one normaliser of the loss, the global norm and clipping, whether a step is skipped,
what a checkpoint holds. So a run is the same by either engine, and continues by the other.

Few and small parameters stay out of DeepSpeed, whole and alike on every process: those that are fp32 also where all
others are bf16 (routers, angles: a ZeRO optimizer has one type), and those beside the model.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.initialisation import all_inits
from model.reparam import ReparamConfig
from model.stack import Block, Model
from parallel.collectives import sum_lists
from parallel.data import draw_all
from parallel.gradients import clip_gradients
from parallel.mesh import Mesh
from parallel.recompute import Recompute, compile_blocks, recompute_blocks
from parallel.spread import DTYPES, Spread
from parallel.tensor import Cuts
from parallel.zero_config import ZeroConfig, engine_tables
from parallel.zero_partitions import MOMENTS, Partitions

if TYPE_CHECKING:
    from model.config import Architecture


def spread_by_zero(
    architecture: Architecture,
    mesh: Mesh,
    device: torch.device,
    zero: ZeroConfig,
    *,
    precision: str,
    micro_batch_size: int,
    recompute: Recompute = "none",
    compiled: bool = False,
) -> ZeroSpread:
    """As `parallel.spread.spread`, by DeepSpeed.

    Args:
        precision: of matrix products: bf16 or fp32.
        micro_batch_size: rows of a micro-batch on one process.
    """
    with torch.device("meta"):
        uncut, model = Model(architecture), Model(architecture)
    recompute_blocks(model, recompute)
    if compiled:
        compile_blocks(model)
    tables = engine_tables(zero, precision, micro_batch_size, mesh.layout.microbatches)
    return ZeroSpread(uncut, model, mesh, device, DTYPES[precision], zero, tables)


class ZeroSpread(Spread):
    """A `Spread` whose data parallelism is DeepSpeed's.

    It has values, and trains, once `start` has been given the optimizer; before, parameters have memory alone.

    Attributes:
        tables: what DeepSpeed is told.
        kept_whole: names of the model's parameters that DeepSpeed does not know.
    """

    def __init__(
        self,
        uncut: Model,
        model: Model,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        zero: ZeroConfig,
        tables: dict[str, Any],
    ):
        super().__init__(uncut, mesh, device, [model], [Cuts.none(model)], None, dtype, ReparamConfig())
        self.zero, self.tables = zero, tables
        self.kept_whole: set[str] = set()

    @property
    def gradient_divisor(self) -> int:
        """DeepSpeed averages over its processes."""
        return self.mesh.data.size()

    @property
    def apart(self) -> set[str]:
        return self.kept_whole | set(self.beside)

    def whole(self, name: str, tensor: Any) -> Any:
        """Fragments know what they are a part of; all else is whole."""
        return tensor

    def whole_parameters(self) -> dict[str, Any]:
        """Name -> parameter as a part of the whole model's, in fp32, as the optimizer has it."""
        fragments = self._partitions.fragments()
        return {name: fragments.get(name, parameter) for name, parameter in self.parameters.items()}

    def initialise(self, seed: int) -> None:
        """Memory in the type of forward, cut already where parameters are. Values come with `start`. Collective."""
        (model,) = self.stages
        self._inits, self._seed = all_inits(model), seed
        wide = {id(p) for module in model.modules() if getattr(module, "keep_fp32", False) for p in module.parameters()}
        self.kept_whole = {name for name, parameter in model.named_parameters() if id(parameter) in wide}
        names = [name for name, _ in model.named_parameters()]
        hidden: dict[str, nn.Parameter] = {}
        # Part by part: no process ever has all parameters of a model that is cut.
        for prefix, part in _parts(model):
            part.to_empty(device=self.device)
            hidden |= {f"{prefix}.{name}": parameter for name, parameter in _hide(part)}
            for parameter in part.parameters():
                parameter.data = parameter.data.to(self.dtype)
            if self.zero.stage == 3:
                _deepspeed().zero.Init(module=part, config_dict_or_path=self.tables, dtype=self.dtype)
        found = dict(model.named_parameters()) | hidden
        self.parameters = {name: found[name] for name in names}

    def start(self, adamw: torch.optim.AdamW) -> Partitions:
        """Hand the model and its optimizer, which leave out what is `apart`, to DeepSpeed; then give all parameters
        their initial values. Collective."""
        deepspeed = _deepspeed()
        (model,) = self.stages
        if self.zero.stage == 3:
            # A block's parameters come and go together, whichever of its modules use them.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        with contextlib.redirect_stdout(None):  # What it prints of memory, asked or not.
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=self.tables)
        known = {name: parameter for name, parameter in self.parameters.items() if name not in self.kept_whole}
        self._partitions = Partitions(self.engine, known, self.zero)
        draw_all(self.whole_parameters(), self._inits, self._seed)
        self.update_copies()
        return self._partitions

    @property
    def runs(self) -> nn.Module:
        return self.engine

    def _reduce_after(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def _finish_gradients(self) -> None:
        """DeepSpeed has reduced what it knows; here is the rest of the model. Collective."""
        summands = []
        for name in sorted(self.kept_whole):
            if (parameter := self.parameters[name]).requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                summands.append(parameter.grad)
        if summands:
            sum_lists(summands, dist.group.WORLD)
            torch._foreach_div_(summands, self.gradient_divisor)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        fragments = self._partitions.gradients()
        alike = self._alike()
        return [*fragments, *alike], [*fragments, *(alike if dist.get_rank() == 0 else [])]

    def _alike(self) -> list[Tensor]:
        """Gradients of what is whole on every process."""
        return [gradient for name in self.apart if (gradient := self.learned[name].grad) is not None]

    def clip_gradients(self, norm: float, limit: float) -> None:
        if self.zero.offload_optimizer != "nvme":
            super().clip_gradients(norm, limit)
            return
        clip_gradients(self._alike(), norm, limit)
        # Those on disk are scaled when they come in for the update.
        self._partitions.divisor = max(1.0, norm / limit) if limit > 0 else 1.0

    def update_copies(self) -> None:
        """What forward sees follows the optimizer's parameters. Collective."""
        self._partitions.publish()

    def finish_update(self) -> None:
        """As every model; DeepSpeed has published its parameters in its step already."""
        self._move_selection()


class ZeroAdamW(torch.optim.Optimizer):
    """AdamW of a model under ZeRO: DeepSpeed's part, and beside it that of the parameters which it does not know.

    Args:
        adamw: of what is `apart`; None where there is nothing.
    """

    def __init__(self, model: ZeroSpread, partitions: Partitions, adamw: torch.optim.AdamW | None):
        # No call of the base class: groups and state are those of the two optimizers.
        self.model, self.partitions, self.adamw = model, partitions, adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.partitions.param_groups, *([] if self.adamw is None else self.adamw.param_groups)]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """Parameter -> `step`, `exp_avg` and `exp_avg_sq`; of what is cut, moments are fragments."""
        moments = {key: self.partitions.fragments(key) for key in MOMENTS}
        states: dict[Tensor, dict[str, Any]] = {} if self.adamw is None else dict(self.adamw.state)
        for name, step in self.partitions.steps().items():
            states[self.model.parameters[name]] = {"step": step} | {key: moments[key][name] for key in MOMENTS}
        return states

    @torch.no_grad()
    def step(self) -> None:
        """Collective."""
        self.partitions.step()
        if self.adamw is not None:
            self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """After a step that was skipped, gradients go as they came. Collective."""
        self.partitions.drop_gradients()
        if self.adamw is not None:
            self.adamw.zero_grad(set_to_none)


def _parts(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """What a model is made of, block by block."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            yield from ((f"{name}.{key}", block) for key, block in child.items())
        else:
            yield name, child


def _hide(part: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Take parameters that stay fp32 out of DeepSpeed's sight; modules find them all the same."""
    for prefix, module in part.named_modules():
        if not getattr(module, "keep_fp32", False):
            continue
        for inner, owner in module.named_modules(prefix=prefix):
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    del owner._parameters[name]
                    owner.__dict__[name] = parameter
                    yield f"{inner}.{name}".lstrip("."), parameter


def _deepspeed() -> Any:
    """The library, told which kind of device there is, and to keep its remarks to itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It asks which process of the machine this is, also where nobody has launched it.
    os.environ.setdefault("LOCAL_RANK", "0")
    # Names of collectives that torch has given others.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An extension for inference on CPUs, which every process would compile when it meets the others.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
