"""Faults of tensor, sequence and pipeline parallelism, and of what they do together with data parallelism."""

from __future__ import annotations

from tests.conformance.test_layouts import FOURS, ONE_BY_ONE
from tests.mutations.fault import Fault

MATRIX = "tests/conformance/test_layouts.py::test_a_layout_equals_one_process"


def cells(kind: str, *names: str) -> list[str]:
    """Tests of the matrix: one mixer in these layouts, alone or with others in one model."""
    several = next(kinds for kinds in FOURS if kind in kinds.split("+"))
    return [f"{MATRIX}[{kind if (kind, name) in ONE_BY_ONE else several}-{name}]" for name in names]


MUON = [
    "tests/parallel/test_muon.py::test_a_matrix_that_is_cut_gets_the_update_of_the_whole_one[shares in pieces]",
    "tests/conformance/test_layouts.py::test_muon_in_a_layout_equals_one_process[softmax-tp2 x fsdp2]",
]


FAULTS = [
    Fault(
        "decay slopes from the local head index",
        "parallel/tensor.py",
        [("buffer[share.start : share.stop].clone()", "buffer[: len(share)].clone()")],
        cells("lightning", "tp2"),
    ),
    Fault(
        "a norm over local heads",
        "parallel/tensor.py",
        [
            (
                "    norm = DeferredNorm(plain)\n    setattr(layer, layer.full_width_norm, norm)\n",
                "    plain.width = plain.width // 2\n    return None\n",
            )
        ],
        cells("lightning", "tp2"),
    ),
    Fault(
        "a norm's sum of squares that is not summed",
        "parallel/norms.py",
        [("rsqrt(squares / self.width", "rsqrt(squares.detach() / self.width")],
        cells("norm_linear", "tp2"),
    ),
    Fault(
        "a tied embedding whose head does not add its gradient",
        "parallel/spread.py",
        [("                local(original.grad).add_(received)\n", "                pass\n")],
        cells("softmax", "pp2"),
    ),
    Fault(
        "a tied head that does not follow the embedding",
        "trainer/step.py",
        [("            self.model.finish_update()\n", "")],
        cells("softmax", "pp2"),
    ),
    Fault(
        "a tied head that does not follow the embedding after a resume",
        "trainer/checkpoint.py",
        [("    model.update_copies()\n    return Counters", "    return Counters")],
        ["tests/conformance/test_layout_checkpoints.py"],
    ),
    Fault(
        "micro-batches averaged instead of weighted",
        "parallel/spread.py",
        [("(total * scale)", "(total / part.counted.sum() / self.layout.microbatches)")],
        cells("softmax", "fsdp4"),
    ),
    Fault(
        "micro-batches of a pipeline averaged instead of weighted",
        "parallel/pipeline.py",
        [
            (
                "return nats_BN.sum() * self._scale",
                "return nats_BN.sum() / (targets != IGNORED).sum() / self.layout.microbatches",
            )
        ],
        cells("softmax", "pp2"),
    ),
    Fault(
        "a pipeline's gradients divided by its micro-batches",
        "parallel/pipeline.py",
        [("scale_grads=False", "scale_grads=True")],
        cells("softmax", "pp2"),
    ),
    Fault(
        "parameters put back between forward and backward under zero bubbles",
        "parallel/spread.py",
        [("keep_gathered=layout.pp > 1", "keep_gathered=False")],
        [f"tests/conformance/test_layouts.py::test_a_product_equals_one_process[{FOURS[0]}-pp2 zbv x fsdp2]"],
    ),
    Fault(
        "stages without shapes, which torch then finds out by a hidden step",
        "parallel/pipeline.py",
        [("output_args=self._logits(rows, n) if stage.is_last else stream,", "output_args=None,")],
        ["tests/parallel/test_pipeline.py"],
    ),
    Fault(
        "documents that do not reach the stages",
        "parallel/pipeline.py",
        [("if batch.documents is not None:", "if False:")],
        cells("softmax", "pp2"),
    ),
    Fault(
        "documents that do not reach the stages in evaluation",
        "parallel/pipeline.py",
        [("documents=part.documents,", "documents=None,")],
        cells("softmax", "pp2"),
    ),
    Fault(
        "gradients of what heads share, not summed over ranks",
        "parallel/tensor.py",
        [("            cuts.summed.add(prefix + name)\n", "            pass\n")],
        cells("norm_linear", "tp2"),
    ),
    Fault(
        "gradients of norms on pieces of the sequence, not summed",
        "parallel/tensor.py",
        [("    if region.cuts_sequence:\n        layers", "    if False:\n        layers")],
        cells("softmax", "tp2"),
    ),
    Fault(
        "a bias that every tensor-parallel rank adds",
        "parallel/tensor.py",
        [
            ("partial = F.linear(x, self.weight)", "partial = F.linear(x, self.weight, self.bias)"),
            ("return out if self.bias is None else out + self.bias", "return out"),
        ],
        cells("softmax", "tp2"),
    ),
    Fault(
        "a target taken from every part of the vocabulary",
        "parallel/vocabulary.py",
        [(" - top_T1)[:, 0] * inside_T", " - top_T1)[:, 0]")],
        ["tests/parallel/test_tensor.py", *cells("softmax", "tp2")],
    ),
    Fault(
        "the loss counted once for each tensor-parallel rank",
        "parallel/spread.py",
        [('return self.mesh.rank("tp") == 0', "return True")],
        cells("softmax", "tp2"),
    ),
    Fault(
        "tokens counted once for each piece of the sequence",
        "parallel/mesh.py",
        [('== self.rank("cp") ==', "==")],
        cells("softmax", "cp2"),
    ),
    Fault(
        "tokens counted once for each rank",
        "parallel/mesh.py",
        [('return self.rank("pp") == self.rank("cp") == self.rank("tp") == 0', "return True")],
        cells("softmax", "tp2"),
    ),
    Fault(
        "replicas that train on the same rows",
        "parallel/mesh.py",
        [
            (
                'return self.rank("dp_replicate") * self.layout.dp_shard + self.rank("dp_shard")',
                'return self.rank("dp_shard")',
            )
        ],
        cells("softmax", "replicate2", "hsdp2x2"),
    ),
    Fault(
        "a gradient norm that counts what all ranks hold alike each time",
        "parallel/gradients.py",
        [("return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in alike)", "return True")],
        cells("softmax", "tp2"),
    ),
    Fault(
        "tensor-parallel shares saved as if they were whole",
        "parallel/spread.py",
        [("            placements[1] = Shard(dimension)\n", "            pass\n")],
        ["tests/conformance/test_layout_checkpoints.py"],
    ),
    Fault(
        "Muon's iteration on a share of the matrix",
        "parallel/muon.py",
        [
            (
                "        matrix = holders.gather(pieces, shape, dimension)\n"
                "        if holders.index < len(names):\n"
                "            matrix = orthogonalise(matrix, self.ns_steps)\n"
                "        return holders.hand_out(matrix, dimension)\n",
                "        return torch.stack([orthogonalise(piece, self.ns_steps) for piece in pieces])\n",
            )
        ],
        MUON,
    ),
    Fault(
        "Muon's learning rate by the shape of a share",
        "parallel/muon.py",
        [
            (
                "learning_rate_factor(self.model.cuts.shapes[name], self.adjust_lr)",
                "learning_rate_factor(local(self.model.parameters[name]).shape, self.adjust_lr)",
            )
        ],
        MUON,
    ),
    Fault(
        "Muon's update taken from one replica only",
        "parallel/muon.py",
        [("            dist.broadcast(tensor, group=self._replica_group, group_src=replica)\n", "            pass\n")],
        ["tests/conformance/test_layouts.py::test_muon_in_a_layout_equals_one_process[lightning-hsdp2x2]"],
    ),
    Fault(
        "Muon's momentum not resumed",
        "trainer/checkpoint.py",
        [("for key, value in state.items()\n", 'for key, value in state.items() if key != "momentum_buffer"\n')],
        ["tests/conformance/test_layout_checkpoints.py::test_muon_continues_bit_for_bit"],
    ),
    Fault(
        "Muon's momentum saved by a share as if it were whole",
        "trainer/checkpoint.py",
        [("value if value.ndim == 0 else model.whole(name, value)", "value")],
        ["tests/conformance/test_layout_checkpoints.py::test_muon_continues_in_another_layout"],
    ),
    Fault(
        "gates of the local instead of the global heads",
        "parallel/tensor.py",
        [("others[2] = gates[..., share.start : share.stop]", "others[2] = gates[..., : len(share)]")],
        ["tests/parallel/test_tensor.py"],
    ),
    Fault(
        "statistics rounded to the type of the message",
        "parallel/norms.py",
        [("while len(terms) < 3 and", "while False and")],
        ["tests/parallel/test_tensor.py"],
    ),
    Fault(
        "a state that is not passed over a cut",
        "model/layer.py",
        [("return ctx.cut.states(own(), slopes_H, ctx.positions.shape[1])", "return None")],
        cells("lightning", "cp2"),
    ),
    Fault(
        "a state passed on without its decay",
        "parallel/context.py",
        [("* torch.exp(-slopes[indices].to(state.dtype) * (n * between))[:, None, None]", "* 1.0")],
        cells("lightning", "cp4"),
    ),
    Fault(
        "a state passed only from the neighbour",
        "parallel/context.py",
        [("if slope * tokens <= VANISHED[dtype]]", "if slope * tokens <= 0]")],
        cells("lightning", "cp4"),
    ),
    Fault(
        "states that have vanished sent all the same",
        "parallel/context.py",
        [("if slope * tokens <= VANISHED[dtype]]", "if True]")],
        ["tests/parallel/test_context.py"],
    ),
    Fault(
        "a state passed into the document after its own",
        "parallel/context.py",
        [("        if connected is not None:\n", "        if False:\n")],
        cells("lightning", "cp2"),
    ),
    Fault(
        "gradients of states that stop at a cut",
        "parallel/context.py",
        [("back = exchange_states(grad.contiguous()", "back = exchange_states(0 * grad")],
        cells("lightning", "cp2"),
    ),
    Fault(
        "gradients of states that go on forwards",
        "parallel/context.py",
        [("*ctx.rest, not ctx.backwards)", "*ctx.rest, ctx.backwards)")],
        cells("lightning", "cp2"),
    ),
    Fault(
        "positions that restart at a cut",
        "model/batch.py",
        [
            (
                "{name: piece(tensor) for",
                '{name: tensor[:, : piece(tensor).shape[1]] if name == "positions" else piece(tensor) for',
            )
        ],
        cells("softmax", "cp2"),
    ),
    Fault(
        "default positions that restart at a cut",
        "model/stack.py",
        [("positions=(steps + first)", "positions=(steps + 0)")],
        ["tests/parallel/test_context.py"],
    ),
    Fault(
        "keys of a piece alone",
        "model/mixers/attention.py",
        [
            ("ctx.cut.keys_values(k_BNGd, v_BNGd, ctx.causal)", "(k_BNGd, v_BNGd)"),
            ("ctx.key_documents[:, :m]", "ctx.key_documents[:, ctx.first_index : m]"),
            ("return Visible(n, m, ctx.first_index,", "return Visible(n, n, 0,"),
        ],
        cells("softmax", "cp2"),
    ),
    Fault(
        "documents of a piece alone",
        "model/stack.py",
        [("cut=self.cut.over(documents),", "cut=self.cut.over(None),")],
        cells("lightning", "cp2"),
    ),
    Fault(
        "the nats of one piece of the sequence",
        "parallel/spread.py",
        [('return self.mesh.rank("tp") == 0', 'return self.mesh.rank("tp") == self.mesh.rank("cp") == 0')],
        cells("softmax", "cp2"),
    ),
    Fault(
        "gradients divided by dp where pieces of the sequence are summed as well",
        "parallel/spread.py",
        [
            (
                "return self.mesh.data.size() if isinstance(self.stages[0], FSDPModule) else 1",
                "return self.layout.data_parallel if isinstance(self.stages[0], FSDPModule) else 1",
            )
        ],
        cells("softmax", "cp2"),
    ),
    Fault(
        "states asked for again by recomputation",
        "parallel/recompute.py",
        [("_CROSSED if model.cut.size > 1 else None", "None")],
        ["tests/parallel/test_context.py"],
    ),
    Fault(
        "heads traded back in another order",
        "parallel/collectives.py",
        [("return torch.cat(received.unbind(), dim=joined)", "return torch.cat(received.unbind()[::-1], dim=joined)")],
        ["tests/parallel/test_context.py"],
    ),
]
