"""`headway upcycle mot MODEL OUT`"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from model.untie import UntieConfig, UntiedPart


@dataclass
class MoTArguments:
    """Write a model in which each modality has weights of its own, all of which begin as those of MODEL.

    OUT is a Hugging Face folder for train (model.init_from), eval, generate and transformers. Whatever the modalities
    of the tokens are, it computes what MODEL does, which is checked; the modalities become different by training.
    run.freeze = ["*.towers.0.*", ...] and run.freeze_ids keep the first.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write; it appears when all is done and checked."""
    modalities: int
    """How many. MODEL's ids are those of the first."""
    new_ids: Annotated[list[int], tyro.conf.arg(metavar="N ...")] = field(default_factory=list)
    """So many new token ids for each modality after the first. Default: none, and the data says which modality a token
    is of."""
    markers: int = 0
    """So many new ids after those, of the first modality: what opens and closes an image."""
    names: Annotated[list[str], tyro.conf.arg(metavar="NAME ...")] = field(default_factory=list)
    """What the modalities are called. Default: 0, 1, ..."""
    parts: list[UntiedPart] = field(default_factory=lambda: UntieConfig().parts)
    """What each modality has for itself."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: bfloat16 for a run in bf16, what MODEL has, else float32."""
    max_shard_size: str = "5GB"
    """Weights are cut into files of at most this."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace OUT if it is a Hugging Face folder."""


def mot(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(MoTArguments, args=argv, prog="headway upcycle mot")
    from trainer.towers import Modalities, to_mot

    to_mot(
        arguments.model,
        arguments.out,
        Modalities(arguments.modalities, arguments.new_ids, arguments.markers, arguments.names, arguments.parts),
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )
    return 0
