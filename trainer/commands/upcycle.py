"""`headway upcycle moh MODEL OUT`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class MoHArguments:
    """Write a model with mixture-of-head attention: some heads always run, others are chosen for each token.

    The weights stay as they are. OUT is a Hugging Face folder for train (model.init_from), eval, generate and
    transformers; with all heads on it computes what MODEL does, which is checked.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder, with softmax attention."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write; it appears when all is done and checked."""
    shared_heads: int
    """The first so many query heads of every layer run for every token."""
    active_heads: int
    """So many of the others run for each token."""
    router: Literal["norm", "learned"] = "norm"
    """What chooses them: the norms of their queries, without new weights, or a linear map that is to be trained."""
    route_unit: Literal["head", "kv_group"] = "head"
    """Choose heads one by one, or all that share a key and value head together."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: bfloat16 for a run in bf16, what MODEL has, else float32."""
    max_shard_size: str = "5GB"
    """Weights are cut into files of at most this."""
    overwrite: bool = False
    """Replace OUT if it is a Hugging Face folder."""


def moh(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(MoHArguments, args=argv, prog="headway upcycle moh", config=(tyro.conf.FlagCreatePairsOff,))
    from trainer.upcycle import HeadChoice, to_moh

    to_moh(
        arguments.model,
        arguments.out,
        HeadChoice(arguments.shared_heads, arguments.active_heads, arguments.router, arguments.route_unit),
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )
    return 0
