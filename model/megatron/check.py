"""What megatron-core itself computes from a checkpoint: its own GPTModel, built by its own specs, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.megatron.distributed import DistributedFiles
from model.megatron.folder import MegatronFolder

PROBE = Path(__file__).with_name("probe.py")


def ask_megatron(
    source: MegatronFolder, tokens: Tensor, *, ours: bool = False, round_to: torch.dtype | None = None
) -> Tensor:
    """Logits `[B, N, vocab]` in fp32 that megatron-core computes, in one process for each tensor-parallel rank.

    The weights reach its model in its own way: from a distributed checkpoint through its `dist_checkpointing.load`,
    from files of ranks as they are in that rank's. What it does on the CPU is its own but for three calls of CUDA
    (`probe.py` says which).

    Args:
        ours: whether we have written the checkpoint: then everything in it is read by megatron-core; else only what
            cannot hold code, and arguments are ours.
        round_to: weights are rounded to this before they compute.

    Raises:
        ValueError: megatron-core cannot load it, with the last line of what was said.
    """
    tp = source.files.tp
    with tempfile.TemporaryDirectory() as temporary:
        folder = source.folder
        if not ours and isinstance(source.files, DistributedFiles):
            folder = _without_pickles(folder, Path(temporary) / "checkpoint")
        content = {
            "folder": str(folder.resolve()),
            "arguments": plain(source.arguments),
            "vocab_size": source.tables["model"]["vocab_size"],
            "rows": source.rows,
            "ranks": tp,
            "distributed": isinstance(source.files, DistributedFiles),
            "numbered": isinstance(source.files, DistributedFiles) and source.files.numbered,
            "ours": ours,
            "tokens": tokens.tolist(),
            "round_to": None if round_to is None else str(round_to).removeprefix("torch."),
            "meeting": f"{temporary}/meeting",
            "answer": f"{temporary}/answer.safetensors",
        }
        request = Path(temporary) / "request.json"
        request.write_text(json.dumps(content), encoding="utf-8")
        try:
            run_ranks(PROBE, request, tp)
        except ChildProcessError as fault:
            raise ValueError(f"megatron-core cannot compute from {source.folder}: {fault}") from fault
        return load_file(content["answer"])["logits"]


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that are numbers, words or nothing."""
    return {name: value for name, value in arguments.items() if isinstance(value, str | int | float | None)}


def _without_pickles(folder: Path, staged: Path) -> Path:
    """The same checkpoint with nothing beside its tensors; its `.metadata` has been read with an allow-list."""
    staged.mkdir()
    for path in (*folder.glob("*.distcp"), folder / ".metadata", folder / "metadata.json"):
        os.symlink(path.resolve(), staged / path.name)
    torch.save({}, staged / "common.pt")
    return staged


def run_ranks(script: Path, request: Path, ranks: int) -> None:
    """Run `python script request RANK` for each rank at once.

    Raises:
        ChildProcessError: with the last line that the first one to fail has said; the others were ended.
    """
    home = str(Path(__file__).resolve().parent.parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    if Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    said = [request.with_name(f"said-{rank}.txt") for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    try:
        for rank, path in enumerate(said):
            command = [sys.executable, "-P", str(script), str(request), str(rank)]
            with path.open("w") as stream:
                processes.append(subprocess.Popen(command, env=environment, stderr=stream, **quiet))
        while not (failed := [rank for rank, process in enumerate(processes) if process.poll()]):
            if all(process.returncode == 0 for process in processes):
                return
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = said[failed[0]].read_text().strip().splitlines() or ["it was ended"]
    raise ChildProcessError(lines[-1])
