"""TransNormer (2022): its two mixers against their equations, written out here once more and densely, in fp64."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.cache import Cache
from model.context import Context
from model.decoding import Sampling, decode
from model.layer import Mixer, Site
from model.mixers.diag_block import DiagBlock, DiagBlockConfig, block_windows
from model.mixers.norm_linear import NormLinear, NormLinearConfig, unit_vector
from model.settings import build_architecture
from model.stack import Model, undecayed_names
from parallel.data import initialise
from tests.conformance.layouts import kept_wide
from tests.conformance.models import positions_of, random_documents
from tests.pool import Pool
from trainer.config import load_config

D, HEADS, DIM, EPS = 24, 4, 6, 1e-6
T1 = {"diag_block": {"activation": "relu", "norm": "srmsnorm"}, "norm_linear": {"activation": "elu"}}
T2: dict[str, dict[str, Any]] = {"diag_block": {}, "norm_linear": {}}
both = pytest.mark.parametrize("variant", [T1, T2], ids=["T1", "T2"])


def randomised(mixer: Mixer) -> Any:
    """In fp64, with numbers of its own in every parameter, biases and angles included."""
    with torch.no_grad():
        for parameter in mixer.double().parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return mixer


def site(layer: int = 2, **changes: Any) -> Site:
    return replace(Site(layer=layer, num_layers=6, d_model=D, norm_eps=EPS, bias=True), **changes)


def norm_linear(where: Site | None = None, **settings: Any) -> Any:
    return randomised(NormLinear(NormLinearConfig(num_heads=HEADS, **settings), where or site()))


def diag_block(where: Site | None = None, **settings: Any) -> Any:
    return randomised(DiagBlock(DiagBlockConfig(num_heads=HEADS, **settings), where or site()))


def run(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    mixer.prepare(ctx)
    return mixer(x, ctx)


def one_document(n: int, batch_size: int = 1, offset: int = 0) -> Context:
    return Context(positions=torch.arange(n).expand(batch_size, n) + offset)


def packed(n: int, batch_size: int = 2) -> Context:
    documents = random_documents(batch_size, n)
    return Context(positions=positions_of(documents), documents=documents)


def head(linear: torch.nn.Linear, x: Tensor, index: int, width: int = DIM) -> Tensor:
    """One head's part of a projection."""
    rows = slice(index * width, (index + 1) * width)
    return x @ linear.weight[rows].T + linear.bias[rows]


