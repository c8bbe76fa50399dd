"""`headway generate MODEL --prompt TEXT`"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Arguments:
    """Continue prompts with cached decoding."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A run folder, a step folder or a Hugging Face folder."""
    prompt: list[str] = field(default_factory=lambda: [""])
    """One or more texts, decoded together as a batch."""
    max_tokens: int = 200
    """New tokens for each prompt, unless the end token comes first."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy); above, samples."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities sum to this."""
    seed: int = 0
    """Of the samples."""
    tokenizer: Path | None = None
    """Default: the one in the checkpoint."""
    allow_code: bool = False
    """Import layer classes that the checkpoint's configuration names by path."""


def generate(argv: list[str]) -> int:
    """Print each prompt with its continuation; returns the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="headway generate", config=(tyro.conf.FlagCreatePairsOff,))
    from model.decoding import Sampling, decode
    from model.hf.loading import load_source
    from model.hf.source import open_model
    from trainer.data.parts import readable
    from trainer.data.tokenizer import load_tokenizer

    faults = [
        sentence
        for wrong, sentence in (
            (arguments.max_tokens < 1, f"--max-tokens {arguments.max_tokens} must be at least 1."),
            (arguments.temperature < 0, f"--temperature {arguments.temperature} must not be negative."),
            (not 0 < arguments.top_p <= 1, f"--top-p {arguments.top_p} must lie in (0, 1]."),
        )
        if wrong
    ]
    if faults:
        raise ValueError(" ".join(faults))
    source = open_model(arguments.model)
    words = arguments.tokenizer or source.tokenizer
    if words is None:
        raise ValueError(f"{source.folder} has no tokenizer with it: give --tokenizer.")
    tokenizer = load_tokenizer(words)
    model = load_source(source, allow_code=arguments.allow_code)
    # A model has learned that every document follows the end of another: an empty prompt starts there.
    prompts = [tokenizer.encode(text) or [tokenizer.end_token] for text in arguments.prompt]
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    continuations = decode(model, prompts, arguments.max_tokens, sampling, end_token=tokenizer.end_token)
    for index, (prompt, ids) in enumerate(zip(arguments.prompt, continuations, strict=True)):
        if index:
            print("-" * 40)
        print(prompt + readable(tokenizer, ids))
    return 0
