"""Mixers in megatron-core's layers: its own GPTModel, on the CPU, against our stack with the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.initialisation import all_inits, draw
from model.megatron.probe import on_cpu, transformer_config
from model.mixers import MIXERS
from model.stack import Model
from parallel.megatron import layer_spec
from tests.checkpoints import architecture_of, random_weights
from tests.conformance.models import mixer_class

D, N = 32, 24
# A mixer that balances its heads by a loss is refused with it.
WITHOUT_BALANCE = {"moh": {"balance_weight": 0.0}}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """megatron-core's process groups, of this process alone, on the CPU."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with on_cpu():
            parallel_state.initialize_model_parallel()
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def tables_of(kind: str, settings: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {
        "model": {"d_model": D, "num_layers": 2, "vocab_size": 64, "norm_eps": 1e-5, "pattern": [kind]} | model,
        "mixers": {kind: settings},
        "feedforwards": {"swiglu": {"d_ff": 48}},
    }


def config_of(tables: dict[str, Any], **changes: Any) -> Any:
    """Of megatron-core, for such a model around the attention."""
    model = tables["model"]
    arguments = {
        "num_layers": model["num_layers"],
        "hidden_size": D,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "swiglu": True,
        "normalization": "LayerNorm" if model.get("norm") == "layernorm" else "RMSNorm",
        "norm_epsilon": model["norm_eps"],
        "add_bias_linear": model.get("bias", False),
    }
    return dataclasses.replace(transformer_config(arguments), **changes)


def gpt(config: Any, spec: Any) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    return GPTModel(
        config, spec, vocab_size=64, max_sequence_length=N, position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip


def theirs_by_ours(layers: int) -> dict[str, str]:
    """Names in our stack -> names in GPTModel, or a row group of one."""
    found = {"embedding": "embedding.word_embeddings", "final_norm": "decoder.final_layernorm", "head": "output_layer"}
    for layer in range(layers):
        there = f"decoder.layers.{layer}."
        found |= {
            f"layers.{layer}.mixer_norm": there + "input_layernorm",
            f"layers.{layer}.feedforward_norm": there + "pre_mlp_layernorm",
            f"layers.{layer}.feedforward.down": there + "mlp.linear_fc2",
        }
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in found.items()}


def counterpart(values: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Parameters, or their gradients, of our stack under GPTModel's names."""
    found = {theirs: values[ours] for ours, theirs in theirs_by_ours(layers).items()}
    for layer in range(layers):
        here, there = f"layers.{layer}.", f"decoder.layers.{layer}."
        gate_up = [values[f"{here}feedforward.{x}.weight"] for x in ("gate", "up")]
        found[f"{there}mlp.linear_fc1.weight"] = torch.cat(gate_up)
        mixing = {name: value for name, value in values.items() if name.startswith(f"{here}mixer.")}
        found |= {f"{there}self_attention.{name.removeprefix(here)}": value for name, value in mixing.items()}
        outer = f"{here}mixer_out_norm.weight"
        if outer in values:
            found[f"{there}self_attention.out_norm.weight"] = values[outer]
    return found


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (output.float() * weights).sum().backward()
    return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in model.named_parameters()}


def close(found: Tensor, wanted: Tensor) -> bool:
    return (found - wanted).abs().max().item() <= 2e-5 * max(1e-6, wanted.abs().max().item())


CASES = [(kind, dict(mixer_class(kind).examples[0]) | WITHOUT_BALANCE.get(kind, {})) for kind in MIXERS]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=[kind for kind, _ in CASES])
def test_a_model_of_theirs_with_our_mixer_is_ours(kind: str, settings: dict[str, Any], alone: None) -> None:
    """GPTModel: logits, and every gradient, of a whole forward and backward; only the attention is ours there."""
    architecture = architecture_of(tables_of(kind, settings))
    ours = Model(architecture)
    ours.load_state_dict(random_weights(architecture), strict=False)
    theirs = gpt(config_of(tables_of(kind, settings)), layer_spec(kind, settings))
    missing, unexpected = theirs.load_state_dict(counterpart(dict(ours.named_parameters()), 2), strict=False)
    buffers = {name for name, _ in theirs.named_buffers()}
    assert not unexpected and {name for name in missing if not name.endswith("_extra_state")} <= buffers

    tokens = torch.randint(64, (2, N))
    wanted = ours(tokens)
    found = theirs(tokens, torch.arange(N).expand_as(tokens), None)
    assert close(found, wanted)
    expected = counterpart(gradients(ours, wanted), 2)
    for name, gradient in gradients(theirs, found).items():
        assert close(gradient, expected[name]), name


