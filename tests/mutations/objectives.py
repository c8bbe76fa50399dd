"""Faults of what is minimised beside the cross-entropy."""

from __future__ import annotations

from tests.mutations.fault import Fault

SPREAD, CONFORMANCE = "parallel/entropy.py", "tests/conformance/test_entropy.py"


def cells(*names: str) -> list[str]:
    """Tests of the matrix: the penalty in these layouts."""
    return [f"{CONFORMANCE}::test_a_layout_equals_one_process[{name}]" for name in names]


FAULTS = [
    Fault(
        "entropy penalty: counted tp times",
        SPREAD,
        [("share = self.penalty.weight /", "share = self.mesh.layout.tp * self.penalty.weight /")],
        cells("tp2"),
    ),
    Fault(
        "entropy penalty: thresholds of the local instead of the global heads",
        SPREAD,
        [("return slice(share.start, share.stop)", "return slice(0, len(share))")],
        cells("tp2"),
    ),
    Fault(
        "entropy penalty: a mean over the layers of the stage",
        SPREAD,
        [("* len(self.thresholds))", "* (len(self.thresholds) // self.mesh.layout.pp))")],
        cells("pp2 zbv"),
    ),
    Fault(
        "entropy penalty: layers without attention weights counted",
        SPREAD,
        [
            ("        self.thresholds: dict", "        self.layers = len(uncut.layers)\n        self.thresholds: dict"),
            ("* len(self.thresholds))", "* self.layers)"),
        ],
        [f"{CONFORMANCE}::test_training_is_on_the_algorithm[hybrid]"],
    ),
    Fault(
        "entropy penalty: divided by dp twice",
        SPREAD,
        [
            (
                "return share / self._facts.sequences",
                "return share / self._facts.sequences / self.mesh.layout.data_parallel",
            )
        ],
        cells("fsdp2"),
    ),
    Fault(
        "entropy penalty: divided by what the engine divides by",
        SPREAD,
        [("(self.share_of_mean(layer) * self._facts.gradient_divisor)", "self.share_of_mean(layer)")],
        cells("fsdp2"),
    ),
    Fault(
        "entropy penalty: of the sequences of a micro-batch",
        "parallel/spread.py",
        [
            (
                "StepFacts(len(batch.tokens) * self.layout.data_parallel,",
                "StepFacts(len(batch.tokens) * self.layout.data_parallel // self.layout.microbatches,",
            )
        ],
        cells("accumulate 4"),
    ),
    Fault(
        "entropy penalty: a piece's own mean taken for the row's",
        SPREAD,
        [("return x if self.mesh.layout.cp == 1 else", "return x if True else")],
        cells("cp2"),
    ),
    Fault(
        "entropy penalty: the length of a piece taken for the row's",
        SPREAD,
        [("weights.q_BNHd.shape[1] * self.spread.mesh.layout.cp", "weights.q_BNHd.shape[1]")],
        cells("cp2"),
    ),
    Fault(
        "entropy penalty: a row's counted by each of its pieces",
        SPREAD,
        [('and self.mesh.rank("cp") > 0', "and False")],
        cells("cp2"),
    ),
    Fault(
        "entropy penalty: counted again in recomputation",
        SPREAD,
        [("        if not self.closed:\n", "        if True:\n")],
        cells("recompute"),
    ),
    Fault(
        "entropy penalty: values and thresholds of one process",
        SPREAD,
        [("        dist.all_reduce(found)\n", "")],
        cells("tp2"),
    ),
    Fault(
        "entropy penalty: no derivative enters backward",
        "model/observer.py",
        [("return grad, derivative.expand(ctx.shape), None", "return grad, 0 * derivative.expand(ctx.shape), None")],
        [f"{CONFORMANCE}::test_training_is_on_the_algorithm[mean]"],
    ),
    Fault(
        "entropy penalty: queries that see one key counted",
        "model/entropy.py",
        [
            (
                "counts_B1N = entropies_BHN * rate_B1N, rate_B1N > 0",
                "counts_B1N = entropies_BHN * rate_B1N, rate_B1N >= 0",
            )
        ],
        [f"{CONFORMANCE}::test_training_is_on_the_algorithm[mean, seen]"],
    ),
    Fault(
        "entropy penalty: also in validation",
        "parallel/auxiliary.py",
        [("            hook.remove()\n", "            pass\n")],
        [f"{CONFORMANCE}::test_the_cross_entropy_is_reported_alone_and_validation_knows_no_other"],
    ),
    Fault(
        "entropy thresholds: not resumed",
        "trainer/checkpoint.py",
        [
            (
                "if shapes.get(name) == tuple(x.shape)}",
                "if name not in shapes}",
            )
        ],
        [f"{CONFORMANCE}::test_it_continues_bit_for_bit[tp2 x pp2]"],
    ),
    Fault(
        "entropy thresholds: decayed",
        "trainer/optimizer.py",
        [('"weight_decay": 0.0, "lr_factor"', '"weight_decay": config.weight_decay, "lr_factor"')],
        [f"{CONFORMANCE}::test_thresholds_have_their_own_learning_rate_and_no_decay"],
    ),
    Fault(
        "entropy thresholds: the learning rate of all others",
        "trainer/optimizer.py",
        [('lr * group.get("lr_factor", 1.0)', "lr")],
        [f"{CONFORMANCE}::test_thresholds_have_their_own_learning_rate_and_no_decay"],
    ),
]
