"""`headway upcycle moh MODEL OUT` and `headway upcycle bam SEED OUT --experts MODEL ...`"""

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


@dataclass
class BAMArguments:
    """Write several dense models, trained on from one seed, as one model of experts.

    Expert j of attention and of the feed-forward is that of the j-th model; norms, embeddings and the head are the
    average of all. Every expert is checked to compute what it did. OUT is a Hugging Face folder for train
    (model.init_from), eval, generate and transformers; its routers are to be trained.
    """

    seed: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SEED")]
    """The model from which the others were trained on: a run folder, a step folder or a Hugging Face folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write; it appears when all is done and checked."""
    experts: Annotated[list[Path], tyro.conf.arg(metavar="MODEL ...")]
    """The models trained on from SEED, in any of these forms."""
    with_seed: bool = True
    """SEED is an expert itself, the first, and counts in the average."""
    top_k: int = 1
    """So many feed-forwards run for each token. Attentions all do."""
    ffn_gate_norm: Literal["scale_n", "selected", "none"] = "scale_n"
    """What a feed-forward's gate is. scale_n: its part of the softmax over all experts, with a router that begins as
    zeros and maps out made larger by experts / top_k. selected: that over those that run. none: as in the paper."""
    shared_kv: bool = False
    """Keys and values of all attentions are projected once, by the average."""
    router_std: float = 0.02
    """Standard deviation of the routers' weights; 0: all experts weigh alike."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: bfloat16 for a run in bf16, what SEED has, else float32."""
    max_shard_size: str = "5GB"
    """Weights are cut into files of at most this."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace OUT if it is a Hugging Face folder."""


def bam(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(BAMArguments, args=argv, prog="headway upcycle bam")
    from trainer.mixing import Mixture, to_bam

    to_bam(
        arguments.seed,
        arguments.out,
        arguments.experts,
        Mixture(
            arguments.with_seed,
            arguments.top_k,
            arguments.ffn_gate_norm,
            arguments.shared_kv,
            arguments.router_std,
        ),
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )
    return 0
