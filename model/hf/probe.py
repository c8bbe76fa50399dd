"""What transformers makes of a folder, in a process of its own where Headway cannot be imported.

    python -P probe.py REQUEST.json ANSWER.safetensors

REQUEST: `folder`, `tokens` [B][N], `modalities` (the same, or null), `round_to` (a dtype name or null), `wide` (endings
of names that are not rounded), `texts`, `blocked` (packages), `trust` (run the folder's own code). ANSWER: `logits`
[B, N, vocab] in fp32, and the ids of the texts as metadata.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class _Without:
    """A finder of modules that finds nothing of the packages named: an export must not need them."""

    def __init__(self, finder: Any, packages: list[str]):
        self.finder, self.packages = finder, packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.packages else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def answer(request: dict[str, Any]) -> tuple[Any, list[list[int]] | None]:
    """(logits, ids of the texts), computed by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request["folder"]
    ids = None
    if request["texts"]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=request["trust"])
        ids = tokenizer(request["texts"], add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=request["trust"]).eval()
    if request["round_to"]:
        kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in kept and not name.endswith(tuple(request["wide"])):
                    parameter.copy_(parameter.to(getattr(torch, request["round_to"])))
    more = {} if request["modalities"] is None else {"modalities": torch.tensor(request["modalities"])}
    with torch.no_grad():
        # Without a cache: the one of MiniMax counts positions wrongly where its first layer is linear.
        return model(input_ids=torch.tensor(request["tokens"]), use_cache=False, **more).logits.float(), ids


def main(request_path: str, answer_path: str) -> None:
    with open(request_path, encoding="utf-8") as stream:
        request = json.load(stream)
    sys.meta_path = [_Without(finder, request["blocked"]) for finder in sys.meta_path]
    from safetensors.torch import save_file

    logits, ids = answer(request)
    save_file({"logits": logits.contiguous()}, answer_path, metadata={"ids": json.dumps(ids)})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
