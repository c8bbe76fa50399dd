"""From our checkpoints to Megatron's and back; nothing gets its name before megatron-core has computed the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Architecture
from model.files import new_folder
from model.folders import MANIFEST
from model.hf.check import Agreement, check_tokens, judge, native_logits
from model.hf.names import parameter_shapes
from model.hf.source import Source, StepFolder, open_model
from model.megatron.arguments import arguments_of
from model.megatron.check import ask_megatron
from model.megatron.distributed import write_distributed
from model.megatron.folder import TRACKER, MegatronFolder, is_megatron_folder
from model.megatron.names import held_tensors
from trainer.convert import Say, all_of, check_free, described, dtype_named, name_of, tokenizer_of, write_step_folder
from trainer.data.train_tokenizer import write_hugging_face_files

RELEASE = "release"


def to_megatron(
    model: Path,
    out: Path,
    *,
    dtype: str | None = None,
    divisible_by: int = 128,
    tokenizer: str | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write MODEL as a distributed checkpoint of Megatron's GPT, and see that megatron-core computes the same from it.

    Args:
        out: what Megatron-LM's `--load` is to name. The checkpoint in it is a `release`: weights alone, iteration 0.
        dtype: of the weights. Default: bfloat16 for a run in bf16, what a Hugging Face folder has, else float32.
        divisible_by: the embedding gets rows of zeros until this divides their number.
        tokenizer: a folder or a `.model`, or "none". Default: the model's own.

    Raises:
        ValueError: what cannot be said there, or is computed otherwise: then `out` is untouched.
    """
    asked, source, *_ = all_of(
        lambda: dtype_named(dtype),
        lambda: open_model(model),
        lambda: check_free(out, is_megatron_folder, "Megatron", overwrite),
        lambda: _check_divisor(divisible_by),
    )
    architecture = source.architecture()
    arguments = arguments_of(architecture, divisible_by)
    kept = asked or source.dtype
    say(f"{source.folder}: {described(architecture)}, as Megatron's GPT in {name_of(kept)}")
    words = tokenizer_of(source, tokenizer)
    with new_folder(out) as partial:
        _write(partial, source, architecture, arguments, kept)
        tokens = check_tokens(architecture)
        wanted = native_logits(source, tokens, kept)
        found = ask_megatron(MegatronFolder(partial), tokens, ours=True)
        agreement = _judged(found, wanted, source, tokens, kept, say)
        if not agreement.holds:
            raise ValueError(f"megatron-core computes something else from it: {agreement}. {out} is not written.")
        if words is not None:
            (partial / "tokenizer").mkdir()
            write_hugging_face_files(words, partial / "tokenizer")
    say(f"{out}: written; Megatron-LM takes it with --load, and these beside --use-checkpoint-args:")
    say("    " + " ".join(_not_taken_from_checkpoints(arguments)))
    return agreement


def _check_divisor(divisible_by: int) -> None:
    if divisible_by < 1:
        raise ValueError(f"--make-vocab-size-divisible-by {divisible_by} must be at least 1.")


def _write(out: Path, source: Source, architecture: Architecture, arguments: dict[str, Any], kept: torch.dtype) -> None:
    import argparse

    folder, rows = out / RELEASE, arguments["padded_vocab_size"]
    folder.mkdir()
    held, shapes = held_tensors(architecture), parameter_shapes(architecture)
    weights = source.weights(architecture)

    def read(name: str) -> Tensor:
        parts = weights.read(held[name].parts)
        return held[name].pack([parts[part] for part in held[name].parts], rows)

    kinds = {"params_dtype": kept, "bf16": kept == torch.bfloat16, "fp16": kept == torch.float16}
    common = {"args": argparse.Namespace(**arguments, **kinds), "checkpoint_version": 3.0, "iteration": 0}
    write_distributed(folder, {name: one.shape(shapes, rows) for name, one in held.items()}, kept, read, common)
    (out / TRACKER).write_text(RELEASE, encoding="utf-8")


def _judged(found: Tensor, wanted: Tensor, source: Source, tokens: Tensor, kept: torch.dtype, say: Say) -> Agreement:
    agreement = judge(found, wanted, source, tokens, kept)
    say(f"logits of megatron-core's GPTModel, on the CPU, and of Headway: {agreement}")
    return agreement


def _not_taken_from_checkpoints(arguments: dict[str, Any]) -> list[str]:
    """Arguments that Megatron-LM has to be given, since `--use-checkpoint-args` leaves them as they are."""
    flags = [
        f"--norm-epsilon {arguments['norm_epsilon']}",
        f"--make-vocab-size-divisible-by {arguments['make_vocab_size_divisible_by']}",
        "--attention-dropout 0.0 --hidden-dropout 0.0",
    ]
    if arguments["qk_layernorm"]:
        flags.append("--qk-layernorm")
    if arguments["openai_gelu"]:
        flags.append("--openai-gelu")
    if not arguments["swiglu"] and not arguments["bias_gelu_fusion"]:
        flags.append("--no-bias-gelu-fusion")
    return flags


def from_megatron(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write a GPT checkpoint of Megatron as a step folder, and see that it computes what megatron-core computes.

    Pickled content is read as data; nothing in it is run.

    Args:
        folder: what Megatron-LM's `--save` named, or the folder of one iteration in it.
        dtype: of the weights; default: float32, which holds the others exactly.
        tokenizer: a tokenizer to go with it. A checkpoint of Megatron has none.

    Raises:
        ValueError: what cannot be read, or computes something else: then `out` is untouched.
    """
    asked, source, *_ = all_of(
        lambda: dtype_named(dtype),
        lambda: MegatronFolder(folder, tokenizer),
        lambda: check_free(out, lambda path: (path / MANIFEST).is_file(), "step", overwrite),
    )
    architecture = source.architecture()
    kept = asked or torch.float32
    say(f"{source.folder}: GPT, {described(architecture)}, stored in {name_of(source.dtype)}")
    _tell_of_rows(source, say)
    with new_folder(out) as partial:
        write_step_folder(partial, source, architecture, kept)
        tokens = check_tokens(architecture)
        wanted = native_logits(StepFolder(partial), tokens, kept)
        found = ask_megatron(source, tokens, round_to=kept)
        agreement = _judged(found, wanted, StepFolder(partial), tokens, kept, say)
        if not agreement.holds:
            raise ValueError(f"Headway computes something else from the import: {agreement}. {out} is not written.")
    say(f"{out}: written")
    return agreement


def _tell_of_rows(source: MegatronFolder, say: Say) -> None:
    """Say what becomes of rows of the embedding that are no tokens."""
    kept, said = source.tables["model"]["vocab_size"], source.arguments.get("vocab_size")
    if kept < source.rows:
        say(f"{source.rows - kept} rows of zeros after the {kept} tokens are left out")
    elif said and said < kept:
        say(f"{kept - said} rows after the {said} tokens were trained, as padding, and stay: model.vocab_size = {kept}")
