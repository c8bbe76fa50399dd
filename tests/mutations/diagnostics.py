"""Faults in the diagnostics of attention: numbers that look right and stand in the wrong place, or count twice."""

from __future__ import annotations

from tests.mutations.fault import Fault

LAYOUT = "tests/parallel/test_diagnose.py::test_a_layout_finds_what_one_process_finds"
ORACLE = "tests/model/test_diagnostics.py::test_every_statistic_is_that_of_a_whole_map"

FAULTS = [
    Fault(
        "a diagnosis with heads at their local places",
        "parallel/diagnose.py",
        [('Numbers.of(model.uncut), model.mesh.rank("tp"))', "Numbers.of(model.uncut), 0)")],
        [f"{LAYOUT}[tp2]"],
    ),
    Fault(
        "a diagnosis with layers at their places in the stage",
        "model/diagnostics.py",
        [
            (
                "for layer, sums_HK in probe.row_sums.items():",
                "for place, (layer, sums_HK) in enumerate(probe.row_sums.items()):",
            ),
            ("tally.head_sums[layer, heads, : len(ROW_SUMS)]", "tally.head_sums[place, heads, : len(ROW_SUMS)]"),
        ],
        [f"{LAYOUT}[pp2 zbv]"],
    ),
    Fault(
        "a diagnosis of pieces that all look at the first queries",
        "model/diagnostics.py",
        [
            ("queries_R = places_R - seen.first_index", "queries_R = places_R"),
            (
                "self.sample.begins_BN[:, queries_R + weights.visible.first_index]",
                "self.sample.begins_BN[:, queries_R]",
            ),
        ],
        [f"{LAYOUT}[cp2 x fsdp2]"],
    ),
    Fault(
        "a diagnosis of windows that end where a piece does",
        "parallel/diagnose.py",
        [("sum_lists([*stream, *probe.columns.values()]", "sum_lists([*stream]")],
        [f"{LAYOUT}[cp2 x fsdp2]"],
    ),
    Fault(
        "a diagnosis with norms of pieces of the stream that are not put together",
        "parallel/diagnose.py",
        [("    if model.stream_is_cut:\n", "    if False:\n")],
        [f"{LAYOUT}[tp2]"],
    ),
    Fault(
        "a diagnosis on each rank's own rows alone",
        "parallel/diagnose.py",
        [("    sum_lists([tally.head_sums, tally.layer_sums, tally.expert_sums], dist.group.WORLD)\n", "")],
        [f"{LAYOUT}[cp2 x fsdp2]"],
    ),
    Fault(
        "a diagnosis whose observer stays, and counts in training and recomputation",
        "parallel/recompute.py",
        [("            model.observer = earlier\n", "            pass\n")],
        [f"{LAYOUT}[tp2]"],
    ),
    Fault(
        "a diagnosis of sinks filled up for what an extra logit takes",
        "kernels/attention/statistics.py",
        [("    if extra_BHR is not None and normalised:\n", "    if False:\n")],
        [f"{ORACLE}[extra logit]"],
    ),
    Fault(
        "a diagnosis of weights as they are where none are divided by their sum",
        "kernels/attention/statistics.py",
        [("(mass_BHR if normalised else 1.0)", "mass_BHR")],
        [f"{ORACLE}[not normalised]"],
    ),
    Fault(
        "a diagnosis that counts rows of one key in normalised entropy",
        "model/diagnostics.py",
        [("several = found.keys > 1", "several = found.keys > 0")],
        [f"{ORACLE}[documents]"],
    ),
    Fault(
        "a diagnosis that takes the row's first key for the document's",
        "model/diagnostics.py",
        [
            (
                "torch.where(opens_BN, places_N, 0).cummax(1).values",
                "torch.where(opens_BN, places_N, 0).cummax(1).values * 0",
            )
        ],
        [f"{ORACLE}[documents]"],
    ),
]
