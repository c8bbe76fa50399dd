"""What every layer of the stack has in common: where it stands, how it is initialised, sharded and named outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from model.context import Context
from model.initialisation import Constant, Init, Normal
from model.routing import Balance
from model.towers import LinearTowers

Sharding = Literal["column", "row", "heads", "replicate", "experts"]
"""How a parameter is cut by tensor parallelism: its rows, its columns, its leading (global) head index, not at all,
or one expert a slice."""

CUT_DIMENSION = {"column": 0, "heads": 0, "row": 1, "replicate": None}
"""Along which dimension that is. A linear map's weight is [outputs, inputs]: its outputs, the columns of the map, are
its rows in memory."""

Crossing = Literal["state", "kv", "heads", "none"]
"""What crosses a cut of the sequence: a recurrent state, keys and values, an exchange of heads, or nothing."""


@dataclass(frozen=True)
class Site:
    """Where in the model a layer stands and what it shares with the others. Indices are global.

    Attributes:
        feedforwards: name -> (class, its settings), for feed-forwards that are made of others.
    """

    layer: int
    num_layers: int
    d_model: int
    positions: str = "rope"
    norm_eps: float = 1e-6
    bias: bool = False
    init_std: float = 0.02
    output_init_std: float = 0.02
    feedforwards: Mapping[str, tuple[type[FeedForward], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """Part `part` of the `parts` equal row groups of one matrix in a Hugging Face checkpoint.

    With `per_head` the groups lie inside each of the layer's `num_heads` heads, `[H, parts, d]`, rather than one after
    the other, `[parts, H, d]`.
    """

    name: str
    part: int
    parts: int
    per_head: bool = False


@dataclass(frozen=True)
class Transposed:
    """A matrix that a Hugging Face checkpoint holds as [inputs, outputs] (GPT-2)."""

    name: str


HFName = str | Packed | Transposed


class Layer(nn.Module):
    """A mixer or a feed-forward.

    Attributes:
        Config: the layer's settings, a dataclass; a mixer's has `num_heads`. It may have `faults(d_model)`, sentences
            about settings that cannot be built, `tensor_parallel_units()`, what tp must divide, and
            `sequence_cut_faults(piece, isolate_documents)`, why rows cannot be cut into pieces of so many tokens.
        sharding: parameter (or buffer) name -> how tensor parallelism cuts it. All of them have to be there.
        hf: parameter name -> its name below the layer's prefix in a Hugging Face checkpoint, or a part of one.
        no_decay: names of matrices that weight decay must leave alone. Muon does, too: what has two dimensions but is
            no linear map (angles of each head) is named here.
        output_projection: name of the linear map whose result is the layer's. A layer that is made of others says in
            `output_projections` which of theirs, each weighted token by token, add up to what it gives.
    """

    Config: ClassVar[type]
    sharding: Mapping[str, Sharding] = {}
    hf: ClassVar[Mapping[str, HFName]] = {}
    no_decay: ClassVar[frozenset[str]] = frozenset()
    output_projection: ClassVar[str]

    def __init__(self, config: Any, site: Site):
        super().__init__()
        self.config, self.site = config, site

    @property
    def output_projections(self) -> list[str]:
        """Names of the linear maps whose results add up to what the layer gives."""
        return [self.output_projection]

    @classmethod
    def hf_name(cls, name: str, config: Any) -> HFName | None:
        """What a parameter is called below the layer's prefix in a Hugging Face checkpoint; None: it has no name."""
        return cls.hf.get(name)

    def init_weights(self) -> dict[str, Init]:
        """Initial values of the linear maps directly below: normal weights, zero biases."""
        inits: dict[str, Init] = {}
        for name, child in self.named_children():
            if isinstance(child, nn.Linear):
                std = self.site.output_init_std if name == self.output_projection else self.site.init_std
                inits[f"{name}.weight"] = Normal(std)
                if child.bias is not None:
                    inits[f"{name}.bias"] = Constant(0.0)
        return inits

    def remake_buffers(self) -> None:
        """Compute again what is neither learned nor stored (decay slopes), exactly, where the layer now stands."""

    def _apply(self, fn: Any, recurse: bool = True) -> Layer:
        # A cast to bf16 would round slow decays to no decay at all, and a move off the meta device leaves buffers
        # undefined: whatever happens to the module, they are made again.
        super()._apply(fn, recurse)
        self.remake_buffers()
        return self

    def flops(self, n: int) -> float:
        """Forward matrix-product operations for each token of a sequence of n, 2 per multiply-add."""
        raise NotImplementedError

    def linear_flops(self) -> int:
        """Operations per token of the linear maps directly below."""
        return sum(2 * child.weight.numel() for child in self.children() if isinstance(child, nn.Linear | LinearTowers))


