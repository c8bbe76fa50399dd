"""The models that `train_step.py` trains, and one step of each: ours, transformers', and linear attention of ours.

Nothing here needs more than torch and Headway's lower floors; transformers is imported for its own model alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZE_KEYS = ("d_model", "num_layers", "num_heads", "d_ff", "vocab_size", "seq_len", "batch_size")
SIZES = {
    name: dict(zip(SIZE_KEYS, numbers, strict=True))
    for name, numbers in {
        "tiny": (128, 2, 4, 384, 512, 64, 4),
        "cpu": (512, 8, 8, 1408, 8192, 512, 4),
        "gpu": (2048, 22, 32, 5632, 32000, 2048, 4),
        # 1.06e9 parameters with softmax attention, 1.13e9 with lightning: 16384 tokens a step fit into 80 GB without
        # recomputation.
        "1b": (2048, 18, 16, 5632, 32000, 8192, 2),
        "1b-tiny": (64, 2, 2, 96, 128, 64, 2),
    }.items()
}
MASTERED = ("1b", "1b-tiny")
"""Sizes whose bf16 weights stand beside fp32 ones, which the optimizer updates; of the others bf16 is all there is."""
FAMILIES = ("headway", "transformers", "lightning")
HOWS = ("eager", "compiled")
BETAS, LR, DECAY, CLIP = (0.9, 0.95), 3e-4, 0.1, 1.0


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_tables(size: dict[str, int], family: str = "headway") -> dict[str, Any]:
    """The model's sections of a configuration: Llama's, or TransNormerLLM's of the same widths."""
    shape = {key: size[key] for key in ("d_model", "num_layers", "vocab_size")}
    if family == "lightning":
        return {
            "model": shape | {"pattern": ["lightning"], "positions": "none", "norm": "srmsnorm"},
            "mixers": {"lightning": {"num_heads": size["num_heads"]}},
            "feedforwards": {"sglu": {"d_ff": size["d_ff"]}},
        }
    return {
        "model": shape | {"pattern": ["softmax"]},
        "mixers": {"softmax": {"num_heads": size["num_heads"]}},
        "feedforwards": {"swiglu": {"d_ff": size["d_ff"]}},
    }


def architecture_of(tables: dict[str, Any]) -> Any:
    """As `model.settings.build_architecture`, of tables that are known to be right: needs no pydantic."""
    from model.config import Architecture, ModelConfig
    from model.registry import find_layer

    layers: dict[str, dict[str, Any]] = {"mixers": {}, "feedforwards": {}}
    for section, found in layers.items():
        for name, settings in tables[section].items():
            layer = find_layer(section, name, name, allow_code=False)
            found[name] = (layer, layer.Config(**settings))
    architecture = Architecture(ModelConfig(**tables["model"]), layers["mixers"], layers["feedforwards"])
    if faults := architecture.resolve():
        raise ValueError(" ".join(faults))
    return architecture


def build_ours(size: dict[str, int], family: str = "headway") -> Any:
    """Headway's model on the device, in fp32."""
    import torch

    from model.initialisation import Constant, Normal, all_inits
    from model.stack import Model

    with torch.device("meta"):
        model = Model(architecture_of(model_tables(size, family)))
    inits = all_inits(model)
    model.to_empty(device=device())
    torch.manual_seed(0)
    with torch.no_grad():
        # Drawn where they stand: a run's own values, which no layout changes, are drawn on the CPU and take long.
        for name, parameter in model.named_parameters():
            init = inits[name]
            if isinstance(init, Normal):
                parameter.normal_(0.0, init.std)
            elif isinstance(init, Constant):
                parameter.fill_(init.value)
            else:
                parameter.copy_(init.values(parameter.shape))
    return model


def build_theirs(size: dict[str, int]) -> Any:
    """The same Llama of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    settings: dict[str, Any] = {name: size[key] for name, key in zip(names, SIZE_KEYS, strict=False)}
    settings |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    settings |= {"max_position_embeddings": size["seq_len"], "use_cache": False, "attn_implementation": "sdpa"}
    config = LlamaConfig(**settings)
    torch.manual_seed(0)
    with device():
        return LlamaForCausalLM(config).train()


def build(family: str, size: dict[str, int]) -> Any:
    return build_theirs(size) if family == "transformers" else build_ours(size, family)


def random_tokens(size: dict[str, int]) -> Any:
    """int64 [B, N + 1]."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (size["batch_size"], size["seq_len"] + 1)
    return torch.randint(size["vocab_size"], shape, generator=generator).to(device())


def flops_of_step(family: str, size: dict[str, int]) -> float:
    """Forward and backward of the model, by the rules of `model.layer`: what MFU counts."""
    import torch

    from model.stack import Model
    from trainer.throughput import training_flops_per_token

    with torch.device("meta"):
        model = Model(architecture_of(model_tables(size, "headway" if family == "transformers" else family)))
    return training_flops_per_token(model.flops(size["seq_len"])) * size["batch_size"] * size["seq_len"]


class Updates:
    """Clipping and torch's fused AdamW; with `mastered`, of fp32 weights that the model's are rounded from."""

    def __init__(self, model: Any, *, mastered: bool):
        import torch

        self.parameters = list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters] if mastered else self.parameters
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)

    def __call__(self) -> None:
        import torch

        gradients = [p.grad for p in self.parameters]
        mastered = self.masters is not self.parameters
        if mastered:
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if mastered:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self.parameters], self.masters)
            for p in self.parameters:
                p.grad = None


def mean_nats(family: str, called: Any, model: Any, tokens: Any, targets: Any, *, fused: bool) -> Any:
    """The loss; where it is `fused`, without logits."""
    import torch.nn.functional as F

    if fused:
        from kernels.fused.cross_entropy import linear_cross_entropy

        hidden = model.final_norm(model.hidden(tokens)).flatten(0, 1)
        return linear_cross_entropy(hidden, model.head.weight, targets)[0] / len(targets)
    logits = called(input_ids=tokens).logits if family == "transformers" else called(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets)


def make_step(
    family: str, size: dict[str, int], *, compiled: bool, mastered: bool = False
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """One training step of one of the models, on the same batch whenever it is called; and what it is made of."""
    import torch

    from parallel.recompute import compile_blocks

    model = build(family, size)
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if mastered or device().type == "cuda":
        model.to(torch.bfloat16)
    update = Updates(model, mastered=mastered)
    if compiled and family != "transformers":
        compile_blocks(model)
    called = torch.compile(model) if compiled and family == "transformers" else model
    # As runs have it.
    fused = family != "transformers"
    facts |= {"weights": "bf16 and fp32" if mastered else "as the model", "head": "fused" if fused else "logits"}
    batch = random_tokens(size)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].flatten()

    def step() -> Any:
        loss = mean_nats(family, called, model, tokens, targets, fused=fused)
        loss.backward()
        update()
        return loss.detach()

    return step, facts
