"""What megatron-core makes of a checkpoint, in a process of its own for each tensor-parallel rank.

    python -P probe.py REQUEST.json RANK

The model is megatron-core's GPTModel with its local layers, initialised on the CPU; weights are loaded by its own
means, and all arithmetic is its own. Three calls that want CUDA have others in their place: the current device is the
CPU, there is nothing to wait for, and dropout, of which there is none, has no generator to choose.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _NoGenerators:
    def fork(self, *_: Any) -> Any:
        return contextlib.nullcontext()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """With something in the place of the calls that want CUDA."""
    from megatron.core import tensor_parallel

    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_: None),
        (tensor_parallel, "get_cuda_rng_tracker", lambda *_, **__: _NoGenerators()),
    ]
    theirs = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
    try:
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        yield
    finally:
        for module, name, function in theirs:
            setattr(module, name, function)


def transformer_config(tables: dict[str, Any], tp: int = 1, pp: int = 1) -> Any:
    """megatron-core's settings of a model that our tables describe: nothing fused, nothing dropped."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    model, mixer = tables["model"], tables["mixers"]["softmax"]
    gated = "swiglu" in tables["feedforwards"]
    (feedforward,) = tables["feedforwards"].values()
    gelu = partial(F.gelu, approximate="tanh" if feedforward.get("tanh") else "none")
    return TransformerConfig(
        num_layers=model["num_layers"],
        hidden_size=model["d_model"],
        ffn_hidden_size=feedforward["d_ff"],
        num_attention_heads=mixer["num_heads"],
        num_query_groups=mixer["num_kv_heads"],
        kv_channels=mixer["head_dim"],
        qk_layernorm=mixer["qk_norm"],
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model["norm"]],
        layernorm_epsilon=model["norm_eps"],
        add_bias_linear=model["bias"],
        add_qkv_bias=mixer["qkv_bias"] and not model["bias"],
        gated_linear_unit=gated,
        activation_func=F.silu if gated else gelu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def build(request: dict[str, Any], *, first: bool = True, last: bool = True) -> Any:
    """The GPTModel, or a stage of it; `stages` in the request says of how many."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    tables = request["tables"]
    model, mixer = tables["model"], tables["mixers"]["softmax"]
    kinds = {"learned": "learned_absolute", "rope": "rope", "none": "none"}
    config = transformer_config(tables, request["ranks"], request.get("stages", 1))
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=mixer["qk_norm"], normalization=config.normalization),
        vocab_size=request["rows"],
        max_sequence_length=model["max_positions"] or len(request["tokens"][0]),
        pre_process=first,
        post_process=last,
        position_embedding_type=kinds[model["positions"]],
        rotary_base=mixer["rope_theta"],
        share_embeddings_and_output_weights=model["tie_embeddings"],
        parallel_output=False,
    ).eval()


def load_distributed(model: Any, folder: Path, everything: bool) -> None:
    """Weights, and with `everything` what modules keep beside them, as megatron-core loads them."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = model.sharded_state_dict()
    if not everything:
        state = {name: one for name, one in state.items() if not isinstance(one, ShardedObject)}
    _load(model, dist_checkpointing.load({"model": state}, str(folder))["model"])


def load_rank(model: Any, folder: Path, rank: int) -> None:
    """Weights of one tensor-parallel rank, all stages, from their files as they are."""
    from model.megatron.names import local_name
    from model.megatron.ranks import RankFiles

    shards = {local_name(name): one[rank] for name, one in RankFiles(folder).shards.items()}
    if model.share_embeddings_and_output_weights:
        shards.pop("output_layer.weight", None)
    _load(model, shards)


def _load(model: Any, state: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise ValueError(f"missing: {missing}; without a place: {unexpected}")


def logits(model: Any, tokens: Tensor) -> Tensor:
    """`[B, N, rows]` in fp32."""
    n = tokens.shape[1]
    hidden = ~torch.ones(n, n, dtype=torch.bool).tril()
    with torch.no_grad():
        return model(tokens, torch.arange(n).expand_as(tokens), hidden[None, None]).float()


def answer(request: dict[str, Any], rank: int) -> Tensor:
    """Logits `[B, N, vocab]` in fp32, in a process group of all ranks."""
    folder = Path(request["folder"])
    model = build(request)
    if request["distributed"]:
        load_distributed(model, folder, request["ours"])
    else:
        load_rank(model, folder, rank)
    if request["round_to"]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, request["round_to"])))
    return logits(model, torch.tensor(request["tokens"]))[..., : request["tables"]["model"]["vocab_size"]]


def main(request_path: str, rank: int) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    ranks = request["ranks"]
    if ranks > 1:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(request["meeting"], ranks), rank=rank, world_size=ranks)
    from megatron.core import parallel_state
    from safetensors.torch import save_file

    try:
        with on_cpu():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
            found = answer(request, rank)
        if rank == 0:
            save_file({"logits": found.contiguous()}, request["answer"])
        dist.barrier()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
