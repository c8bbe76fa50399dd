"""Diagnostics of attention while a model is spread: each process looks at what it holds, and all is brought together.

A forward pass like evaluation's, outside of training steps. Layers, heads and places are those of the whole model and
of whole rows, so the result is the same in every layout: tensor-parallel ranks have other heads, pipeline ranks other
layers, data-parallel ranks other rows, and context-parallel ranks other queries, which see the keys of all before them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.batch import Batch
from model.diagnostics import QUERIES, AttentionProbe, Diagnosis, Numbers, Sample, Tally
from parallel.collectives import sum_lists
from parallel.spread import Spread


@torch.no_grad()
def diagnose(model: Spread, batch: Batch, *, rows: int = 1, num_queries: int | None = QUERIES) -> Diagnosis:
    """Statistics of attention on the first rows of each data-parallel rank's share of a batch. Collective.

    Values are those of evaluation; nothing is drawn, changed or left behind. Every process gets the whole result.

    Args:
        batch: this process's share, of whole rows.
        num_queries: of each row; see `Sample.of`.
    """
    batch = batch.rows(slice(0, rows)).to(model.device)
    sample = Sample.of(batch.tokens.shape, batch.documents, model.device, num_queries)
    probe = AttentionProbe(sample, model.stream_begin(batch.tokens.shape[1]))
    model.observe(batch, probe)
    _complete_rows(model, probe)
    tally = Tally.of(probe, Numbers.of(model.uncut), model.mesh.rank("tp"))
    # By gloo, from the CPU: two messages for all of it.
    sum_lists([tally.head_sums, tally.layer_sums, tally.expert_sums], dist.group.WORLD)
    dist.all_reduce(tally.maxima, dist.ReduceOp.MAX)
    return tally.diagnosis()


def _complete_rows(model: Spread, probe: AttentionProbe) -> None:
    """What is no sum over tokens or heads (alpha of a window, the median of a row) needs whole rows first.

    Of the processes that then have the same, one keeps it: the others would count it again. Collective.
    """
    stream = [*probe.norms.values(), *probe.first_norms.values()]
    if model.stream_is_cut:
        sum_lists(stream, model.mesh.group("tp"))
    if model.layout.cp > 1:
        sum_lists([*stream, *probe.columns.values()], model.mesh.group("cp"))
    if model.mesh.rank("cp"):
        probe.columns.clear()
    if model.mesh.rank("cp") or model.mesh.rank("tp"):
        probe.norms.clear()
