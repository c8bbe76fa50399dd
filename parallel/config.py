"""`[parallel]`: how the work is spread. Nothing here changes what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ParallelConfig:
    """`[parallel]`; world size = dp_replicate x dp_shard x pp x cp x tp."""

    dp_replicate: int = 1
    """Copies of the (sharded) model."""
    dp_shard: int = -1
    """Ranks over which parameters, gradients and optimizer states are cut (FSDP2); -1 takes what is left."""
    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline-parallel ranks, each with one stage or two (pp_schedule)."""
    cp: int = 1
    """Ranks over which a sequence is cut."""
    ep: int = 1
    """Expert-parallel ranks: no factor of the world, they regroup the dp_shard x cp ranks."""
    microbatches: int | None = None
    """Equal parts into which a data-parallel rank cuts its share of the batch. Default: 1, or 2 x pp."""
    sequence_parallel: bool = True
    """With tp: cut the residual stream along the sequence between tensor-parallel regions."""
    pp_schedule: Literal["1f1b", "interleaved1f1b", "zbv"] = "1f1b"
    """Order of forward and backward in a pipeline."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again: nothing, all but linear maps and fused attention, or everything."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """What carries data parallelism: torch's FSDP2, or DeepSpeed's ZeRO, without tp, pp, cp and ep."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed: what is cut over all ranks: optimizer states (1), gradients too (2), parameters too (3). 0: as
    deepspeed_config says, or 2."""
    offload_optimizer: Literal["none", "cpu", "nvme"] | None = None
    """DeepSpeed: where optimizer states are kept, which the CPU then updates; nvme with zero_stage 3. Default: as
    deepspeed_config says, or none."""
    offload_parameters: Literal["none", "cpu"] | None = None
    """DeepSpeed, zero_stage 3: where parameters wait for their turn. Default: as deepspeed_config says, or none."""
    nvme_dir: str = ""
    """DeepSpeed, offload to nvme: a folder of this run's own on a fast disk of each node."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON of your own: what it says of speed and memory is taken, and the rest must agree with this
    configuration."""
    node_timeout: float = 30.0
    """Seconds without a sign of life from another node after which the run ends and names it; 0: wait for ever."""
