"""Faults of attention that computes selected heads only."""

from __future__ import annotations

from tests.mutations.fault import Fault

KERNEL = "tests/kernels/test_gated.py"
GATED, SELECTED, PARTS = (f"kernels/attention/{name}.py" for name in ("gated", "selected", "parts"))


def gated(what: str, file: str, *replacements: tuple[str, str], test: str = "") -> Fault:
    return Fault(f"gated attention: {what}", file, list(replacements), [f"{KERNEL}::{test}" if test else KERNEL])


FAULTS = [
    gated(
        "the keys of a part stop one too early",
        SELECTED,
        ("slice(part.first_key, part.end_key)\n", "slice(part.first_key, max(part.end_key - 1, part.first_key + 1))\n"),
        (
            ", (part.first_key, part.end_key))[0, 0]",
            ", (part.first_key, max(part.end_key - 1, part.first_key + 1)))[0, 0]",
        ),
        (
            "part.first_key - part.first, part.end_key - part.first\n",
            "part.first_key - part.first, max(part.end_key - 1, part.first_key + 1) - part.first\n",
        ),
    ),
    gated(
        "masked by how many queries come before, not by places",
        SELECTED,
        (
            "places_US = self.places_US[:, span].clamp(part.first, part.end - 1) - part.first",
            "places_US = torch.arange(span.stop - span.start).clamp(max=part.end - part.first - 1)"
            ".expand(len(self.places_US), -1)",
        ),
    ),
    gated("no mask on the diagonal", SELECTED, ("if not part.masked:", "if part.masked is not None:")),
    gated(
        "keys before the first query, and one more, without a mask",
        PARTS,
        ("low, high = 0, place if", "low, high = 0, place + 2 if"),
    ),
    gated(
        "a window's first common key one too early",
        PARTS,
        ("max(low, last - self.visible.window + 1)", "max(low, last - self.visible.window)"),
    ),
    gated(
        "the first key of a document is the second",
        PARTS,
        ("zip(firsts_N, ends_N, strict=True)", "zip([x + 1 for x in firsts_N], ends_N, strict=True)"),
    ),
    gated(
        "queries of two documents see what the first of them sees",
        PARTS,
        ("if self.ids[first] == self.ids[end - 1] else (0, 0)", "if self.ids else (0, 0)"),
    ),
    gated(
        "the documents of the first row in every row",
        PARTS,
        (
            "visible.documents[row].contiguous(), visible.key_documents[row]",
            "visible.documents[0], visible.key_documents[0]",
        ),
    ),
    gated(
        "the merged logarithm is that of one part",
        SELECTED,
        ("before.copy_(torch.logaddexp(before, part_lse))", "before.copy_(part_lse)"),
    ),
    gated(
        "parts weigh alike",
        SELECTED,
        ("torch.sigmoid(part_lse - before)", "torch.where(before < _HIDDEN / 2, 1.0, 0.5)"),
    ),
    gated(
        "queries and keys have the gradient of their last part only",
        SELECTED,
        ("            whole.add_(d_part)\n", "            whole.copy_(d_part)\n"),
    ),
    gated(
        "keys of a group have the gradient of its last head in full only",
        SELECTED,
        ("dk.index_add_(2, served_by, dk_full.to(dk.dtype))", "dk.index_copy_(2, served_by, dk_full.to(dk.dtype))"),
        test="test_shared_heads",
    ),
    gated(
        "the heads of keys of a group in the order of another",
        SELECTED,
        ("heads // (q.shape[2] // k.shape[2])", "heads % k.shape[2]"),
    ),
    gated(
        "what is not selected of a head in full is not zero",
        SELECTED,
        ("out_full.masked_fill(~selected.index_select(2, full)[..., None], 0)", "out_full"),
    ),
    gated(
        "what is not selected of a head in full has a gradient",
        SELECTED,
        ("d_full.masked_fill(~selected.index_select(2, full)[..., None], 0)", "d_full"),
    ),
    gated(
        "padding has a gradient",
        SELECTED,
        ("taken_Sd.index_fill_(0, nothing, 0)", "taken_Sd"),
    ),
    gated(
        "a query that sees nothing has the mean of what is hidden",
        SELECTED,
        ("out_buSd.masked_fill_(unseen_buS[..., None], 0)", "out_buSd"),
    ),
    gated(
        "the gradient of the gate is that of the gated output, divided by it",
        GATED,
        (
            "return (out_BNHe.to(wide) * gate[..., None]).to(v_BMGe.dtype)",
            "still = gate.detach()[..., None]\n"
            "    y = out_BNHe.to(wide) * still\n"
            "    return (y + y.detach() / still * (gate[..., None] - still)).to(v_BMGe.dtype)",
        ),
    ),
    gated(
        "gates in the order of heads",
        GATED,
        (
            "gate.new_zeros(q_BNHd.shape[:3]).scatter(2, head_index, gate)",
            "gate.new_zeros(q_BNHd.shape[:3]).scatter(2, head_index.sort(-1).values, gate)",
        ),
    ),
    gated(
        "channels apart from each other are read as neighbours",
        SELECTED,
        ("return x if x.stride(-1) == 1 else x.contiguous()", "return x"),
    ),
    gated("all heads are computed", SELECTED, ("_LARGEST_SHARE * selected", "0.0 * selected")),
    gated("padded to the busiest head", SELECTED, ("_EVEN = 0.75", "_EVEN = 0.0")),
]
