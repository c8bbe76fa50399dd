"""Faults in Triton's forms, in the rule that chooses them, in the loss without logits, and around the compiler."""

from __future__ import annotations

from tests.mutations.fault import Fault

LIGHTNING = "kernels/lightning/triton_kernels.py"
LAUNCHES = "kernels/lightning/triton_form.py"
TESTS = ["tests/kernels/test_triton_lightning.py"]

FAULTS = [
    Fault(
        "kernels: a query does not see its own token",
        LIGHTNING,
        [("    seen = ahead >= 0\n    to_edge", "    seen = ahead > 0\n    to_edge")],
        TESTS,
    ),
    Fault(
        "kernels: the state enters a token late",
        LIGHTNING,
        [("if BACKWARDS else rows + 1\n    weight", "if BACKWARDS else rows\n    weight")],
        TESTS,
    ),
    Fault(
        "kernels: keys decay from the end of a full chunk",
        LIGHTNING,
        [
            (
                "distance = rows + 1 if BACKWARDS else tl.maximum(end - 1 - first - rows, 0)",
                "distance = rows + 1 if BACKWARDS else C - 1 - rows",
            )
        ],
        TESTS,
    ),
    Fault(
        "kernels: the head's number without its row",
        LIGHTNING,
        [
            (
                "row_of_batch, head = head_of_row // num_heads, head_of_row % num_heads\n    blocks_e",
                "row_of_batch, head = head_of_row // num_heads, 0\n    blocks_e",
            )
        ],
        TESTS,
    ),
    Fault(
        "kernels: documents are not told apart inside of a chunk",
        LIGHTNING,
        [("        seen = seen & (of_row[:, None] == of_row[None, :])\n        edge", "        edge")],
        TESTS,
    ),
    Fault(
        "kernels: a state crosses documents",
        LIGHTNING,
        [("left = tl.where(before == after, left, 0.0)", "left = left")],
        TESTS,
    ),
    Fault(
        "kernels: the document at an edge is that of two tokens before",
        LIGHTNING,
        [("row_of_batch * length + tl.maximum(token - 1, 0)", "row_of_batch * length + tl.maximum(token - 2, 0)")],
        TESTS,
    ),
    Fault(
        "kernels: segments begin from zero",
        LAUNCHES,
        [("HAS_TOTALS=segments > 1 and not totals_only", "HAS_TOTALS=False")],
        TESTS,
    ),
    Fault(
        "kernels: the initial state is left out",
        LAUNCHES,
        [("HAS_CARRY=carry is not None and not totals_only", "HAS_CARRY=False")],
        TESTS,
    ),
    Fault(
        "kernels: the first segment counts an initial state, too",
        LAUNCHES,
        [("HAS_CARRY=carry is not None and not totals_only", "HAS_CARRY=carry is not None")],
        TESTS,
    ),
    Fault(
        "kernels: keys and queries change places in a gradient",
        LAUNCHES,
        [("dk = _run_outputs(case, v, d_out, q,", "dk = _run_outputs(case, d_out, v, q,")],
        TESTS,
    ),
    Fault(
        "kernels: the one-launch gradient of keys decays like that of queries",
        LIGHTNING,
        [
            (
                "dk_Cd = tl.dot(v_Ce, tl.trans(d_state_de), input_precision=PRECISION) * leave[:, None]",
                "dk_Cd = tl.dot(v_Ce, tl.trans(d_state_de), input_precision=PRECISION) * enter[:, None]",
            )
        ],
        TESTS,
    ),
    Fault(
        "kernels: a wish is forgotten",
        "kernels/dispatch.py",
        [("    if wish == PORTABLE:", "    if False:")],
        ["tests/kernels/test_dispatch.py"],
    ),
    Fault(
        "kernels: a Triton form that cannot run gives way without a word",
        "kernels/dispatch.py",
        [("    if wish == TRITON:\n", "    if wish == TRITON and not why:\n")],
        ["tests/kernels/test_dispatch.py"],
    ),
    Fault(
        "kernels: float64 is given to Triton",
        "kernels/dispatch.py",
        [("DTYPES = (torch.float32,", "DTYPES = (torch.float64, torch.float32,")],
        ["tests/kernels/test_dispatch.py"],
    ),
    Fault(
        "loss without logits: the cotangent is left out",
        "kernels/fused/cross_entropy.py",
        [("return (d_hidden.to(wide) * d_total).to(dtype)", "return (d_hidden.to(wide)).to(dtype)")],
        ["tests/kernels/test_fused.py"],
    ),
    Fault(
        "loss without logits: the stream is not normed",
        "model/stack.py",
        [("return head_loss(self.final_norm(x),", "return head_loss(x,")],
        ["tests/conformance/test_layouts.py::test_training_without_logits_is_training_with_them"],
    ),
    Fault(
        "norm and gate: the gate is not activated",
        "model/mixers/minimax.py",
        [('gate_activation = "sigmoid"', 'gate_activation = "none"')],
        ["tests/model/test_minimax.py"],
    ),
    Fault(
        "compiled blocks are made for one batch size",
        "parallel/recompute.py",
        [("torch._dynamo.maybe_mark_dynamic(tensor, 0)", "pass")],
        ["tests/model/test_compile.py::test_a_block_is_one_graph_for_any_batch[softmax-0-False]"],
    ),
    Fault(
        "a profile has one step too many",
        "trainer/profiling.py",
        [("range(steps[0], steps[1] + 1)", "range(steps[0], steps[1] + 2)")],
        ["tests/trainer/test_profiling.py"],
    ),
]
