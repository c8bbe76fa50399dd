"""`headway convert to-hf MODEL OUT`, `headway convert from-hf HF OUT`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


@dataclass
class ToArguments:
    """Write a model as a Hugging Face folder, and prove that transformers computes the same logits from it."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The folder to write; it appears when all is done and checked."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: bfloat16 for a run in bf16, else float32."""
    max_shard_size: str = "5GB"
    """Weights are cut into files of at most this."""
    format: str | None = None
    """llama, mistral, qwen2, qwen3, mixtral, gpt2, minimax, transnormer, or headway, which takes every model and brings
    its own modelling file. Default: the first that can say all of the model."""
    tokenizer: str | None = None
    """A tokenizer folder or .model; "none" for none. Default: the one in the checkpoint."""
    allow_code: bool = False
    """Import layer classes that the checkpoint's configuration names by path; their source goes with the export."""
    overwrite: bool = False
    """Replace OUT if it is a Hugging Face folder."""


@dataclass
class FromArguments:
    """Write a Hugging Face folder as a step folder, and prove that it computes what transformers computes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="HF")]
    """A Hugging Face folder: config.json and weights as safetensors or .bin."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The step folder to write; it appears when all is done and checked."""
    dtype: str | None = None
    """float32, bfloat16 or float16. Default: float32."""
    allow_code: bool = False
    """Import layer classes that the folder's configuration names by path. Code in the folder is never run."""
    overwrite: bool = False
    """Replace OUT if it is a step folder."""


def to_hf(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(ToArguments, args=argv, prog="headway convert to-hf", config=_CONFIG)
    from trainer.convert import to_hf as convert

    convert(
        arguments.model,
        arguments.out,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        form=arguments.format,
        tokenizer=arguments.tokenizer,
        allow_code=arguments.allow_code,
        overwrite=arguments.overwrite,
    )
    return 0


def from_hf(argv: list[str]) -> int:
    """Returns the exit code. Raises ValueError for what is refused."""
    arguments = tyro.cli(FromArguments, args=argv, prog="headway convert from-hf", config=_CONFIG)
    from trainer.convert import from_hf as convert

    convert(
        arguments.folder,
        arguments.out,
        dtype=arguments.dtype,
        allow_code=arguments.allow_code,
        overwrite=arguments.overwrite,
    )
    return 0
