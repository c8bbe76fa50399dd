"""Blocks compile whole: one graph each, the same numbers, and nothing anew for another batch size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from model.feedforward.moe import MoE
from model.stack import Model
from parallel.recompute import compile_blocks
from tests.conformance.models import CASES, D_MODEL, VOCAB, built, mixer_class, positions_of, random_documents

FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "swiglu": {"d_ff": 48},
    "sglu": {"d_ff": 48},
    "gelu": {"d_ff": 48},
}
LENGTHS = (16, 24, 40, 56, 64)
KINDS = dict.fromkeys(kind for kind, _ in CASES)


def is_kv(kind: str) -> bool:
    return mixer_class(kind).context == "kv"


class Counted:
    """A backend that counts the graphs it is given; `traced`: and has their backward made beforehand, as inductor."""

    def __init__(self, traced: bool) -> None:
        self.graphs, self.traced = 0, traced

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, example) if self.traced else graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(kind: str, example: int = 0, *, num_layers: int = 1, **feedforwards: dict[str, Any]) -> Model:
    """Layers with this mixer and the first of these feed-forwards, fp64."""
    feedforwards = feedforwards or {"swiglu": FEEDFORWARDS["swiglu"]}
    shape = {"d_model": D_MODEL, "num_layers": num_layers, "vocab_size": VOCAB, "init_std": 0.3}
    return built(
        {
            "model": shape | {"pattern": ["it"], "feedforward_pattern": [next(iter(feedforwards))]},
            "mixers": {"it": {"kind": kind} | mixer_class(kind).examples[example]},
            "feedforwards": feedforwards,
        }
    )


def loss(model: Model, batch_size: int, n: int, documents: bool) -> torch.Tensor:
    """Forward as in training."""
    tokens = torch.randint(VOCAB, (batch_size, n), generator=torch.Generator().manual_seed(n))
    ids = random_documents(batch_size, n) if documents else None
    positions = None if ids is None else positions_of(ids)
    return model(tokens, documents=ids, positions=positions).square().mean()


def compiled(model: Model, traced: bool = True) -> Counted:
    backend = Counted(traced)
    compile_blocks(model, backend=backend)
    return backend


def assert_one_graph(plain: Model, other: Model, documents: bool, traced: bool = True) -> None:
    """One graph and no break, for whatever batch size, and the values and gradients of the eager model."""
    backend = compiled(other, traced)
    for batch_size in (2, 3, 5):
        losses = [loss(model, batch_size, 24, documents) for model in (plain, other)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
        for each in losses:
            each.backward()
        for (name, theirs), ours in zip(plain.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)
        assert not counters["graph_break"], dict(counters["graph_break"])
        assert backend.graphs == 1, f"{backend.graphs} graphs at a batch of {batch_size}"


@pytest.mark.parametrize(
    ("kind", "example", "documents"),
    [
        # Code of states is the larger for documents, and takes long to compile.
        pytest.param(*case, packed, marks=[] if case[1] == 0 and (packed or is_kv(case[0])) else pytest.mark.matrix)
        for case in CASES
        for packed in ((False, True) if case[1] == 0 else (True,))
    ],
)
def test_a_block_is_one_graph_for_any_batch(kind: str, example: int, documents: bool) -> None:
    assert_one_graph(model_of(kind, example), model_of(kind, example), documents, traced=example == 0)


@pytest.mark.parametrize("name", FEEDFORWARDS)
def test_with_every_feedforward_a_block_is_one_graph(name: str) -> None:
    table = {name: FEEDFORWARDS[name]}
    assert_one_graph(model_of("softmax", **table), model_of("softmax", **table), True)


@pytest.mark.parametrize("example", range(3))
def test_experts_break_a_block_at_known_places(example: int) -> None:
    """How many rows each expert has is known on the host alone: there, and nowhere else, the graph is cut."""
    tables = MoE.examples[example]
    plain, other = (model_of("softmax", **tables) for _ in range(2))
    backend = compiled(other)
    losses = [loss(model, 2, 24, True) for model in (plain, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    assert all("MoE._chosen_experts" in reason for reason in counters["graph_break"]), dict(counters["graph_break"])
    assert backend.graphs <= 4


@pytest.mark.parametrize(
    "kind",
    [k if k in ("softmax", "sigmoid") else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS],
)
def test_lengths_compile_a_bounded_number_of_times(kind: str) -> None:
    model = model_of(kind)
    backend = compiled(model)
    for n in LENGTHS:
        loss(model, 2, n, documents=True)
    # Blocks of tokens make other code for lengths that are a multiple of the block.
    assert backend.graphs <= (3 if kind == "diag_block" else 2)


@pytest.mark.parametrize(
    "kind", [k if k in ("softmax", "lightning") else pytest.param(k, marks=pytest.mark.matrix) for k in KINDS]
)
def test_equal_layers_share_code(kind: str) -> None:
    """Four layers: one graph, and another where the first layer alone has something (LRPE)."""
    model = model_of(kind, num_layers=4)
    backend = compiled(model)
    loss(model, 2, 24, True)
    assert backend.graphs <= 2
