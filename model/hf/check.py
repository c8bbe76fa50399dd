"""The proof that goes with every conversion: transformers and Headway compute the same logits from the two folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import Architecture
from model.hf.bundle import FLOORS
from model.hf.loading import load_source
from model.hf.source import Source

TOLERANCE, UTMOST = 1e-4, 1e-3
"""Largest difference of two logits, as a part of the largest logit. In fp32 rounding leaves some 1e-6 of it, and the
smallest mix-up of weights some 1e-2. A model in which rounding alone leaves more is given ten times what it leaves
between our own fp32 and fp64, and never more than the utmost."""

TEXTS = [
    "It is  a  truth\tuniversally\n\n   acknowledged ",
    "in 1813, 3.14159 and 007 of 1,000,000",
    "naïve café – «δοκιμή» 日本語 🙂👩‍🚀🇺🇳",
    " \u00a0x\u200by </s> <|endoftext|> [UNK] ▁",
]
"""Odd spaces, digits, letters of many kinds, emoji, and what looks like special tokens."""


@dataclass(frozen=True)
class Answer:
    """What transformers made of a folder: logits `[B, N, vocab]` in fp32, and the ids of the texts, if asked for."""

    logits: Tensor
    ids: list[list[int]] | None


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits differ. `error` as a part of `largest`, the largest logit."""

    error: float
    largest: float
    same_choice: float
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (
            f"largest difference {self.error:.1e} of the largest logit {self.largest:.3g} "
            f"(tolerance {self.tolerance:.0e}), same likeliest token at {self.same_choice:.1%} of places"
        )


def check_tokens(architecture: Architecture, n: int = 96) -> Tensor:
    """Token ids `[2, n]` that visit the vocabulary in no order; the same for the same model."""
    m = architecture.model
    n = min(n, m.max_positions or n)
    return torch.randint(m.vocab_size, (2, n), generator=torch.Generator().manual_seed(0))


def check_modalities(architecture: Architecture, tokens: Tensor) -> Tensor | None:
    """Of which modalities these are to be, in turn, for a model whose ids do not say; None for any other."""
    untie = architecture.untied
    return None if untie is None or untie.by_ids else tokens % untie.modalities


def native_logits(
    source: Source,
    tokens: Tensor,
    dtype: torch.dtype,
    *,
    precision: torch.dtype = torch.float32,
    allow_code: bool = False,
) -> Tensor:
    """Logits, computed in `precision`, of a model whose weights were rounded to `dtype`. It is in memory only here."""
    model = load_source(source, dtype=dtype, allow_code=allow_code).to(precision)
    with torch.no_grad():
        return model(tokens, modalities=check_modalities(model.architecture, tokens))


def ask_transformers(
    folder: Path,
    tokens: Tensor,
    *,
    trust: bool,
    modalities: Tensor | None = None,
    texts: list[str] | None = None,
    round_to: torch.dtype | None = None,
    wide: tuple[str, ...] = (),
    packages: frozenset[str] = frozenset(),
) -> Answer:
    """Load a folder in a process of its own, where neither Headway nor `packages` can be imported.

    Args:
        trust: whether code in the folder may be run: only what we have written there ourselves.
        modalities: of the tokens, for a class that takes them.
        texts: to be tokenized.
        round_to: weights are rounded to this before they compute in fp32.
        wide: endings of the names of those that are not.

    Raises:
        ValueError: it cannot be loaded, with the last line of what was said.
    """
    with tempfile.TemporaryDirectory() as temporary:
        request, answer = Path(temporary) / "request.json", Path(temporary) / "answer.safetensors"
        content = {
            "folder": str(folder.resolve()),
            "tokens": tokens.tolist(),
            "modalities": None if modalities is None else modalities.tolist(),
            "texts": texts,
            "trust": trust,
            "round_to": None if round_to is None else str(round_to).removeprefix("torch."),
            "wide": list(wide),
            "blocked": sorted(FLOORS | packages),
        }
        request.write_text(json.dumps(content), encoding="utf-8")
        # Code of the export is unpacked beside the answer, not in the user's cache.
        environment = os.environ | {"HF_MODULES_CACHE": temporary, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        command = [sys.executable, "-P", str(Path(__file__).with_name("probe.py")), str(request), str(answer)]
        done = subprocess.run(
            command,
            env=environment,
            cwd=temporary,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise ValueError(f"transformers cannot load {folder}: {said[-1]}")
        with safe_open(answer, framework="pt") as file:
            return Answer(file.get_tensor("logits"), json.loads(file.metadata()["ids"]))


def compare(found: Tensor, wanted: Tensor) -> Agreement:
    """How far logits differ; those of another shape, or that are no numbers, differ without end."""
    if found.shape != wanted.shape or not (found.isfinite().all() and wanted.isfinite().all()):
        return Agreement(float("inf"), float("nan"), 0.0)
    largest = wanted.abs().max().item()
    error = (found - wanted).abs().max().item() / max(largest, 1e-30)
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    return Agreement(error, largest, same)


def judge(
    theirs: Tensor, ours: Tensor, source: Source, tokens: Tensor, dtype: torch.dtype, *, allow_code: bool = False
) -> Agreement:
    """How far the logits of transformers are from ours, which are those of `source` in fp32.

    Where they are farther than rounding leaves in most models, it is measured what rounding leaves in this one.
    """
    agreement = compare(theirs, ours)
    if agreement.holds or not agreement.error <= UTMOST:
        return agreement
    exact = native_logits(source, tokens, dtype, precision=torch.float64, allow_code=allow_code)
    rounding = compare(ours.double(), exact).error
    return replace(agreement, tolerance=min(UTMOST, max(TOLERANCE, 10 * rounding)))
