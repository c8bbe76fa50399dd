"""What DeepSpeed's ZeRO optimizers hold in this process: the one file that knows their insides (DeepSpeed 0.19.8).

Each of them keeps flat fp32 partitions of groups of parameters, and AdamW's moments as flat; what lies in them of a
parameter is a `Fragment`. There are three: for stages 1 and 2, for stage 3, and for stage 1 in bf16 without offload.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.fragments import Fragment
from parallel.zero_config import ZeroConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: in which partition, from which element on, and which of its own elements these are."""

    shape: torch.Size
    partition: int
    start: int
    begin: int
    count: int

    def of(self, flat: Tensor) -> Fragment:
        return Fragment(self.shape, self.begin, flat.detach().narrow(0, self.start, self.count))


class Partitions:
    """The masters of a model's parameters, their moments and gradients, as far as this process has them.

    Args:
        engine: of DeepSpeed, with AdamW as its optimizer.
        parameters: name -> parameter, of all that it knows.
    """

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], zero: ZeroConfig):
        self.engine, self.zero = engine, zero
        self.optimizer, self.adamw = engine.optimizer, engine.optimizer.optimizer
        self._in_bf16 = hasattr(self.optimizer, "fp32_groups_gradient_flat_partition")
        place = self._place_of_stage_3 if zero.stage == 3 else self._place_of_others
        self._places = {name: place(parameter) for name, parameter in parameters.items()}
        self.divisor = 1.0
        self._copies: dict[int, dict[str | None, Tensor]] = {}
        for index, flat in enumerate(self.flat):
            with self._in_memory(index, write=True):
                self.adamw.state[flat] = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
                self.adamw.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        self._steps = {name: torch.zeros((), dtype=torch.float32) for name in parameters}
        self._pending = False

    @property
    def flat(self) -> list[Tensor]:
        """The masters: what AdamW updates."""
        if self.zero.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        if self._in_bf16:
            return self.optimizer.fp32_groups_flat_partition
        return self.optimizer.single_partition_of_fp32_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.adamw.param_groups

    def _place_of_stage_3(self, parameter: Any) -> _Place:
        """Every process has a run of each parameter; the last ones perhaps none, or one that ends in padding."""
        partition, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        begin = min(dist.get_rank() * size, parameter.ds_numel)
        return _Place(parameter.ds_shape, partition, start, begin, min(size, parameter.ds_numel - begin))

    def _place_of_others(self, parameter: Any) -> _Place:
        """A group's parameters lie one behind the other, and every process has a run of all of it."""
        if (mapping := parameter._hp_mapping) is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            return _Place(parameter.shape, mapping.param_group_index, here.start, there.start, here.numel)
        return _Place(parameter.shape, self._groups[id(parameter)], 0, 0, 0)

    @cached_property
    def _groups(self) -> dict[int, int]:
        """Of which group each parameter is, in the optimizers of stages 1 and 2."""
        groups = self.optimizer.bf16_groups if self._in_bf16 else self.optimizer.bit16_groups
        return {id(parameter): index for index, group in enumerate(groups) for parameter in group}

    def fragments(self, moment: str | None = None) -> dict[str, Fragment]:
        """Name -> what is here of its master, or of one of its moments; they share memory with DeepSpeed's."""
        flats = [self._values(index, moment) for index in range(len(self.flat))]
        return {name: place.of(flats[place.partition]) for name, place in self._places.items()}

    def _values(self, index: int, moment: str | None) -> Tensor:
        """A partition's masters, or one of its moments; of what is on disk a copy, which `publish` writes back."""
        flat = self.flat[index]
        if not self._on_disk(index):
            return flat if moment is None else self.adamw.state[flat][moment]
        if index not in self._copies:
            with self._in_memory(index):
                held = {None: flat.detach()} | {key: self.adamw.state[flat][key] for key in MOMENTS}
                self._copies[index] = {key: values.clone() for key, values in held.items()}
        return self._copies[index][moment]

    def _on_disk(self, index: int) -> bool:
        """Small partitions stay in memory, also where others are on disk."""
        return self.zero.offload_optimizer == "nvme" and self.optimizer._swappable_optimizer_subgroup(index)

    @contextmanager
    def _in_memory(self, index: int, *, write: bool = False) -> Iterator[None]:
        """Within, masters and moments of a partition are in memory; then they are written back, or let go."""
        if not self._on_disk(index):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(index)
        yield
        if write:
            self.optimizer._optimizer_states_and_gradient_swap_out(index)
        else:
            self.optimizer._release_swap_buffers(index)

    def steps(self) -> dict[str, Tensor]:
        """Name -> by how many updates its moments were made; what is written there counts from `publish` on."""
        counts = [float(self.adamw.state[flat]["step"]) for flat in self.flat]
        for name, place in self._places.items():
            self._steps[name].fill_(counts[place.partition])
        return self._steps

    def gradients(self) -> list[Tensor]:
        """What is here of all gradients, each element on one process, and padding, which is 0.

        With disks, numbers that have the norms of what is here instead.
        """
        self._pending = True
        if self.zero.offload_optimizer == "nvme":
            return [torch.as_tensor(norm).float().reshape(1) for norm in self.optimizer.norm_for_param_grads.values()]
        if self.zero.offload_optimizer != "none":
            if torch.cuda.is_available():
                # They are copied beside the computation.
                torch.cuda.synchronize()
            return [flat.grad for flat in self.flat if flat.grad is not None]
        if self._in_bf16:
            return list(self.optimizer.fp32_groups_gradient_flat_partition)
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group or ()]

    def step(self) -> None:
        """Update masters and moments by the gradients, and publish. Collective."""
        self._copies.clear()
        if self.divisor != 1.0:
            self.optimizer.override_loss_scale(self.divisor)
        self.engine.step()
        self.optimizer.custom_loss_scaler = False
        self._pending, self.divisor = False, 1.0

    def drop_gradients(self) -> None:
        """What is left of gradients goes. Collective, if there is any."""
        if not self._pending:
            return
        # DeepSpeed makes its step, in which AdamW does nothing: so all that belongs to a step is done with.
        self.adamw.step = lambda closure=None: None
        try:
            self.step()
        finally:
            del self.adamw.step

    @torch.no_grad()
    def publish(self) -> None:
        """What forward sees follows the masters, which were written to. Collective.

        Raises:
            ValueError: parameters of one group were updated more or less often than others.
        """
        self._take_steps()
        for index, copies in self._copies.items():
            with self._in_memory(index, write=True):
                self.flat[index].copy_(copies[None])
                for key in MOMENTS:
                    self.adamw.state[self.flat[index]][key].copy_(copies[key])
        if self.zero.stage != 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        for index in range(len(self.flat)):
            with self._in_memory(index):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        self._copies.clear()

    def _take_steps(self) -> None:
        """One count serves a whole partition."""
        for index, flat in enumerate(self.flat):
            counts = {name: int(self._steps[name]) for name, place in self._places.items() if place.partition == index}
            least, most = (choose(counts, key=counts.__getitem__) for choose in (min, max))
            if counts[least] != counts[most]:
                raise ValueError(
                    f"{least} has been updated {counts[least]} times and {most} {counts[most]} times (some were frozen "
                    'for a while): with parallel.engine = "deepspeed" one count serves many parameters. Go on with '
                    'engine = "torch", or begin anew from these weights with model.init_from.'
                )
            self.adamw.state[flat]["step"].fill_(counts[least])
