"""Cached decoding of a batch of prompts: greedy, or sampled with temperature and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import Cache
from model.stack import Model


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the likeliest tokens whose probabilities sum to it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def decode(
    model: Model, prompts: list[list[int]], max_tokens: int, sampling: Sampling, *, end_token: int | None = None
) -> list[list[int]]:
    """New token ids for each prompt, at most `max_tokens`, without the end token.

    Prompts of different lengths are padded on the left; the padding is a document of its own, so no layer sees
    across it and a sequence gives what it would give alone.
    """
    device = next(model.parameters()).device
    room = model.architecture.model.max_positions if model.positions is not None else None
    length = max(len(prompt) for prompt in prompts)
    if room is not None and length + max_tokens > room:
        raise ValueError(
            f"{length} prompt tokens and {max_tokens} new ones exceed model.max_positions = {room}: "
            f"ask for at most {max(0, room - length)} new tokens."
        )
    tokens, documents, positions = _padded_left(prompts, device)
    padded = len({len(prompt) for prompt in prompts}) > 1
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = Cache()
    # The head is for the last token alone: over a long prompt the logits of all would outweigh everything else.
    x = model.hidden(tokens, documents=documents if padded else None, positions=positions, cache=cache)
    logits = model.logits(x[:, -1])
    continuations: list[list[int]] = [[] for _ in prompts]
    open_ones = set(range(len(prompts)))
    for _ in range(max_tokens):
        chosen = choose(logits, sampling, generator)
        for index, token in enumerate(chosen.tolist()):
            if token == end_token:
                open_ones.discard(index)
            elif index in open_ones:
                continuations[index].append(token)
        if not open_ones:
            break
        logits = model(chosen[:, None], cache=cache)[:, -1]
    return continuations


def _padded_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, document ids (0: padding, 1: text) and positions (0 at the first token of the text), `[B, N]`."""
    length = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (length - len(p)) + p for p in prompts], dtype=torch.int64, device=device)
    padding = torch.tensor([length - len(p) for p in prompts], device=device)[:, None]
    positions = torch.arange(length, device=device) - padding
    return tokens, (positions >= 0).long(), positions.clamp(min=0)


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token `[B]` for each row of logits."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probabilities = torch.softmax(logits_BV.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # The token that crosses the threshold is kept, so at least one always is.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        ordered = ordered.masked_fill(dropped, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
