"""A dense model made into another one, as a Hugging Face folder: written weight by weight, then compared with what it
was made of. Nothing gets its name before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import Architecture
from model.files import new_folder
from model.hf.check import Agreement, check_tokens, compare, native_logits
from model.hf.export import write_folder
from model.hf.formats import choose_format
from model.hf.formats.format import Format
from model.hf.source import HuggingFaceFolder, Source, Weights
from trainer.convert import Say, complete_and_compare, described, facts_of, name_of, open_to_write, tokenizer_of

SAME = 1e-5
"""Logits are those of the source but for this part of the largest. Both are computed by us in fp32, from weights
rounded alike."""


@dataclass(frozen=True)
class Change:
    """What a model is to become.

    Attributes:
        architecture: of the result.
        weights: those of the result, from those of the model.
        words: what is said of it behind its size, by the format it is written in.
        said: how the comparison with the model is told.
        logits: of the result, which are to be the model's for tokens that the model knows.
        tolerance: how far they may be from them.
    """

    architecture: Architecture
    weights: Callable[[Weights], Weights]
    words: Callable[[Format], str]
    said: Callable[[Agreement], str]
    logits: Callable[[Source, Tensor, torch.dtype], Tensor] = native_logits
    tolerance: float = SAME


def remake(
    model: Path,
    out: Path,
    change_of: Callable[[Architecture], Change],
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    form: str | None = "headway",
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write MODEL, changed, as a Hugging Face folder.

    Two things are checked: that logits are still those of the model, as far as the change says; and that transformers
    computes from the folder what Headway does. For these the result is in memory once.

    Args:
        change_of: the change, from the model's architecture. Raises ValueError with every reason why it cannot be.
        dtype: of the weights. Default: bfloat16 for a run in bf16, what a Hugging Face folder has, else float32.
        form: the kind of checkpoint (`mixtral`, `headway`); None: the first that can say all of the result.
        say: told how it goes, in lines.

    Returns:
        How far logits are from the model's.

    Raises:
        ValueError: what cannot be made, or computes something else: then `out` is untouched.
    """
    limit, asked, source = open_to_write(model, out, dtype, max_shard_size, overwrite)
    before = source.architecture()
    change = change_of(before)
    after = change.architecture
    kept, layout, words = asked or source.dtype, choose_format(after, form), tokenizer_of(source, None)
    say(f"{source.folder}: {described(before)} in {name_of(kept)}")
    say(f"{out}: {described(after)}{change.words(layout)}")
    with new_folder(out) as partial:
        weights = change.weights(source.weights(before))
        write_folder(partial, weights, after, layout, facts_of(source, words), dtype=kept, max_shard_bytes=limit)
        made, tokens = HuggingFaceFolder(partial), check_tokens(before)
        # There may be ids that the model does not know.
        found = change.logits(made, tokens, kept)[..., : before.model.vocab_size]
        same = replace(compare(found, native_logits(source, tokens, kept)), tolerance=change.tolerance)
        say(change.said(same))
        if not same.holds:
            raise ValueError(f"it computes something else than {source.folder}: {same}. {out} is not written.")
        complete_and_compare(partial, out, made, after, words, kept, say=say)
    say(f"{out}: written")
    return same
