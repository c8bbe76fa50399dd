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


def transformer_config(arguments: dict[str, Any], tp: int = 1, pp: int = 1) -> Any:
    """megatron-core's settings, from Megatron-LM's arguments as Megatron-LM understands them; nothing fused or dropped.

    This goes by the arguments in the checkpoint and not by what Headway makes of them, which it is there to check.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    has = arguments.get
    bias = has("add_bias_linear", True)
    return TransformerConfig(
        num_layers=has("num_layers"),
        hidden_size=has("hidden_size"),
        ffn_hidden_size=has("ffn_hidden_size"),
        num_attention_heads=has("num_attention_heads"),
        num_query_groups=has("num_query_groups") if has("group_query_attention") else None,
        kv_channels=has("kv_channels"),
        qk_layernorm=has("qk_layernorm", False),
        normalization=has("normalization", "LayerNorm"),
        layernorm_epsilon=has("norm_epsilon") or has("layernorm_epsilon") or 1e-5,
        add_bias_linear=bias,
        add_qkv_bias=has("add_qkv_bias", False),
        gated_linear_unit=has("swiglu", False),
        activation_func=_activation(arguments, bias),
        rotary_interleaved=has("rotary_interleaved", False),
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


def _activation(arguments: dict[str, Any], bias: bool) -> Any:
    """Megatron's fused bias and GELU, and `--openai-gelu`, are the tanh approximation; its plain GELU is exact."""
    if arguments.get("swiglu"):
        return F.silu
    fused = arguments.get("bias_gelu_fusion", True) and bias
    return partial(F.gelu, approximate="tanh") if fused or arguments.get("openai_gelu") else F.gelu


def build(request: dict[str, Any], *, first: bool = True, last: bool = True) -> Any:
    """The GPTModel, or a stage of it; `stages` in the request says of how many."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    has = request["arguments"].get
    config = transformer_config(request["arguments"], request["ranks"], request.get("stages", 1))
    kind = "rope" if has("use_rotary_position_embeddings") else has("position_embedding_type", "learned_absolute")
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization),
        vocab_size=request["rows"],
        max_sequence_length=has("max_position_embeddings") or len(request["tokens"][0]),
        pre_process=first,
        post_process=last,
        position_embedding_type=kind,
        rotary_percent=has("rotary_percent") or 1.0,
        rotary_base=has("rotary_base") or 10000,
        share_embeddings_and_output_weights=not has("untie_embeddings_and_output_weights"),
        parallel_output=False,
    ).eval()


def load_distributed(model: Any, folder: Path, *, everything: bool, numbered: bool = False) -> None:
    """Weights, as megatron-core loads them.

    Args:
        everything: also what modules keep beside weights.
        numbered: layers lie in the checkpoint each by itself.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": numbered})
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
        load_distributed(model, folder, everything=request["ours"], numbered=request["numbered"])
    else:
        load_rank(model, folder, rank)
    if request["round_to"]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, request["round_to"])))
    return logits(model, torch.tensor(request["tokens"]))[..., : request["vocab_size"]]


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
