"""What every registered mixer must do on one process. Nothing here names a mixer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.cache import Cache
from model.context import Context
from model.initialisation import all_inits
from model.layer import Packed
from model.stack import Model
from parallel.recompute import compile_blocks, recompute_blocks
from tests.conformance.models import (
    CASES,
    D_MODEL,
    VOCAB,
    architecture,
    mixer_class,
    positions_of,
    random_documents,
    small_model,
)

every_mixer = pytest.mark.parametrize(("kind", "example"), CASES)


def inputs(n: int, batch_size: int = 3, documents: bool = True) -> tuple[torch.Tensor, Context]:
    x = torch.randn(batch_size, n, D_MODEL, dtype=torch.float64, requires_grad=True)
    ids = random_documents(batch_size, n) if documents else None
    positions = torch.arange(n).expand(batch_size, n) if ids is None else positions_of(ids)
    return x, Context(positions=positions, documents=ids)


@every_mixer
@pytest.mark.parametrize(("n", "documents"), [(1, False), (2, False), (37, False), (37, True), (150, True)])
def test_forward_and_gradients_equal_the_reference(kind: str, example: int, n: int, documents: bool) -> None:
    mixer = small_model(kind, example).layers["0"].mixer
    x, ctx = inputs(n, documents=documents)
    mixer.prepare(ctx)
    wanted = [x, *mixer.parameters()]
    cotangent = torch.randn(x.shape, dtype=x.dtype)
    fast, plain = mixer(x, ctx), mixer.reference(x, ctx)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(fast, wanted, cotangent), torch.autograd.grad(plain, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@every_mixer
def test_a_token_sees_itself_and_the_past_but_nothing_later(kind: str, example: int) -> None:
    model = small_model(kind, example)
    tokens = torch.randint(VOCAB, (1, 23))
    embedded = model.embedding(tokens).detach().requires_grad_(True)
    ctx, mixer = model.context(tokens), model.layers["0"].mixer
    mixed = mixer(embedded, ctx)
    for place in range(23):
        (gradient,) = torch.autograd.grad(mixed[0, place].sum(), embedded, retain_graph=True)
        reached = gradient[0].abs().sum(-1)
        assert reached[place] > 0, f"token {place} does not see itself"
        assert (reached[place + 1 :] == 0).all(), f"token {place} sees the future"
        first = mixer.first_seen(place)
        assert (reached[:first] == 0).all(), f"token {place} sees what comes before token {first}"
        if place > first:
            assert reached[place - 1] > 0, f"token {place} does not see the one before it"


@every_mixer
@pytest.mark.parametrize("prefill", [1, 5, 16])
def test_prefill_and_steps_equal_forward(kind: str, example: int, prefill: int) -> None:
    model = small_model(kind, example).eval()
    tokens = torch.randint(VOCAB, (2, 21))
    whole = model(tokens)
    cache = Cache()
    parts = [model(tokens[:, :prefill], cache=cache)]
    parts += [model(tokens[:, place : place + 1], cache=cache) for place in range(prefill, 19)]
    parts += [model(tokens[:, 19:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)


@every_mixer
def test_packed_documents_equal_separate_ones(kind: str, example: int) -> None:
    model = small_model(kind, example)
    lengths = [1, 9, 4, 16]
    tokens = torch.randint(VOCAB, (1, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed = model(tokens, documents=documents, positions=positions_of(documents))
    separate = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-10)


@every_mixer
def test_a_document_that_begins_between_prefill_and_steps_is_isolated(kind: str, example: int) -> None:
    model = small_model(kind, example)
    tokens = torch.randint(VOCAB, (2, 12))
    documents = torch.tensor([[0] * 7 + [1] * 5, [0] * 12])
    positions = positions_of(documents)
    whole = model(tokens, documents=documents, positions=positions)
    cache = Cache()
    pieces = [slice(0, 7), slice(7, 8), slice(8, 12)]
    parts = [model(tokens[:, p], documents=documents[:, p], positions=positions[:, p], cache=cache) for p in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)


@every_mixer
def test_caches_belong_to_their_callers(kind: str, example: int) -> None:
    model = small_model(kind, example)
    one, other = torch.randint(VOCAB, (2, 1, 8))
    caches = Cache(), Cache()
    for place in range(8):
        steps = [
            model(tokens[:, place : place + 1], cache=cache) for tokens, cache in zip((one, other), caches, strict=True)
        ]
    torch.testing.assert_close(steps[0], model(one)[:, -1:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(steps[1], model(other)[:, -1:], rtol=1e-9, atol=1e-10)


@every_mixer
def test_head_gates_scale_contributions(kind: str, example: int) -> None:
    mixer = small_model(kind, example).layers["0"].mixer
    heads = len(mixer.head_numbers)
    x, ctx = inputs(11)
    mixer.prepare(ctx)
    plain = mixer(x, ctx)
    torch.testing.assert_close(mixer(x, ctx, head_gate=torch.ones(heads)), plain)
    alone = [mixer(x, ctx, head_gate=torch.eye(heads)[h]) for h in range(heads)]
    bias = mixer(x, ctx, head_gate=torch.zeros(heads))
    torch.testing.assert_close(sum(part - bias for part in alone) + bias, plain, rtol=1e-8, atol=1e-9)


@every_mixer
def test_looking_both_ways_is_done_or_refused(kind: str, example: int) -> None:
    model = small_model(kind, example)
    tokens = torch.randint(VOCAB, (1, 6))
    if not mixer_class(kind).bidirectional:
        with pytest.raises(ValueError, match="can only look back"):
            model(tokens, causal=False)
        return
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCAB
    assert not torch.equal(model(tokens, causal=False)[0, 2], model(changed, causal=False)[0, 2])


@every_mixer
@pytest.mark.parametrize("kind_of_recomputation", ["selective", "full"])
def test_recomputation_changes_nothing(kind: str, example: int, kind_of_recomputation: str) -> None:
    plain, again = small_model(kind, example), small_model(kind, example)
    recompute_blocks(again, kind_of_recomputation)
    assert_same_gradients(plain, again, exact=True)


@pytest.mark.parametrize(
    "recomputed", ["none", *(pytest.param(kind, marks=pytest.mark.matrix) for kind in ("selective", "full"))]
)
@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _ in CASES))
def test_compiled_blocks_compute_the_same(kind: str, recomputed: str) -> None:
    torch._dynamo.reset()
    plain, compiled = small_model(kind), small_model(kind)
    recompute_blocks(compiled, recomputed)
    for block in compiled.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same_gradients(plain, compiled, exact=False)
    if mixer_class(kind).context == "kv" and recomputed == "none":
        # A second length makes N symbolic: still no graph break. (States recompile for each length, slowly.)
        tokens = torch.randint(VOCAB, (2, 29))
        torch.testing.assert_close(compiled(tokens), plain(tokens), rtol=1e-9, atol=1e-10)


def assert_same_gradients(plain: Model, other: Model, *, exact: bool) -> None:
    tokens = torch.randint(VOCAB, (2, 40))
    documents = random_documents(2, 40)
    for model in (plain, other):
        model(tokens, documents=documents, positions=positions_of(documents)).square().mean().backward()
    for (name, ours), theirs in zip(plain.named_parameters(), other.parameters(), strict=True):
        if exact:
            assert torch.equal(ours.grad, theirs.grad), name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)


@every_mixer
def test_bf16_stays_near(kind: str, example: int) -> None:
    tokens = torch.randint(VOCAB, (2, 64))
    exact = small_model(kind, example, init_std=0.1)
    rough = small_model(kind, example, init_std=0.1).to(torch.bfloat16)
    wanted = exact(tokens)
    error = (rough(tokens).double() - wanted).norm() / wanted.norm()
    # Where heads are chosen, rounding turns the choice between two that are nearly alike, and all that follows.
    bound = 0.03 if exact.layers["0"].mixer.active_share == 1 else 0.12
    assert error < bound, f"relative error {error:.4f}"


@every_mixer
def test_declared_flops_are_those_of_the_reference(kind: str, example: int) -> None:
    mixer = small_model(kind, example).layers["0"].mixer
    n = 64
    x, ctx = inputs(n, batch_size=1, documents=False)
    mixer.prepare(ctx)
    with FlopCounterMode(display=False) as counter:
        mixer.reference(x, ctx)
    counted = counter.get_total_flops() / n
    linear, declared = mixer.linear_flops(), mixer.flops(n)
    if mixer.context != "state":
        # The reference multiplies every query with every key. Of those that a causal query sees, itself is counted by
        # half, so that without a bound they are n / 2. It runs all heads, where others run for some tokens only.
        seen = sum(place + 0.5 - mixer.first_seen(place) for place in range(n)) / n
        counted = linear + (counted - linear) * mixer.active_share * seen / n
    assert declared == pytest.approx(counted, rel=1e-12)


@every_mixer
def test_every_parameter_is_declared(kind: str, example: int) -> None:
    with torch.device("meta"):
        model = Model(architecture(kind, example, num_layers=3))
    assert set(all_inits(model)) == {name for name, _ in model.named_parameters()}
    mixer = model.layers["1"].mixer
    for name, _ in [*mixer.named_parameters(), *mixer.named_buffers()]:
        assert mixer.sharding.get(name) in ("column", "row", "heads", "replicate", "experts"), name
    named = {name: mixer.hf_name(name, mixer.config) for name, _ in mixer.named_parameters()}
    for name, there in named.items():
        assert there is not None, f"{name} has no name in Hugging Face checkpoints"
    declared = dict(mixer.hf) | named
    outside = [(n.name, n.part) if isinstance(n, Packed) else n for n in declared.values()]
    assert len(set(outside)) == len(outside), "two parameters under one name"


@every_mixer
def test_values_depend_on_the_seed_and_the_name_alone(kind: str, example: int) -> None:
    deep, shallow = small_model(kind, example, num_layers=3), small_model(kind, example, num_layers=1)
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, dict(deep.named_parameters())[name]), name
    values = [p.flatten()[:4].tolist() for n, p in deep.named_parameters() if p.ndim == 2 and "theta" not in n]
    assert len({str(value) for value in values}) == len(values), "two matrices begin alike"


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _ in CASES))
def test_casting_and_moving_keep_what_must_stay_fp32(kind: str) -> None:
    model = small_model(kind, dtype=torch.float32)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16).to("cpu")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, kept[name]), f"{name} lost precision in a cast"
    for name, parameter in model.named_parameters():
        if any(getattr(module, "keep_fp32", False) for module in _owners(model, name)):
            assert parameter.dtype == torch.float32, name


def _owners(model: Model, name: str) -> list[torch.nn.Module]:
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1)]


def test_compile_blocks_uses_blocks() -> None:
    model = small_model(CASES[0][0])
    compile_blocks(model)
    assert all(block._compiled_call_impl is not None for block in model.layers.values())