def srmsnorm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rotation_matrix(angles: Tensor) -> Tensor:
    """`[d, d]`, acting on columns, that turns the plane of channels (j, j + d/2) by angle j."""
    half = len(angles)
    matrix = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for j, angle in enumerate(angles.tolist()):
        matrix[j, j] = matrix[half + j, half + j] = math.cos(angle)
        matrix[j, half + j], matrix[half + j, j] = -math.sin(angle), math.sin(angle)
    return matrix


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Every token of `[n, d]` rotated by its place times the angles."""
    return torch.stack([rotation_matrix(place * angles) @ token for place, token in enumerate(x)])


# NormLinear


@both
def test_norm_linear_is_a_masked_product_and_a_norm(variant: dict[str, dict[str, Any]]) -> None:
    """[(phi(Q) phi(K)^T) * M] V, phi first, then the Householder matrix, then the rotation."""
    n, mixer = 13, norm_linear(value_head_dim=5, **variant["norm_linear"])
    x = torch.randn(1, n, D, dtype=torch.float64)
    phi = {"elu": F.elu, "1+elu": lambda t: F.elu(t) + 1}[mixer.config.activation]
    v = mixer.reflector.double()
    householder = torch.eye(DIM, dtype=torch.float64) - 2 * torch.outer(v, v)
    out = []
    for index in range(HEADS):
        queries, keys = (
            turned(phi(head(m, x[0], index)) @ householder, mixer.angles.theta) for m in (mixer.q, mixer.k)
        )
        out.append((queries @ keys.T).tril() @ head(mixer.v, x[0], index, 5))
    wanted = srmsnorm(torch.cat(out, dim=-1)) @ mixer.o.weight.T + mixer.o.bias
    torch.testing.assert_close(run(mixer, x, one_document(n))[0], wanted, rtol=1e-9, atol=1e-10)


def test_learned_angles_begin_as_the_rotary_frequencies() -> None:
    (init,) = NormLinear(NormLinearConfig(num_heads=HEADS), site()).angles.init_weights().values()
    assert init.values(torch.Size((4,))).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    learned, fixed = norm_linear(reflection=False), norm_linear(reflection=False, rotation="fixed")
    fixed.load_state_dict({name: value for name, value in learned.state_dict().items() if "theta" not in name})
    with torch.no_grad():
        learned.angles.theta.copy_(learned.angles.init_weights()["theta"].values(torch.Size((DIM // 2,))))
    x = torch.randn(2, 9, D, dtype=torch.float64)
    # The table of fixed angles is in fp32.
    torch.testing.assert_close(
        run(learned, x, one_document(9, 2)), run(fixed, x, one_document(9, 2)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("offset", [1, 37, 1_000_000])
def test_a_common_offset_changes_nothing_for_norm_linear(offset: int) -> None:
    mixer = norm_linear()
    x = torch.randn(2, 11, D, dtype=torch.float64)
    here, there = run(mixer, x, one_document(11, 2)), run(mixer, x, one_document(11, 2, offset))
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-7)


def test_positions_do_change_something() -> None:
    mixer, x = norm_linear(), torch.randn(1, 11, D, dtype=torch.float64)
    stretched = Context(positions=2 * torch.arange(11)[None])
    assert not torch.allclose(run(mixer, x, stretched), run(mixer, x, one_document(11)), atol=1e-3)


@pytest.mark.parametrize("settings", [{"rotation": "none"}, {"positions": "none"}, {"positions": "learned"}], ids=str)
def test_without_a_rotation_there_are_no_positions_and_no_reflection(settings: dict[str, str]) -> None:
    where = site(positions=settings.pop("positions", "rope"))
    mixer = norm_linear(where, **settings)
    assert mixer.angles is None and mixer.reflector is None
    x, order = torch.randn(1, 9, D, dtype=torch.float64), [3, 1, 0, 2, 4, 7, 5, 6, 8]
    # What a last token sees of those before it does not depend on their order.
    last = run(mixer, x, one_document(9))[:, -1]
    torch.testing.assert_close(run(mixer, x[:, order], one_document(9))[:, -1], last)


def test_a_reflection_without_a_rotation_would_change_nothing() -> None:
    mixer, x = norm_linear(rotation="none"), torch.randn(1, 9, D, dtype=torch.float64)
    without = run(mixer, x, one_document(9))
    mixer.rotation, mixer.angles = "learned", lambda positions: (torch.ones(1, 9, 1, 3), torch.zeros(1, 9, 1, 3))
    mixer.reflector = unit_vector(DIM, 0)
    torch.testing.assert_close(run(mixer, x, one_document(9)), without, rtol=1e-6, atol=1e-6)


def test_the_reflection_depends_on_the_global_layer_alone() -> None:
    vectors = [norm_linear(site(layer, num_layers=count)).reflector for layer in (0, 1) for count in (2, 6)]
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[2], vectors[3])
    assert not torch.allclose(vectors[0], vectors[2])
    assert all(vector.double().norm().item() == pytest.approx(1, abs=1e-7) for vector in vectors)
    layers = model_of({}, {}).layers
    assert all(torch.equal(layers[str(layer)].mixer.reflector, unit_vector(8, layer)) for layer in (1, 3))


def test_the_reflection_is_drawn_as_it_always_was() -> None:
    """It is in no checkpoint: a model read by another version of this code, or of torch, must find the same."""
    assert unit_vector(4, 0).tolist() == pytest.approx([0.5615327, -0.1069243, -0.7939419, 0.207134], abs=1e-6)
    # From 16 numbers on, torch draws them in another way.
    wanted = [0.1205841, -0.1086594, -0.0870337, -0.0583507]
    assert unit_vector(64, 5)[:4].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_reflection_and_the_angles_stay_wide() -> None:
    mixer = norm_linear().float()
    kept, theta = mixer.reflector.clone(), mixer.angles.theta.detach().clone()
    mixer.to(torch.bfloat16)
    assert mixer.q.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.reflector, kept) and torch.equal(mixer.angles.theta, theta)
    with torch.device("meta"):
        elsewhere = NormLinear(NormLinearConfig(num_heads=HEADS), site())
    assert torch.equal(elsewhere.to_empty(device="cpu").reflector, kept)
    assert "reflector" not in mixer.state_dict()
    with torch.no_grad():
        mixer.reflector.zero_()
    mixer.remake_buffers()
    assert torch.equal(mixer.reflector, kept)


def test_angles_hold_at_a_million_tokens_in_bf16() -> None:
    angles = NormLinear(NormLinearConfig(num_heads=HEADS), site()).angles.to(torch.bfloat16)
    with torch.no_grad():
        angles.theta.copy_(torch.tensor([1.0, 0.1, 0.01]))
    cos, sin = angles(torch.tensor([[1_000_003]]))
    wanted = 1_000_003 * angles.theta.double()
    torch.testing.assert_close(cos[0, 0, 0].double(), wanted.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0, 0, 0].double(), wanted.sin(), rtol=0, atol=1e-6)


def test_angles_stay_fp32_under_sharding_in_bf16(pool: Pool) -> None:
    assert pool.run(kept_wide, 2, "norm_linear")[0] == {f"layers.{n}.mixer.angles.theta" for n in (0, 1)}


def test_angles_are_not_decayed() -> None:
    names = {name for name in undecayed_names(model_of({}, {})) if "theta" in name}
    assert names == {"layers.1.mixer.angles.theta", "layers.3.mixer.angles.theta"}


# DiagBlock


def dense_diag_block(mixer: Any, x: Tensor, block: int, causal: bool, breaks: list[int]) -> Tensor:
    """`[n, D]`: full attention over everything, under a block-diagonal mask made of loops."""
    n, starts = len(x), [0, *breaks]
    # The document that a token is in begins at the last start before it.
    place = [t - max(s for s in starts if s <= t) for t in range(n)]
    document = [sum(s <= t for s in starts) for t in range(n)]
    mask = torch.tensor(
        [
            [
                document[t] == document[s] and place[t] // block == place[s] // block and (s <= t or not causal)
                for s in range(n)
            ]
            for t in range(n)
        ]
    )
    frequencies = torch.tensor([10000 ** (-2 * j / DIM) for j in range(DIM // 2)], dtype=torch.float64)
    out = []
    for index in range(HEADS):
        queries, keys = (turned(head(m, x, index), frequencies) for m in (mixer.q, mixer.k))
        scores = (queries * DIM**-0.5) @ keys.T
        if mixer.config.activation == "softmax":
            weights = torch.exp(scores) * mask
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = (scores * mask).relu()
        out.append(weights @ head(mixer.v, x, index))
    wide = torch.cat(out, dim=-1)
    wide = srmsnorm(wide) if mixer.config.norm == "srmsnorm" else wide
    return wide @ mixer.o.weight.T + mixer.o.bias


@both
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "block", "breaks"),
    [(1, 4, []), (4, 4, []), (12, 4, []), (14, 4, []), (3, 64, []), (14, 1, []), (17, 5, [1, 7, 8]), (9, 16, [4])],
)
def test_diag_block_is_attention_under_a_block_diagonal_mask(
    variant: dict[str, dict[str, Any]], causal: bool, n: int, block: int, breaks: list[int]
) -> None:
    mixer = diag_block(block=block, **variant["diag_block"])
    x = torch.randn(1, n, D, dtype=torch.float64)
    documents = torch.tensor([[sum(s <= t for s in breaks) for t in range(n)]])
    ctx = one_document(n) if not breaks else Context(positions=positions_of(documents), documents=documents)
    ctx.causal = causal
    wanted = dense_diag_block(mixer, x[0], block, causal, breaks)
    # Rotary tables are in fp32.
    torch.testing.assert_close(run(mixer, x, ctx)[0], wanted, rtol=1e-5, atol=1e-6)


def test_the_defaults_are_those_of_t2() -> None:
    config = DiagBlockConfig(num_heads=8)
    assert (config.block, config.activation, config.norm) == (64, "softmax", "none")
    linear = NormLinearConfig(num_heads=8)
    assert (linear.activation, linear.norm, linear.rotation, linear.reflection) == (
        "1+elu",
        "srmsnorm",
        "learned",
        True,
    )


@both
def test_only_where_blocks_end_depends_on_a_common_offset(variant: dict[str, dict[str, Any]]) -> None:
    mixer, x = diag_block(block=4, **variant["diag_block"]), torch.randn(2, 11, D, dtype=torch.float64)
    here = run(mixer, x, one_document(11, 2))
    for offset in (4, 400):
        torch.testing.assert_close(run(mixer, x, one_document(11, 2, offset)), here, rtol=1e-4, atol=1e-5)
    # Three tokens further on, the first token is the last of its block.
    moved = run(mixer, x, one_document(11, 2, 3))
    first, rest = x[:, :1], x[:, 1:]
    wanted = torch.cat([run(mixer, part, one_document(part.shape[1], 2)) for part in (first, rest)], dim=1)
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-5)


def test_documents_that_may_see_each_other_keep_to_their_blocks() -> None:
    """Positions that begin anew without document ids: a block still is one stretch of tokens."""
    mixer, x = diag_block(block=4), torch.randn(1, 13, D, dtype=torch.float64)
    ctx = packed(13, 1)
    told_apart = run(mixer, x, ctx)
    torch.testing.assert_close(run(mixer, x, Context(positions=ctx.positions)), told_apart)


@both
@pytest.mark.parametrize("n", [12, 14])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_told_apart_whatever_their_positions(
    variant: dict[str, dict[str, Any]], n: int, causal: bool
) -> None:
    """Positions that go on from one document to the next: blocks are where they say, and end with the document."""
    mixer, x = diag_block(block=4, **variant["diag_block"]), torch.randn(2, n, D, dtype=torch.float64)
    ctx = replace(one_document(n, 2), documents=random_documents(2, n), causal=causal)
    torch.testing.assert_close(run(mixer, x, ctx), mixer.reference(x, ctx), rtol=1e-9, atol=1e-10)


def test_what_only_fills_a_window_sees_itself() -> None:
    """A softmax over nothing is no number on some devices, and its gradient would spread."""
    for n in (13, 14, 15, 16):
        for causal in (True, False):
            for ctx in (replace(packed(n), causal=causal), replace(one_document(n, 2, offset=1), causal=causal)):
                mask = block_windows(ctx, 4).mask
                assert mask is not None and mask.any(-1).all()


@both
@pytest.mark.parametrize("block", [1, 3, 8])
def test_any_cut_into_prefills_and_steps_equals_forward(variant: dict[str, dict[str, Any]], block: int) -> None:
    """Documents begin anywhere, at other places in each row, and pieces are shorter and longer than blocks."""
    mixer, dice = diag_block(block=block, **variant["diag_block"]), random.Random(block)
    for round_ in range(8):
        n = 40
        documents = random_documents(3, n, seed=round_) if round_ % 2 else torch.zeros(3, n, dtype=torch.int64)
        positions = positions_of(documents)
        x = torch.randn(3, n, D, dtype=torch.float64)
        isolated = bool(round_ % 2)
        whole = run(mixer, x, Context(positions=positions, documents=documents if isolated else None))
        cache: dict[str, Any] = {}
        done, found = 0, []
        while done < n:
            piece = slice(done, done + dice.choice([1, 1, 2, block, block + 1, 2 * block + 3]))
            ctx = Context(
                positions=positions[:, piece],
                documents=documents[:, piece] if isolated else None,
                key_documents=documents[:, : piece.stop],
                first_index=done,
            )
            mixer.prepare(ctx)
            found.append(mixer(x[:, piece], ctx, cache))
            done += found[-1].shape[1]
        torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("block", "prefill"), [(8, 3), (8, 500), (1, 20)])
def test_the_cache_stays_bounded(block: int, prefill: int) -> None:
    mixer = diag_block(block=block)
    cache: dict[str, Any] = {}
    for first, count in [(0, prefill), *((prefill + step, 1) for step in range(20))]:
        ctx = replace(one_document(count, offset=first), first_index=first)
        mixer.prepare(ctx)
        mixer(torch.randn(1, count, D, dtype=torch.float64), ctx, cache)
        kept = min(first + count, block - 1)
        for tensor in cache.values():
            assert tensor.shape == (1, kept, HEADS, DIM)
            assert tensor.untyped_storage().nbytes() == 8 * kept * D, "a view of something longer"


@both
def test_what_a_token_costs_is_bounded_by_the_block(variant: dict[str, dict[str, Any]]) -> None:
    """Scores in memory: a block's own where blocks are windows, twice as many where they may straddle two."""
    block = 8
    for n in (64, 512):
        for ctx, factor in ((one_document(n, 2), 1), (packed(n), 2), (one_document(n, 2, offset=3), 2)):
            windows = block_windows(ctx, block)
            assert windows.size + windows.before + windows.after == factor * block
            assert windows.mask is None if factor == 1 else windows.mask.numel() == 2 * n * factor * block
            mixer = diag_block(block=block, **variant["diag_block"])
            with FlopCounterMode(display=False) as counter:
                run(mixer, torch.randn(2, n, D, dtype=torch.float64), ctx)
            attended = counter.get_total_flops() / (2 * n) - mixer.linear_flops()
            # torch counts nothing in fused attention on a CPU.
            assert attended == (4 * factor * block * D if mixer.config.activation == "relu" else 0)


