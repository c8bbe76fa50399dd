"""Names and layouts of Hugging Face checkpoints, against the classes of transformers and the published shapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.lightning import decay_slopes
from model.cache import Cache
from model.config import Architecture
from model.hf.names import from_hf, places, to_hf
from model.settings import build_architecture
from model.stack import Model
from parallel.data import initialise

transformers = pytest.importorskip("transformers")

D, VOCAB, LAYERS = 32, 61, 3
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}


def architecture(feedforward: str = "swiglu", *, mixer: dict[str, Any] | None = None, **model: Any) -> Architecture:
    settings = {"d_model": D, "num_layers": LAYERS, "vocab_size": VOCAB, "norm_eps": 1e-5, "pattern": ["it"]} | model
    mixer = {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2} if mixer is None else mixer
    tables = {"model": settings, "mixers": {"it": mixer}, "feedforwards": {feedforward: {"d_ff": 48}}}
    faults: list[str] = []
    _, built = build_architecture(tables, faults)
    assert built is not None, faults
    return built


def random_parameters(built: Architecture) -> dict[str, Tensor]:
    """Every parameter with numbers of its own: norms and biases are not left at 1 and 0, where a mix-up is unseen."""
    with torch.device("meta"):
        model = Model(built)
    return {name: torch.randn(parameter.shape, dtype=torch.float64) for name, parameter in model.named_parameters()}


def native(built: Architecture, tensors: dict[str, Tensor]) -> Model:
    with torch.device("meta"):
        model = Model(built).double()
    initialise(model, seed=0, device=torch.device("cpu"))
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def theirs(name: str, **changes: Any) -> Any:
    """A model of transformers in fp64, every parameter random.

    Their norms and rotary angles are in fp32 whatever the model is in: both are exchanged for exact ones, so that what
    is compared is the names. (Eager attention rounds as well; SDPA does not.)
    """
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**(SHAPE | changes))
    model = randomised(getattr(transformers, name)(config))
    model.model.rotary_emb.forward = partial(rotary, getattr(config, "head_dim", None) or D // 4)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon
            module.forward = partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=eps)
    return model


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter.normal_(0.0, 0.3)
    return model


def rotary(head_dim: int, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, N, head_dim], each angle twice."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos().float(), angles.sin().float()


def assert_same_both_ways(built: Architecture, family: str, make: Any) -> None:
    """Import, and compare logits; export into a fresh model of theirs, strictly, and compare again."""
    source = make()
    tokens = torch.randint(VOCAB, (2, 17))
    with torch.no_grad():
        wanted = source(input_ids=tokens).logits
        ours = native(built, from_hf(source.state_dict(), built, family))
        torch.testing.assert_close(ours(tokens), wanted, rtol=1e-10, atol=1e-10)
        written = to_hf(dict(ours.named_parameters()), built, family)
        fresh = make()
        # A checkpoint leaves a tied head out; load_state_dict knows of no ties.
        head = {"lm_head.weight": fresh.get_input_embeddings().weight} if built.model.tie_embeddings else {}
        fresh.load_state_dict(written | head, strict=True)
        torch.testing.assert_close(fresh(input_ids=tokens).logits, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_llama(tied: bool, bias: bool) -> None:
    built = architecture(tie_embeddings=tied, bias=bias)
    changes = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    assert_same_both_ways(built, "llama", lambda: theirs("LlamaForCausalLM", **changes))


def test_qwen3_with_its_norms_of_queries_and_keys() -> None:
    mixer = {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2, "head_dim": 10, "qk_norm": True}
    changes = {"head_dim": 10, "tie_word_embeddings": False}
    assert_same_both_ways(architecture(mixer=mixer), "llama", lambda: theirs("Qwen3ForCausalLM", **changes))


def gpt2_architecture() -> Architecture:
    mixer = {"kind": "softmax", "num_heads": 4}
    settings = {"positions": "learned", "max_positions": 64, "norm": "layernorm", "bias": True, "tie_embeddings": True}
    return architecture("gelu", mixer=mixer, **settings)


def gpt2() -> Any:
    sizes = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": 48, "tie_word_embeddings": True}
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "attn_implementation")
    config = transformers.GPT2Config(**sizes, **{name: SHAPE[name] for name in names})
    return randomised(transformers.GPT2LMHeadModel(config))


def test_gpt2_packs_queries_keys_and_values_in_columns() -> None:
    assert_same_both_ways(gpt2_architecture(), "gpt2", gpt2)


def test_gpt2_without_its_prefix_and_with_the_masks_of_old_checkpoints() -> None:
    built, model = gpt2_architecture(), gpt2()
    wanted = from_hf(model.state_dict(), built, "gpt2")
    old = model.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1), "h.2.attn.masked_bias": torch.ones(1)}
    found = from_hf(old, built, "gpt2")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def transnormer_architecture(**mixer: Any) -> Architecture:
    lightning = {"kind": "lightning", "num_heads": 4, "head_dim": 6} | mixer
    settings = {"norm": "srmsnorm", "positions": "none", "tie_embeddings": True, "embedding_scale": "sqrt"}
    return architecture("sglu", mixer=lightning, **settings)


def test_transnormer_has_the_published_names_and_shapes() -> None:
    built = transnormer_architecture()
    written = to_hf(random_parameters(built), built, "transnormer")
    layer = {
        "token_mixer.qkvu_proj.weight": (4 * 24, D),
        "token_mixer.out_proj.weight": (D, 24),
        "channel_mixer.l1.weight": (48, D),
        "channel_mixer.l2.weight": (48, D),
        "channel_mixer.l3.weight": (D, 48),
    }
    wanted: dict[str, tuple[int, ...]]
    wanted = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    wanted["model.layers.0.token_mixer.lrpe.theta"] = (4, 1, 6)
    wanted["model.embed_tokens.weight"] = (VOCAB, D)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == wanted
    assert all(tensor.is_contiguous() for tensor in written.values())


def test_transnormer_packs_rows_as_queries_keys_values_gates_and_back() -> None:
    built = transnormer_architecture()
    tensors = random_parameters(built)
    written = to_hf(tensors, built, "transnormer")
    packed = written["model.layers.1.token_mixer.qkvu_proj.weight"]
    for group, x in enumerate("qkvu"):
        assert torch.equal(packed[24 * group : 24 * (group + 1)], tensors[f"layers.1.mixer.{x}.weight"])
    with_head = written | {"lm_head.weight": written["model.embed_tokens.weight"].clone()}
    for given in (written, with_head):
        again = from_hf(given, built, "transnormer")
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def mixture(experts: int) -> dict[str, Any]:
    """`[feedforwards.NAME]` of so many experts, of which two see a token."""
    return {"moe": {"num_experts": experts, "top_k": min(2, experts), "expert": "it"}, "it": MIXED}


def mixture_settings(experts: int) -> dict[str, int]:
    return {"num_local_experts": experts, "num_experts_per_tok": min(2, experts)}


MIXED = {"kind": "swiglu", "d_ff": 48}


@pytest.mark.parametrize("tied", [False, True])
def test_mixtral_from_and_into_folders_of_transformers(tied: bool, tmp_path: Path) -> None:
    """The names of the hub are those on disk; in memory the experts are packed."""
    tables = {"model": {"d_model": D, "num_layers": LAYERS, "vocab_size": VOCAB, "norm_eps": 1e-5, "pattern": ["it"]}}
    tables |= {"mixers": {"it": {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2}}, "feedforwards": mixture(5)}
    tables["model"]["tie_embeddings"] = tied
    _, built = build_architecture(tables, [])
    assert built is not None
    changes = mixture_settings(5) | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    source = theirs("MixtralForCausalLM", tie_word_embeddings=tied, **changes).float()
    source.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert held["model.layers.1.block_sparse_moe.experts.4.w2.weight"].shape == (D, 48)
    found = from_hf(held, built, "mixtral")
    written = to_hf(found, built, "mixtral")
    assert written.keys() == held.keys() and all(torch.equal(written[name], held[name]) for name in held)
    tokens = torch.randint(VOCAB, (2, 17))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = native(built, found).float()(tokens)
        for model in (source, again):
            wanted = model(input_ids=tokens).logits
            assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


MINIMAX_LAYERS = ["minimax", "softmax", "minimax", "minimax"]


def minimax_architecture(feedforward: str = "swiglu", **more: Any) -> Architecture:
    """Linear attention first, grouped queries, six heads of a width that is not D / 6, no factor that is 1."""
    tables = {
        "model": {
            "d_model": D,
            "num_layers": len(MINIMAX_LAYERS),
            "vocab_size": VOCAB,
            "norm_eps": 1e-5,
            "pattern": MINIMAX_LAYERS,
            "residual": "normalised",
            "residual_factors": {"minimax": [1.9, 0.7], "softmax": [1.6, 0.8], feedforward: [1.3, 1.2]},
        },
        "mixers": {
            "minimax": {"num_heads": 6, "head_dim": 10},
            "softmax": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 10},
        },
        "feedforwards": more or {feedforward: {"d_ff": 48}},
    }
    faults: list[str] = []
    _, built = build_architecture(tables, faults)
    assert built is not None, faults
    return built


MINIMAX = {
    "num_hidden_layers": len(MINIMAX_LAYERS),
    "layer_types": ["full_attention" if name == "softmax" else "linear_attention" for name in MINIMAX_LAYERS],
    "num_attention_heads": 6,
    "head_dim": 10,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "block_size": 8,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
    "linear_attn_alpha_factor": 1.9,
    "linear_attn_beta_factor": 0.7,
    "full_attn_alpha_factor": 1.6,
    "full_attn_beta_factor": 0.8,
    "mlp_alpha_factor": 1.3,
    "mlp_beta_factor": 1.2,
}
MINIMAX_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@pytest.mark.parametrize("experts", [1, 4])
def test_minimax_from_a_folder_of_transformers(experts: int, tmp_path: Path) -> None:
    """Their decay is in fp32 whatever the model is in: it is made again from slopes rounded as ours are.

    Gates of experts are in fp32 there, too; where the expert is the only one, its gate is 1 all the same.
    """
    built = minimax_architecture() if experts == 1 else minimax_architecture("moe", **mixture(experts))
    rounding = 1e-10 if experts == 1 else 1e-5
    source = theirs("MiniMaxForCausalLM", **MINIMAX | mixture_settings(experts))
    source.set_experts_implementation("eager")
    for layer in source.model.layers:
        if layer.block_type == "linear_attention":
            slopes = decay_slopes("alibi_layer_minimax", 6, layer.layer_idx, len(MINIMAX_LAYERS))
            rates = torch.tensor(slopes).double()[:, None, None]
            for name, value in zip(MINIMAX_BUFFERS, (rates, *layer.self_attn.decay_factors(rates)), strict=True):
                getattr(layer.self_attn, name).copy_(value)
    source.save_pretrained(tmp_path)
    tokens = torch.randint(VOCAB, (2, 29))
    cache = Cache()
    with torch.no_grad():
        wanted = source(input_ids=tokens).logits
        ours = native(built, from_hf(load_file(tmp_path / "model.safetensors"), built, "minimax"))
        torch.testing.assert_close(ours(tokens), wanted, rtol=rounding, atol=rounding)
        steps = [ours(part, cache=cache) for part in (tokens[:, :11], *tokens[:, 11:].split(1, dim=1))]
        torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("experts", [1, 4])
def test_minimax_into_a_folder_of_transformers(experts: int, tmp_path: Path) -> None:
    """In fp32, with nothing of theirs exchanged: the folder has all that it takes."""
    built = minimax_architecture() if experts == 1 else minimax_architecture("moe", **mixture(experts))
    tensors = {name: 0.3 * tensor.float() for name, tensor in random_parameters(built).items()}
    save_file(to_hf(tensors, built, "minimax"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers.MiniMaxConfig(**(SHAPE | MINIMAX | mixture_settings(experts))).save_pretrained(tmp_path)
    model, loaded = transformers.MiniMaxForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert {name.rpartition(".")[2] for name in loaded["missing_keys"]} == set(MINIMAX_BUFFERS)
    tokens = torch.randint(VOCAB, (2, 29))
    with torch.no_grad():
        wanted = native(built, tensors).float()(tokens)
        found = model.eval()(input_ids=tokens).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_minimax_packs_queries_keys_and_values_head_by_head_and_back() -> None:
    built = minimax_architecture()
    tensors = random_parameters(built)
    written = to_hf(tensors, built, "minimax")
    packed = written["model.layers.2.self_attn.qkv_proj.weight"].view(6, 3, 10, D)
    for part, x in enumerate("qkv"):
        for head in range(6):
            rows = slice(10 * head, 10 * (head + 1))
            assert torch.equal(packed[head, part], tensors[f"layers.2.mixer.{x}.weight"][rows])
    buffers = {f"model.layers.2.self_attn.{name}": torch.ones(6) for name in MINIMAX_BUFFERS}
    again = from_hf(written | buffers, built, "minimax")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_minimax_has_a_router_beside_each_expert_and_no_buffers() -> None:
    built = minimax_architecture()
    written = to_hf({name: tensor.bfloat16() for name, tensor in random_parameters(built).items()}, built, "minimax")
    for layer in range(len(MINIMAX_LAYERS)):
        router = written[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.equal(router, torch.zeros(1, D, dtype=torch.bfloat16))
    assert not [name for name in written if name.endswith(MINIMAX_BUFFERS)]
    dense = minimax_architecture("sglu")
    assert not [name for name in to_hf(random_parameters(dense), dense, "minimax") if "moe" in name]


def test_several_experts_in_place_of_one_are_refused() -> None:
    built = minimax_architecture()
    written = to_hf(random_parameters(built), built, "minimax")
    written["model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(8, D)
    with pytest.raises(ValueError, match=r"layers\.1\..* chooses among 8 experts, .* num_local_experts = 8 would say"):
        from_hf(written, built, "minimax")


def test_a_router_of_several_experts_is_a_parameter() -> None:
    built = minimax_architecture("moe", **mixture(4))
    tensors = random_parameters(built)
    written = to_hf(tensors, built, "minimax")
    again = from_hf(written, built, "minimax")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    del written["model.layers.2.block_sparse_moe.gate.weight"]
    del written["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    with pytest.raises(ValueError, match=r"missing from the checkpoint: .*experts\.3\.w1\..*layers\.2\..*gate\.weight"):
        from_hf(written, built, "minimax")


def test_a_hybrid_keeps_every_layers_own_names() -> None:
    tables = {
        "model": {"d_model": D, "num_layers": 4, "vocab_size": VOCAB, "pattern": ["lightning", "softmax"]},
        "mixers": {"lightning": {"num_heads": 4}, "softmax": {"num_heads": 4}},
        "feedforwards": {"swiglu": {"d_ff": 48}},
    }
    _, built = build_architecture(tables, [])
    assert built is not None
    tensors = random_parameters(built)
    written = to_hf(tensors, built, "llama")
    assert written["model.layers.2.token_mixer.qkvu_proj.weight"].shape == (4 * D, D)
    assert written["model.layers.3.self_attn.q_proj.weight"].shape == (D, D)
    again = from_hf(written, built, "llama")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_no_two_parameters_take_one_place() -> None:
    families = {
        "transnormer": transnormer_architecture(),
        "gpt2": gpt2_architecture(),
        "minimax": minimax_architecture(),
        "mixtral": minimax_architecture("moe", **mixture(3)),
    }
    for family, built in families.items():
        known = places(built, family)
        assert len(set(known.values())) == len(known)


def test_everything_missing_or_left_over_is_named_at_once() -> None:
    built = architecture()
    written = to_hf(random_parameters(built), built, "llama")
    del written["model.norm.weight"], written["model.layers.1.mlp.up_proj.weight"]
    written["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    written["lm_head.weight"] = torch.zeros(3, D)
    with pytest.raises(ValueError) as refusal:
        from_hf(written, built, "llama")
    said = str(refusal.value)
    assert "missing from the checkpoint: model.layers.1.mlp.up_proj.weight, model.norm.weight." in said
    assert "left over in the checkpoint" in said and "model.layers.7.mlp.up_proj.weight" in said
    assert f"lm_head.weight in the checkpoint is [3, {D}], expected [{VOCAB}, {D}]." in said


def test_an_incomplete_model_is_refused() -> None:
    built = architecture()
    tensors = random_parameters(built)
    tensors["layers.0.mixer.w.weight"] = tensors.pop("layers.0.mixer.q.weight")
    with pytest.raises(ValueError, match=r"missing from this model: layers\.0\.mixer\.q\.weight") as refusal:
        to_hf(tensors, built, "llama")
    assert "layers.0.mixer.w.weight" in str(refusal.value)


def test_a_tied_head_that_differs_is_refused() -> None:
    built = architecture(tie_embeddings=True)
    written = to_hf(random_parameters(built), built, "llama")
    written["lm_head.weight"] = written["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match=r"differs from its model\.embed_tokens\.weight"):
        from_hf(written, built, "llama")


def test_a_family_without_a_name_for_a_parameter_refuses() -> None:
    built = architecture(positions="learned", max_positions=64)
    with pytest.raises(ValueError, match=r"the family llama have no name for positions\.weight"):
        to_hf(random_parameters(built), built, "llama")


def test_unequal_parts_of_one_matrix_are_refused() -> None:
    wide_values = transnormer_architecture(value_head_dim=10)
    with pytest.raises(ValueError, match=r"packs 4 matrices of one shape.*layers\.0\.mixer\.v\.weight \[40, 32\]"):
        places(wide_values, "transnormer")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="the nearest is llama"):
        places(architecture(), "lama")
