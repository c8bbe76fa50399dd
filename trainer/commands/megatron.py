"""`headway convert to-megatron MODEL OUT`, `headway convert from-megatron MEGATRON OUT`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


@dataclass
class ToArguments:
    """Write a model as a GPT checkpoint that Megatron-LM loads, and prove that megatron-core computes the same logits
    from it."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write, for Megatron-LM's --load; it appears when all is done and checked."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: bfloat16 for a run in bf16, else float32."""
    make_vocab_size_divisible_by: int = 128
    """The embedding gets rows of zeros until this divides their number; as Megatron-LM's argument, times tp."""
    tokenizer: str | None = None
    """A tokenizer folder or .model; "none" for none. Default: the one in the checkpoint."""
    overwrite: bool = False
    """Replace OUT if it is a folder of Megatron-LM's."""


@dataclass
class FromArguments:
    """Write a GPT checkpoint of Megatron as a step folder, and prove that it computes what megatron-core computes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MEGATRON")]
    """What Megatron-LM's --save names, or the folder of one iteration in it: a distributed checkpoint (torch_dist) or
    files of ranks (torch)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The step folder to write; it appears when all is done and checked."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: float32."""
    tokenizer: Path | None = None
    """A tokenizer folder or .model to go with it: Megatron's checkpoint has none."""
    overwrite: bool = False
    """Replace OUT if it is a step folder."""


def to_megatron(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(ToArguments, args=argv, prog="headway convert to-megatron", config=_CONFIG)
    from trainer.convert_megatron import to_megatron as convert

    convert(
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        divisible_by=arguments.make_vocab_size_divisible_by,
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
    )
    return 0


def from_megatron(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(FromArguments, args=argv, prog="headway convert from-megatron", config=_CONFIG)
    from trainer.convert_megatron import from_megatron as convert

    convert(
        arguments.folder,
        arguments.out,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
    )
    return 0