def test_one_layer_is_a_block_of_ours(alone: None) -> None:
    """A TransformerLayer by itself, `[s, b, h]`, with layernorms and biases, next to a Block."""
    settings = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}
    tables = tables_of("softmax", settings, norm="layernorm", bias=True, num_layers=1)
    architecture = architecture_of(tables)
    ours = Model(architecture)
    ours.load_state_dict(random_weights(architecture))
    layer = gpt(config_of(tables), layer_spec("softmax", settings)).decoder.layers[0]
    block = dict(ours.layers["0"].named_parameters())
    renamed = {
        "mixer_norm": "input_layernorm",
        "feedforward_norm": "pre_mlp_layernorm",
        "feedforward.down": "mlp.linear_fc2",
    }
    state = {f"self_attention.{name}": one for name, one in block.items() if name.startswith("mixer.")}
    for kind in ("weight", "bias"):
        state |= {f"{theirs}.{kind}": block[f"{here}.{kind}"] for here, theirs in renamed.items()}
        state[f"mlp.linear_fc1.{kind}"] = torch.cat([block[f"feedforward.{x}.{kind}"] for x in ("gate", "up")])
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)
    x = torch.randn(2, N, D)
    ctx = ours.context(torch.zeros(2, N, dtype=torch.long))
    found, _ = layer(x.transpose(0, 1).contiguous())
    assert close(found.transpose(0, 1), ours.layers["0"](x, ctx))


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=[kind for kind, _ in CASES])
def test_documents_are_read_from_the_mask(kind: str, settings: dict[str, Any], alone: None) -> None:
    """As `--reset-attention-mask` makes it: causal, and blocked between documents."""
    tables = tables_of(kind, settings)
    architecture = architecture_of(tables)
    ours = Model(architecture)
    ours.load_state_dict(random_weights(architecture), strict=False)
    theirs = gpt(config_of(tables), layer_spec(kind, settings, isolate_documents=True))
    theirs.load_state_dict(counterpart(dict(ours.named_parameters()), 2), strict=False)
    tokens = torch.randint(64, (2, N))
    documents = torch.tensor([[0] * 9 + [1] * 15, [0] * 4 + [1] * 11 + [2] * 9])
    positions = torch.cat([torch.arange(n) for n in (9, 15, 4, 11, 9)]).view(2, N)
    hidden = ~torch.ones(N, N, dtype=torch.bool).tril() | (documents[:, :, None] != documents[:, None])
    found = theirs(tokens, positions, hidden[:, None])
    assert close(found, ours(tokens, documents=documents, positions=positions))
    assert not close(found, ours(tokens))
    with pytest.raises(ValueError, match="reset-attention-mask"):
        theirs(tokens, positions, None)


def test_layers_of_several_kinds_and_initial_values(alone: None) -> None:
    """A hybrid, as megatron-core takes one: a spec for each layer. What is drawn depends on the global layer."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    specs = [layer_spec("lightning", {"num_heads": 4}), layer_spec("softmax", {"num_heads": 2})]
    tables = tables_of("softmax", {"num_heads": 2})
    model = gpt(config_of(tables), TransformerBlockSubmodules(layer_specs=specs, layer_norm=WrappedTorchNorm))
    kinds = [type(layer.self_attention.mixer).__name__ for layer in model.decoder.layers]
    assert kinds == ["Lightning", "Softmax"]
    attention = model.decoder.layers[1].self_attention
    init = all_inits(attention)["mixer.q.weight"]
    assert torch.equal(attention.mixer.q.weight, draw("layers.1.mixer.q.weight", init, torch.Size((D, D)), 0))
    assert attention.mixer.site.layer == 1 and attention.mixer.site.num_layers == 2
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    keys = {one.key for one in state.values()}
    assert {"decoder.layers.0.input_layernorm.weight", "decoder.layers.1.self_attention.mixer.q.weight"} <= keys


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size = 2"),
        ({"context_parallel_size": 2}, "context_parallel_size = 2"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], sentence: str, alone: None) -> None:
    tables = tables_of("softmax", {"num_heads": 4})
    config = dataclasses.replace(config_of(tables), **changes)
    with pytest.raises(ValueError, match=sentence):
        gpt(config, layer_spec("softmax", {"num_heads": 4}))


def test_settings_are_refused_as_in_a_configuration(alone: None) -> None:
    with pytest.raises(ValueError, match="num_haeds is no key") as refusal:
        layer_spec("lightning", {"num_haeds": 4, "chunk": "x"})
    assert "mixers.lightning.chunk" in str(refusal.value)
    with pytest.raises(ValueError, match="num_heads = 5"):
        gpt(config_of(tables_of("softmax", {"num_heads": 4})), layer_spec("softmax", {"num_heads": 5}))
    with pytest.raises(ValueError, match="balance_weight = 0"):
        settings = dict(mixer_class("moh").examples[0])
        gpt(config_of(tables_of("softmax", {"num_heads": 4})), layer_spec("moh", settings))
    model = gpt(config_of(tables_of("softmax", {"num_heads": 4})), layer_spec("softmax", {"num_heads": 4}))
    attention = model.decoder.layers[0].self_attention
    with pytest.raises(ValueError, match="packed sequences"):
        attention(torch.zeros(N, 1, D), packed_seq_params=object())