class Mixer(Layer):
    """Maps the residual stream `[B, N, D]` to `[B, N, D]`, mixing along N.

    Attributes:
        context: what crosses a cut of the sequence.
        bidirectional: whether `ctx.causal` may be false.
        has_attention_map: whether it has weights by which a query mixes keys, and shows them to `ctx.observer`.
        full_width_norm: name of a norm over all heads together, if there is one. What it gives reaches the output
            projection through products alone (gates), so that its factor, one number a token, may come after: where
            heads are spread over ranks, no rank has the sum of squares before.
        token_norms: names of norms that look at each token by itself, before it is mixed with others.
        examples: settings under which the conformance suite tries the mixer, for a model of width 32.
    """

    context: ClassVar[Crossing]
    bidirectional: ClassVar[bool] = True
    has_attention_map: ClassVar[bool] = False
    full_width_norm: ClassVar[str | None] = None
    token_norms: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[list[dict[str, Any]]] = [{"num_heads": 4}]
    output_projection = "o"

    @property
    def head_numbers(self) -> list[int]:
        """The number of each of its heads, in the order in which they are kept, of all of them."""
        return list(range(self.config.num_heads))

    @property
    def active_share(self) -> float:
        """Of its heads, the part that a token runs through."""
        return 1.0

    @property
    def balance(self) -> Balance | None:
        """How evenly its units are to be chosen, where it has a router."""
        return None

    def first_seen(self, place: int) -> int:
        """The first token of a document that the causal query at `place` sees."""
        return 0

    def prepare(self, ctx: Context) -> None:
        """Share with the other layers, before the first block, what need not be computed in each of them."""

    def forward(
        self, x: Tensor, ctx: Context, cache: dict[str, Any] | None = None, head_gate: Tensor | None = None
    ) -> Tensor:
        """`[B, N, D]` -> `[B, N, D]`.

        `cache` is what this layer remembers of the tokens before (empty at first; updated in place). `head_gate`,
        `[H]` or `[B, N, H]`, scales each head's contribution to the output projection.
        """
        raise NotImplementedError

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The same map written as its equation, with plain matrix products, in any dtype and at any cost.

        The conformance suite compares `forward` with it and counts its operations.
        """
        raise NotImplementedError


class FeedForward(Layer):
    """Maps each token by itself.

    Attributes:
        examples: settings under which the conformance suite tries a feed-forward that is made of others: the tables
            `[feedforwards.NAME]` of a model of width 32, its own first.
    """

    output_projection = "down"
    examples: ClassVar[list[dict[str, dict[str, Any]]]] = []

    @property
    def balance(self) -> Balance | None:
        """How evenly its experts are to be chosen, where it has a router."""
        return None

    @property
    def by_tower(self) -> dict[int, FeedForward]:
        """The feed-forwards of the modalities; itself, where these are not told apart."""
        return {0: self}

    @property
    def z_loss_weight(self) -> float:
        """What the mean of logsumexp(scores)^2 of its router weighs in the loss."""
        return 0.0

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """`[B, N, D]` -> `[B, N, D]`; as an expert, `[T, D]` -> `[T, D]`, of tokens in any order."""
        raise NotImplementedError


def gate_heads(out_BNHe: Tensor, head_gate: Tensor | None) -> Tensor:
    """Scale each head's output by its gate, `[H]` or `[B, N, H]`; no gate is a gate of 1."""
    return out_BNHe if head_gate is None else out_BNHe * head_gate.to(out_BNHe.dtype).unsqueeze(-1)


def incoming_state(
    ctx: Context, cache: dict[str, Any] | None, own: Callable[[], Tensor], slopes_H: Tensor | None
) -> Tensor | None:
    """The state `[B, H, d, e]` of a recurrent mixer before these tokens; None where nothing came before.

    With a cache, its `state`, cleared where the new tokens open another document. Where the sequence is cut, what the
    pieces before left behind; `own` computes what this piece leaves by itself, and the state shrinks by exp(-slope) a
    token.
    """
    if ctx.cut.size > 1:
        return ctx.cut.states(own(), slopes_H, ctx.positions.shape[1])
    state_BHde = None if cache is None else cache.get("state")
    if state_BHde is None or ctx.documents is None:
        return state_BHde
    assert ctx.previous_documents is not None
    continues_B = ctx.documents[:, 0] == ctx.previous_documents
    return state_BHde * continues_B[:, None, None, None]
