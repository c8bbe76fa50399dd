"""The stack: embedding, blocks, final norm, head. Single-device code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped import Groups
from model.cache import Cache
from model.config import Architecture
from model.context import Context, WholeHeads, WholeSequence
from model.dispatch import WholeExperts
from model.initialisation import Init, Normal
from model.norms import make_norm
from model.observer import Observer
from model.towers import Current
from model.untied import make_feedforward, untie_mixer, untie_norm


class Block(nn.Module):
    """One mixer and one feed-forward around the residual stream."""

    def __init__(self, architecture: Architecture, layer: int):
        super().__init__()
        m = architecture.model
        site = architecture.site(layer)
        mixer_name, feedforward_name = architecture.mixer_names[layer], architecture.feedforward_names[layer]
        mixer_class, mixer_config = architecture.mixers[mixer_name]
        self.layer = layer
        self.residual, self.norm_position = m.residual, m.norm_position
        self.mixer_factors = m.factors(mixer_name)
        self.feedforward_factors = m.factors(feedforward_name)
        # Whose the tokens of the residual stream are, for norms that each modality has for itself.
        self.current = Current()
        self.mixer_norm = self._norm(architecture)
        self.mixer = mixer_class(mixer_config, site)
        untie_mixer(self.mixer, architecture)
        # A mixer whose outputs may grow large can ask for a norm on them (arXiv 2409.04431).
        hybrid = getattr(mixer_config, "hybrid_norm", False)
        self.mixer_out_norm = self._norm(architecture) if hybrid else nn.Identity()
        # In parallel both read the same normalised input.
        one_norm = m.residual == "parallel"
        self.feedforward_norm = nn.Identity() if one_norm else self._norm(architecture)
        self.feedforward = make_feedforward(architecture, layer, site)

    def _norm(self, architecture: Architecture) -> nn.Module:
        m = architecture.model
        return untie_norm(make_norm(m.norm, m.d_model, m.norm_eps), architecture, self.current)

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        if ctx.observer is not None:
            ctx.observer.residual(self.layer, x)
        self.current.begin(ctx.stream_groups)
        if self.norm_position == "sandwich_out":
            # Only what is added is normed (arXiv 2411.04996, Alg. 1).
            x = x + self.mixer_norm(self.mixer_out_norm(self.mixer(x, ctx, cache, head_gate)))
            return x + self.feedforward_norm(self.feedforward(x, ctx))
        normed = self.mixer_norm(x)
        mixed = self.mixer_out_norm(self.mixer(normed, ctx, cache, head_gate))
        if self.residual == "parallel":
            return x + mixed + self.feedforward(normed, ctx)
        if self.residual == "normalised":
            # What is carried on is the normed input: nothing reaches the next block around a norm (MiniMax-01,
            # arXiv 2501.08313).
            kept, added = self.mixer_factors
            normed = self.feedforward_norm(kept * normed + added * mixed)
            kept, added = self.feedforward_factors
            return kept * normed + added * self.feedforward(normed, ctx)
        x = x + mixed
        return x + self.feedforward(self.feedforward_norm(x), ctx)


class Model(nn.Module):
    """A decoder (or, with `causal=False`, an encoder) over tokens.

    `model(tokens [B, N]) -> logits [B, N, vocab]`. Parameter names are global: `layers.17.mixer.q.weight`.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        m = architecture.model
        self.architecture = architecture
        self.embedding = nn.Embedding(m.vocab_size, m.d_model)
        self.positions = nn.Embedding(m.max_positions, m.d_model) if m.positions == "learned" else None
        self.layers = nn.ModuleDict({str(layer): Block(architecture, layer) for layer in range(m.num_layers)})
        self.final_norm = make_norm(m.norm, m.d_model, m.norm_eps)
        self.head = None if m.tie_embeddings else nn.Linear(m.d_model, m.vocab_size, bias=False)
        self.embedding_scale = math.sqrt(m.d_model) if m.embedding_scale == "sqrt" else m.embedding_scale
        # Whoever spreads the sequence over processes puts another in its place.
        self.cut = WholeSequence()
        # Whoever spreads the heads, or the experts.
        self.heads = WholeHeads()
        self.experts = WholeExperts()
        # Whoever wants to see what happens inside of the blocks.
        self.observer: Observer | None = None

    def forward(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        causal: bool = True,
        head_gates: dict[int, Tensor] | None = None,
        modalities: Tensor | None = None,
        head_loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, N, vocab]` in the dtype of the weights.

        Args:
            tokens: int64 `[B, N]`; where the sequence is cut, a piece of it.
            documents: ids `[B, N]`, non-decreasing along N; attention and states stop at a change. Default: one.
                Of whole rows, also where the sequence is cut: what crosses a cut depends on them.
            positions: `[B, N]`, of the tokens. Default: from 0, or from where the cache stands, or the piece.
            cache: what was consumed before; updated in place.
            head_gates: layer index -> a factor `[H]` or `[B, N, H]` for each head's contribution.
            modalities: int64 `[B, N]`, of the tokens, where each modality has weights of its own. Default: as their
                ids say.
            head_loss: what to return in place of logits, made of the normed stream `[B, N, D]` and the head's weight
                `[vocab, D]`. It is called in here, where whoever gathers parameters has gathered them.

        Raises:
            ValueError: modalities are not given, and ids do not say.
        """
        x = self.hidden(tokens, documents, positions, cache, causal, head_gates, modalities)
        if head_loss is not None:
            return head_loss(self.final_norm(x), self.embedding.weight if self.head is None else self.head.weight)
        return self.logits(x)

    def hidden(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        causal: bool = True,
        head_gates: dict[int, Tensor] | None = None,
        modalities: Tensor | None = None,
    ) -> Tensor:
        """The residual stream `[B, N, D]` after the last block; `forward` is `logits(hidden(...))`."""
        ctx = self.context(tokens, documents, positions, cache, causal, self.modalities_of(tokens, modalities))
        ctx.head_gates = head_gates or {}
        x = self.embed(tokens, ctx)
        for block in self.layers.values():
            remembered = None if cache is None else cache.layer(block.layer)
            x = block(x, ctx, remembered, ctx.head_gates.get(block.layer))
        return x

    def context(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        causal: bool = True,
        modalities: Tensor | None = None,
    ) -> Context:
        """What the layers are told beside their input; what several of them need is computed here, once."""
        batch_size, n = tokens.shape
        steps = torch.arange(n, device=tokens.device)
        if cache is None:
            first = self.cut.before(n)
            ctx = Context(
                positions=(steps + first).expand(batch_size, n) if positions is None else positions,
                documents=None if documents is None else self.cut.piece(documents),
                causal=causal,
                cut=self.cut.over(documents),
                key_documents=documents,
                first_index=first,
            )
        else:
            ctx = self._cached_context(steps, batch_size, documents, positions, cache)
        ctx.observer, ctx.heads, ctx.experts = self.observer, self.heads, self.experts
        untie = self.architecture.untied
        if modalities is not None and untie is not None:
            self._group(ctx, modalities, untie.modalities)
        if not causal:
            self._check_bidirectional()
        for block in self.layers.values():
            block.mixer.prepare(ctx)
        return ctx

    def modalities_of(self, tokens: Tensor, given: Tensor | None = None) -> Tensor | None:
        """Of which modality tokens are: as given, or as their ids say. None where no weights go by it.

        Raises:
            ValueError: neither says.
        """
        untie = self.architecture.untied
        if untie is None:
            return None
        if given is not None:
            return given
        if untie.by_ids:
            return untie.of_tokens(tokens)
        raise ValueError(
            f"this model has weights for each of {untie.modalities} modalities, and ids do not say which one a token "
            "is of (untie.ranges is empty): give `modalities` [B, N] with the tokens."
        )

    def _group(self, ctx: Context, modalities: Tensor, count: int) -> None:
        """Sort the tokens by modality, for all layers at once."""
        ctx.modalities, ctx.groups = modalities, Groups(modalities, count)
        here = self.heads.stream_piece(modalities)
        ctx.stream_groups = ctx.groups if here is modalities else Groups(here, count)

    def _cached_context(
        self, steps: Tensor, batch_size: int, documents: Tensor | None, positions: Tensor | None, cache: Cache
    ) -> Context:
        previous = cache.last_documents(batch_size, steps.device)
        first_index = cache.num_tokens
        cache.isolated = cache.isolated or documents is not None
        if documents is None:
            documents = previous[:, None].expand(batch_size, len(steps))
        if positions is None:
            start = 0 if cache.lengths is None else cache.lengths[:, None]
            positions = (steps + start).expand(batch_size, len(steps))
        cache.advance(positions, documents)
        return Context(
            positions=positions,
            documents=documents if cache.isolated else None,
            key_documents=cache.documents,
            first_index=first_index,
            previous_documents=previous,
        )

    def embed(self, tokens: Tensor, ctx: Context) -> Tensor:
        """`[B, N]` -> `[B, N, D]`."""
        x = self.embedding(tokens)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        return x if self.positions is None else x + self.positions(ctx.positions)

    def logits(self, x: Tensor) -> Tensor:
        """`[B, N, D]` -> `[B, N, vocab]`."""
        x = self.final_norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def init_weights(self) -> dict[str, Init]:
        """Initial values of the parameters that belong to no layer."""
        std = Normal(self.architecture.model.init_std)
        inits: dict[str, Init] = {"embedding.weight": std}
        if self.positions is not None:
            inits["positions.weight"] = std
        if self.head is not None:
            inits["head.weight"] = std
        return inits

    def flops(self, n: int) -> float:
        """Forward matrix-product operations per token of a sequence of n: the layers and the head."""
        m = self.architecture.model
        layers = sum(block.mixer.flops(n) + block.feedforward.flops(n) for block in self.layers.values())
        return layers + 2 * m.d_model * m.vocab_size

    def _check_bidirectional(self) -> None:
        one_way = sorted({type(b.mixer).__name__ for b in self.layers.values() if not b.mixer.bidirectional})
        if one_way:
            raise ValueError(
                f"causal = False, but {', '.join(one_way)} can only look back; softmax layers look both ways."
            )


def undecayed_names(model: nn.Module) -> set[str]:
    """Full names of the matrices that weight decay must leave alone, as their layers declare."""
    return {f"{prefix}.{name}" for prefix, module in model.named_modules() for name in getattr(module, "no_decay", ())}