def test_a_step_multiplies_no_more_than_the_tokens_kept() -> None:
    mixer = diag_block(block=8, activation="relu")
    for first in (3, 100):
        ctx = replace(one_document(1, offset=first), first_index=first)
        cache = {name: torch.randn(1, min(first, 7), HEADS, DIM, dtype=torch.float64) for name in "kv"}
        mixer.prepare(ctx)
        with FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, 1, D, dtype=torch.float64), ctx, cache)
        assert counter.get_total_flops() - mixer.linear_flops() == 4 * (min(first, 7) + 1) * D


@pytest.mark.parametrize(("n", "keys"), [(1, 0.5), (10, 5), (64, 32), (100, (64**2 + 36**2) / 200), (6400, 32)])
def test_declared_operations_stop_growing_at_the_block(n: int, keys: float) -> None:
    mixer = diag_block()
    assert mixer.flops(n) == mixer.linear_flops() + 4 * keys * D


@both
def test_rows_that_see_nothing_positive_give_numbers(variant: dict[str, dict[str, Any]]) -> None:
    for mixer in (
        DiagBlock(DiagBlockConfig(num_heads=HEADS, block=3, **variant["diag_block"]), site(bias=False)),
        NormLinear(NormLinearConfig(num_heads=HEADS, **variant["norm_linear"]), site(bias=False)),
    ):
        # Memory that nobody has written to may hold what is no number.
        mixer = randomised(mixer)
        x = torch.zeros(1, 7, D, dtype=torch.float64, requires_grad=True)
        out = run(mixer, x, one_document(7))
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(out))
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(("variant", "isolated"), [(T1, True), (T2, False)], ids=["T1", "T2"])
def test_one_compilation_without_a_break_serves_any_length(variant: dict[str, dict[str, Any]], isolated: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    mixer = diag_block(block=8, **variant["diag_block"])
    compiled = torch.compile(mixer, backend=note, fullgraph=True)
    for n in (40, 29, 61, 83):
        ctx = packed(n) if isolated else one_document(n, 2)
        x = torch.randn(2, n, D, dtype=torch.float64)
        mixer.prepare(ctx)
        torch.testing.assert_close(compiled(x, ctx), mixer(x, ctx), rtol=1e-9, atol=1e-10)
    assert len(graphs) == 2, "one for the first length, one for all others"


# Both together


def model_of(linear: dict[str, Any], local: dict[str, Any], **model: Any) -> Model:
    tables = {
        "model": {"d_model": 32, "num_layers": 4, "vocab_size": 61, "pattern": ["diag_block", "norm_linear"]}
        | {"norm": "srmsnorm", "bias": True, "init_std": 0.3}
        | model,
        "mixers": {"norm_linear": {"num_heads": 4} | linear, "diag_block": {"num_heads": 4} | local},
        "feedforwards": {"swiglu": {"d_ff": 48}},
    }
    faults: list[str] = []
    _, architecture = build_architecture(tables, faults)
    assert architecture is not None, faults
    with torch.device("meta"):
        built = Model(architecture).double()
    initialise(built, seed=1, device=torch.device("cpu"))
    return built


@both
def test_prompts_of_different_lengths_together_give_what_each_gives_alone(variant: dict[str, dict[str, Any]]) -> None:
    model = model_of(variant["norm_linear"], {"block": 5, **variant["diag_block"]})
    prompts = [torch.randint(61, (length,)).tolist() for length in (1, 4, 12, 17)]
    together = decode(model, prompts, 14, Sampling())
    alone = [decode(model, [prompt], 14, Sampling())[0] for prompt in prompts]
    assert together == alone


@both
def test_left_padding_is_exact(variant: dict[str, dict[str, Any]]) -> None:
    """Not only the likeliest token: every logit, in the prefill and in the steps behind it."""
    model = model_of(variant["norm_linear"], {"block": 5, **variant["diag_block"]})
    text, padding = torch.randint(61, (1, 15)), 4
    padded = torch.cat([torch.zeros(1, padding, dtype=torch.int64), text], dim=1)
    places = torch.arange(-padding, 15)[None]
    wanted, cache, found = model(text), Cache(), []
    for piece in (slice(0, 12), slice(12, 13), slice(13, 19)):
        positions = places[:, piece].clamp(min=0)
        found.append(
            model(padded[:, piece], documents=(places[:, piece] >= 0).long(), positions=positions, cache=cache)
        )
    torch.testing.assert_close(torch.cat(found, dim=1)[:, padding:], wanted, rtol=1e-9, atol=1e-10)


def test_diag_block_looks_both_ways_and_norm_linear_refuses() -> None:
    model = model_of({}, {"block": 8}, pattern=["diag_block"])
    tokens = torch.randint(61, (1, 20))
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 61
    differs = (model(tokens, causal=False) != model(changed, causal=False)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(8, 16))
    with pytest.raises(ValueError, match="NormLinear can only look back"):
        model_of({}, {})(tokens, causal=False)


@pytest.mark.parametrize(("name", "variant"), [("t1", T1), ("t2", T2)])
def test_the_presets_are_the_published_configurations(name: str, variant: dict[str, dict[str, Any]]) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"transnormer-{name}.toml")
    built = config.architecture
    assert config.warnings == []
    assert built.mixer_names == ["diag_block"] * 3 + ["norm_linear"] * 3
    for kind, cls in (("diag_block", DiagBlockConfig), ("norm_linear", NormLinearConfig)):
        assert built.mixers[kind][1] == cls(num_heads=8, **variant[kind])
    assert built.feedforwards["swiglu"][1].d_ff == int(8 / 3 * config.model.d_model)
    each = 4 * (512 * 512 + 512) + 3 * 512 * 1365 + 2 * 1365 + 512
    with torch.device("meta"):
        model = Model(built)
    assert sum(p.numel() for p in model.parameters()) == 50257 * 512 + 6 * each + 3 * 32


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("norm_linear", {"num_heads": 0}, "num_heads = 0 must be at least 1."),
        (
            "norm_linear",
            {"num_heads": 5},
            "num_heads = 5 does not divide model.d_model = 24: set head_dim, or take num",
        ),
        ("norm_linear", {"num_heads": 8}, 'head_dim = 3 must be even, .* take 4, or rotation = "none".'),
        ("norm_linear", {"num_heads": 4, "value_head_dim": 0}, "value_head_dim = 0 must be at least 1."),
        ("norm_linear", {"num_heads": 4, "rope_theta": 0.0}, "rope_theta = 0.0 must be above 0: 10000 is usual."),
        ("norm_linear", {"num_heads": 4, "activation": "gelu"}, "activation = 'gelu': expected .*'1.elu'"),
        ("diag_block", {"num_heads": 0}, "num_heads = 0 must be at least 1."),
        ("diag_block", {"num_heads": 7}, "num_heads = 7 does not divide model.d_model = 24: .* num_heads = [68]."),
        ("diag_block", {"num_heads": 8}, "head_dim = 3 must be even, since positions .* take 4."),
        ("diag_block", {"num_heads": 4, "head_dim": 0}, "head_dim = 0 must be at least 1."),
        ("diag_block", {"num_heads": 4, "block": 0}, "block = 0 must be at least 1, the token itself; 64 is usual."),
        ("diag_block", {"num_heads": 4, "rope_theta": -1.0}, "rope_theta = -1.0 must be above 0"),
        ("diag_block", {"num_heads": 4, "norm": "layernorm"}, "norm = 'layernorm': expected 'none' or 'srmsnorm'."),
    ],
)
def test_settings_that_cannot_be_built_are_refused_in_sentences(
    kind: str, settings: dict[str, Any], sentence: str
) -> None:
    tables = {
        "model": {"d_model": 24, "num_layers": 1, "vocab_size": 8, "pattern": [kind]},
        "mixers": {kind: settings},
        "feedforwards": {"swiglu": {"d_ff": 8}},
    }
    faults: list[str] = []
    _, architecture = build_architecture(tables, faults)
    assert architecture is None
    assert len(faults) == 1, faults
    assert re.search(rf"^mixers\.{kind}\.{sentence}", faults[0]), faults[0]


def test_an_odd_head_is_fine_where_nothing_is_turned() -> None:
    assert NormLinearConfig(num_heads=8, rotation="none").faults(24) == []
