"""`headway upcycle moe MODEL OUT`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class MoEArguments:
    """Write a model whose feed-forwards are mixtures of experts: copies of the one that stood there, and a router.

    OUT is a Hugging Face folder for train (model.init_from), eval, generate and transformers. Unless told otherwise it
    computes what MODEL does, which is checked; experts become different ones by training.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder, without experts."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write; it appears when all is done and checked."""
    experts: int
    """So many copies of each feed-forward."""
    top_k: int
    """So many of them run for each token."""
    gate_norm: Literal["selected", "scale_n", "none"] | None = None
    """Divide gates by their sum; or leave them as they are, and multiply output projections by experts / top_k once; or
    leave both. Default: selected, and scale_n with one expert for a token, whose router would else learn nothing."""
    router_std: float | None = None
    """Standard deviation of the routers' weights. Default: 0.02; with scale_n 0, so that nothing changes."""
    format: str | None = None
    """mixtral, minimax or headway. Default: the first that can say all of the result, mixtral for a Llama."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: bfloat16 for a run in bf16, what MODEL has, else float32."""
    max_shard_size: str = "5GB"
    """Weights are cut into files of at most this."""
    overwrite: bool = False
    """Replace OUT if it is a Hugging Face folder."""


def moe(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(MoEArguments, args=argv, prog="headway upcycle moe", config=(tyro.conf.FlagCreatePairsOff,))
    from trainer.experts import ExpertChoice, to_moe

    to_moe(
        arguments.model,
        arguments.out,
        ExpertChoice(arguments.experts, arguments.top_k, arguments.gate_norm, arguments.router_std),
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        form=arguments.format,
        overwrite=arguments.overwrite,
    )
    return 0
