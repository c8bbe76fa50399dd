"""megatron-core as a user of it: in processes of its own, it loads a checkpoint of ours and writes its own ones.

    python -P megatron_writer.py REQUEST.json RANK

REQUEST: as for `model/megatron/probe.py`, with `tp`, `pp`, `out`. Its GPTModel is cut over tp x pp ranks and loads the
distributed checkpoint; then it is written as `out/distributed` and `out/numbered` by its `dist_checkpointing.save`, and
as `out/ranks` in the files of ranks that Megatron-LM writes with `--ckpt-format torch`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from model.megatron import probe


def write(request: dict[str, Any], rank: int) -> None:
    from megatron.core import parallel_state

    tp, pp, out = request["tp"], request["pp"], Path(request["out"])
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = probe.build(request | {"ranks": tp, "stages": pp}, first=stage == 0, last=stage == pp - 1)
    probe.load_distributed(model, Path(request["folder"]), everything=True)
    common = torch.load(Path(request["folder"]) / "common.pt", weights_only=True)
    common["args"].tensor_model_parallel_size, common["args"].pipeline_model_parallel_size = tp, pp

    files = out / "ranks" / "iter_0000100"
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}" + (f"_{stage:03d}" if pp > 1 else "")
    (files / name).mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict_for_save_checkpoint())
    torch.save(common | {"model": state, "iteration": 100}, files / name / "model_optim_rng.pt")
    save(out / "distributed", common, model.sharded_state_dict())
    # Newer ones have layers each by itself; and a run that goes on has more in it.
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    save(out / "numbered", common, state, rank, tp * pp)
    (out / "ranks" / "latest_checkpointed_iteration.txt").write_text("100")


def save(folder: Path, common: dict[str, Any], state: dict[str, Any], rank: int = 0, ranks: int = 0) -> None:
    """Write a distributed checkpoint; with `ranks`, also something of an optimizer and of generators."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    beside: dict[str, Any] = {}
    if ranks:
        moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.w", torch.ones(4), (0, rank, ranks))
        generator = ShardedObject("rng_state", [torch.get_rng_state()], (ranks,), (rank,))
        beside = {"optimizer": moment, "rng_state": generator}
    place = folder / "iter_0000100"
    place.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(common | beside | {"model": state, "iteration": 100}, str(place))
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    dist.barrier()


if __name__ == "__main__":
    asked, this = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    torch.set_num_threads(1)
    count = asked["tp"] * asked["pp"]
    dist.init_process_group("gloo", store=dist.FileStore(asked["meeting"], count), rank=this, world_size=count)
    # A head that is tied across stages is moved to the GPU as soon as it is made.
    with probe.on_cpu(), patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        write(asked, this)
    dist.destroy_process_group()
