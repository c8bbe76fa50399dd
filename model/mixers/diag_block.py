"""DiagBlock: TransNormer's attention inside blocks of a fixed number of tokens; nothing passes from block to block."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context
from model.layer import Mixer, Site, gate_heads
from model.mixers.heads import PROJECTIONS, head_faults, rotation_faults
from model.norms import make_norm
from model.positions import rotary_table, rotate


@dataclass
class DiagBlockConfig:
    """`[mixers.diag_block]`"""

    num_heads: int
    """Heads of queries, keys and values."""
    head_dim: int | None = None
    """Width of a head. Default: model.d_model / num_heads."""
    block: int = 64
    """Tokens in a block, counted from the start of the document; the last block of a document may be shorter."""
    activation: Literal["softmax", "relu"] = "softmax"
    """What makes weights of scores: softmax in TransNormer T2; relu, without a sum to divide by, in T1."""
    norm: Literal["none", "srmsnorm"] = "none"
    """The norm over all heads together: none in T2, srmsnorm in T1."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies, where model.positions = "rope"."""

    def faults(self, d_model: int) -> list[str]:
        """Why these settings cannot be built, in sentences."""
        faults = head_faults(d_model, self.num_heads, head_dim=self.head_dim)
        faults += rotation_faults(d_model, self.num_heads, self.head_dim)
        if self.block < 1:
            faults.append(f"block = {self.block} must be at least 1, the token itself; 64 is usual.")
        if self.rope_theta <= 0:
            faults.append(f"rope_theta = {self.rope_theta} must be above 0: 10000 is usual.")
        return faults

    def tensor_parallel_units(self) -> dict[str, int]:
        """What tp must divide."""
        return {"num_heads": self.num_heads}

    def sequence_cut_faults(self, piece: int, isolate_documents: bool) -> list[str]:
        """Why rows cannot be cut into pieces of so many tokens: a cut would fall into a block."""
        faults = []
        if piece % self.block:
            faults.append(
                f"data.seq_len / cp = {piece} tokens are no multiple of block = {self.block}, so a cut falls into a "
                f"block: the nearest seq_len / cp is {max(1, round(piece / self.block)) * self.block}."
            )
        if isolate_documents:
            faults.append(
                "blocks are counted from the beginning of a document, and documents begin anywhere, so a cut falls "
                "into a block: take data.isolate_documents = false, or cp = 1."
            )
        return faults


class DiagBlock(Mixer):
    """weights(Q K^T / sqrt(d)) V among the tokens of one block; y = W_o Norm(O), or W_o O.

    DiagAttention of TransNormer, arXiv 2210.10340, section 4. A token at position p of its document sees those whose
    position divided by `block` is the same number, itself included, and where `ctx.causal`, none after it. So the cost
    of a token does not grow with the length, and no more than block - 1 tokens are remembered in decoding.

    Nothing has to cross a cut of the sequence as long as every cut falls between two blocks: on a multiple of `block`
    where a row is one document, and in general where a document begins or a multiple of `block` away from there.
    """

    Config = DiagBlockConfig
    context = "none"
    full_width_norm = "norm"
    examples = [
        {"num_heads": 4, "block": 6},
        {"num_heads": 16, "head_dim": 4, "block": 16, "activation": "relu", "norm": "srmsnorm"},
        {"num_heads": 2, "head_dim": 6},
    ]
    sharding = PROJECTIONS
    hf = {f"{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")}

    def __init__(self, config: DiagBlockConfig, site: Site):
        super().__init__(config, site)
        self.head_dim = config.head_dim or site.d_model // config.num_heads
        width = config.num_heads * self.head_dim
        self.q = nn.Linear(site.d_model, width, bias=site.bias)
        self.k = nn.Linear(site.d_model, width, bias=site.bias)
        self.v = nn.Linear(site.d_model, width, bias=site.bias)
        self.o = nn.Linear(width, site.d_model, bias=site.bias)
        self.norm = nn.Identity() if config.norm == "none" else make_norm(config.norm, width, site.norm_eps)
        self._rotary: Hashable = ("rotary", self.head_dim, config.rope_theta) if site.positions == "rope" else None
        self._windows: Hashable = ("block windows", config.block)

    def prepare(self, ctx: Context) -> None:
        if self._rotary:
            ctx.share(self._rotary, lambda: rotary_table(ctx.positions, self.head_dim, self.config.rope_theta))
        ctx.share(self._windows, lambda: block_windows(ctx, self.config.block))

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        n = x.shape[1]
        q_BNHd, k_BNHd, v_BNHd = self._project(x, ctx)
        k_BMHd, v_BMHd = self._with_remembered(cache, k_BNHd, v_BNHd)
        windows: BlockWindows = ctx.shared[self._windows]
        folded = windows.of_queries(q_BNHd), windows.of_keys(k_BMHd, n), windows.of_keys(v_BMHd, n)
        # To the attention, windows are rows of a batch.
        q_RHCd, k_RHLd, v_RHLd = (t.flatten(0, 1).transpose(1, 2) for t in folded)
        out_RHCd = self._attend(q_RHCd, k_RHLd, v_RHLd, windows)
        out_BNHd = out_RHCd.transpose(1, 2).unflatten(0, (x.shape[0], -1)).flatten(1, 2)[:, :n]
        normed_BNHd = self.norm(out_BNHd.flatten(2)).unflatten(-1, (-1, self.head_dim))
        return self.o(gate_heads(normed_BNHd, head_gate).flatten(2))

    def _attend(self, q_RHCd: Tensor, k_RHLd: Tensor, v_RHLd: Tensor, windows: BlockWindows) -> Tensor:
        """Attention in every window by itself, `[R, H, C, d]`."""
        mask = None if windows.mask is None else windows.mask.flatten(0, 1).unsqueeze(1)
        if self.config.activation == "softmax":
            return F.scaled_dot_product_attention(q_RHCd, k_RHLd, v_RHLd, attn_mask=mask, is_causal=windows.is_causal)
        weights_RHCL = torch.relu(q_RHCd @ k_RHLd.mT * self.head_dim**-0.5)
        if mask is not None:
            weights_RHCL = weights_RHCL.masked_fill(~mask, 0)
        elif windows.is_causal:
            weights_RHCL = weights_RHCL.tril()
        return weights_RHCL @ v_RHLd

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        q_BNHd, k_BNHd, v_BNHd = self._project(x, ctx)
        scores_BHNM = torch.einsum("bnhd,bmhd->bhnm", q_BNHd, k_BNHd) / self.head_dim**0.5
        block_BN = ctx.positions // self.config.block
        seen_BNM = block_BN[:, :, None] == block_BN[:, None, :]
        if ctx.documents is not None:
            seen_BNM = seen_BNM & (ctx.documents[:, :, None] == ctx.documents[:, None, :])
        if ctx.causal:
            seen_BNM = seen_BNM.tril()
        if self.config.activation == "softmax":
            weights_BHNM = scores_BHNM.masked_fill(~seen_BNM[:, None], -torch.inf).softmax(-1)
        else:
            weights_BHNM = scores_BHNM.masked_fill(~seen_BNM[:, None], 0).relu()
        wide = torch.einsum("bhnm,bmhd->bnhd", weights_BHNM, v_BNHd).flatten(2)
        if self.config.norm == "srmsnorm":
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.site.norm_eps)
        return self.o(wide)

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, N, H, d]`, queries and keys rotated.

        Angles are those of the document, not of the block: a rotation tells distances only, so it is the same.
        """
        q_BNHd, k_BNHd, v_BNHd = (m(x).unflatten(-1, (-1, self.head_dim)) for m in (self.q, self.k, self.v))
        if self._rotary:
            q_BNHd, k_BNHd = (rotate(t, ctx.shared[self._rotary]) for t in (q_BNHd, k_BNHd))
        return q_BNHd, k_BNHd, v_BNHd

    def _with_remembered(self, cache: dict[str, Any] | None, k_BNHd: Tensor, v_BNHd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values behind the cached ones; no more of them are kept than a block to come may still see."""
        if cache is None:
            return k_BNHd, v_BNHd
        found = []
        for name, new in (("k", k_BNHd), ("v", v_BNHd)):
            whole = torch.cat((cache[name], new), dim=1) if name in cache else new
            # A copy: a view would keep all that was ever prefilled.
            cache[name] = whole[:, max(0, whole.shape[1] - (self.config.block - 1)) :].clone()
            found.append(whole)
        return found[0], found[1]

    def first_seen(self, place: int) -> int:
        """The first token of a document that a causal query at `place` in it sees."""
        return place - place % self.config.block

    def flops(self, n: int) -> float:
        # On the mean over the queries, each counting itself by half; the last block may be shorter.
        whole, rest = divmod(n, self.config.block)
        keys = (whole * self.config.block**2 + rest**2) / 2 / n
        return self.linear_flops() + 4 * keys * self.config.num_heads * self.head_dim


class BlockWindows(NamedTuple):
    """How a sequence is folded, so that a query is multiplied with the keys around it only.

    N queries make T windows of `size` C. With a window go its own keys and `before` and `after` more to its left and
    right, L together. `mask` says which of them a query sees, bool `[B, T, C, L]`; None where `is_causal` says it all.
    """

    size: int
    before: int
    after: int
    mask: Tensor | None
    is_causal: bool

    def of_queries(self, x_BN: Tensor, filler: int = 0) -> Tensor:
        """`[B, N, ...]` -> `[B, T, C, ...]`; the filler is what stands behind the end."""
        return _lengthened(x_BN, 0, -x_BN.shape[1] % self.size, filler).unflatten(1, (-1, self.size))

    def of_keys(self, x_BM: Tensor, n: int, filler: int = 0) -> Tensor:
        """`[B, M, ...]`, of the n tokens that are queries and M - n cached ones before them -> `[B, T, L, ...]`."""
        left, right = self.before - (x_BM.shape[1] - n), -n % self.size + self.after
        whole = _lengthened(x_BM, left, right, filler)
        return whole.unfold(1, self.before + self.size + self.after, self.size).movedim(-1, 2)


def _lengthened(x_BN: Tensor, left: int, right: int, filler: int) -> Tensor:
    """Lengthen along dimension 1."""
    return F.pad(x_BN, (0, 0) * (x_BN.dim() - 2) + (left, right), value=filler)


def block_windows(ctx: Context, block: int) -> BlockWindows:
    """How these N tokens are folded.

    Decided outside of the layers, once, since inside compiled ones N may be symbolic. Where every block is a window, as
    in rows that are one document each, a window needs its own keys alone. Where documents begin anywhere, or cached
    tokens went before, a block may straddle two windows: then the keys of the window before (and, looking both ways,
    of the one after) go with it, under a mask.
    """
    n = ctx.positions.shape[1]
    size = min(block, n)
    # Where the sequence is cut, tokens before these are no keys: cuts fall between blocks.
    cached = 0 if ctx.cut.size > 1 else min(ctx.first_index, block - 1)
    places_N = torch.arange(n, device=ctx.positions.device)
    # Without a mask, what only fills the last window has to lie behind what sees it. Whether blocks are windows is told
    # by values, and a GPU waits for that; where documents are told apart they hardly ever are, and nobody asks.
    maskless = ctx.documents is None and not cached and (ctx.causal or n % size == 0)
    if maskless and bool((ctx.positions % block == places_N % block).all()):
        return BlockWindows(size, 0, 0, None, ctx.causal)
    before, after = (block, 0 if ctx.causal else block) if n > block else (cached, 0)
    windows = BlockWindows(size, before, after, None, False)
    return windows._replace(mask=_seen_in_block(ctx, block, windows, cached))


def _seen_in_block(ctx: Context, block: int, windows: BlockWindows, cached: int) -> Tensor:
    """Which keys each query sees, bool `[B, T, C, L]`: those of its own block.

    A block goes by the place where it begins, counted from the first query (so it is negative where the block began
    among the cached tokens). What only fills windows stands at place n, and sees itself: a softmax over nothing would
    be no number.
    """
    n = ctx.positions.shape[1]
    places_N = torch.arange(n, device=ctx.positions.device)
    begins_BN = places_N - ctx.positions % block
    begins_BTC1 = windows.of_queries(begins_BN, filler=n)[..., None]
    if ctx.causal:
        keys_M = torch.arange(-cached, n, device=ctx.positions.device)
        keys_1T1L = windows.of_keys(keys_M[None], n, filler=n)[:, :, None]
        queries_1TC1 = windows.of_queries(places_N[None], filler=n)[..., None]
        seen = (keys_1T1L >= begins_BTC1) & (keys_1T1L <= queries_1TC1)
    else:
        seen = windows.of_keys(begins_BN, n, filler=n)[:, :, None] == begins_BTC1
    if ctx.documents is not None:
        documents_BM = ctx.documents
        if cached and ctx.key_documents is not None:
            documents_BM = ctx.key_documents[:, -(cached + n) :]
        of_keys_BT1L = windows.of_keys(documents_BM, n, filler=-1)[:, :, None]
        seen = seen & (of_keys_BT1L == windows.of_queries(ctx.documents, filler=-1)[..., None])
    return seen
