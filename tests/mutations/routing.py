"""Faults of what chooses heads, of its balance, and of the order in which heads are kept."""

from __future__ import annotations

from tests.mutations.fault import Fault

MOH, ROUTING, BALANCE = "model/mixers/moh.py", "model/routing.py", "parallel/balance.py"
UNIT, SUITE, RUNS = "tests/model/test_moh.py", "tests/conformance/test_mixers.py", "tests/trainer/test_moh.py"


def cells(*names: str) -> list[str]:
    """The balance in these cases and layouts."""
    return [f"tests/conformance/test_balance.py::test_a_layout_equals_one_process[{name}]" for name in names]


FAULTS = [
    Fault(
        "routing: statistics of the tokens of one rank",
        BALANCE,
        [("        if self.mesh.layout.cp > 1:\n", "        if False:\n")],
        cells("sequence-cp2"),
    ),
    Fault(
        "routing: the balance counted tp times in backward",
        BALANCE,
        [("(self._facts.gradient_divisor / self.mesh.layout.tp)", "self._facts.gradient_divisor")],
        cells("sequence-tp2"),
    ),
    Fault(
        "routing: the balance counted tp times in its value",
        BALANCE,
        [
            (
                'if self.mesh.rank("tp") == 0:\n            self._sum',
                "if True:\n            self._sum",
            )
        ],
        cells("sequence-tp2"),
    ),
    Fault(
        "routing: the balance divided by what the engine divides by",
        BALANCE,
        [("(self._facts.gradient_divisor / self.mesh.layout.tp)", "(1 / self.mesh.layout.tp)")],
        cells("sequence-hsdp2x2"),
    ),
    Fault(
        "routing: the balance counted again in recomputation",
        BALANCE,
        [("        if not self.closed:\n", "        if True:\n")],
        cells("sequence-recompute"),
    ),
    Fault(
        "routing: the length of a piece taken for the row's",
        BALANCE,
        [("routing.chosen_BNU.shape[1] * self.mesh.layout.cp", "routing.chosen_BNU.shape[1]")],
        cells("sequence-cp2"),
    ),
    Fault(
        "routing: choices of the global batch counted by one process for itself",
        BALANCE,
        [("        dist.all_reduce(found)\n", "")],
        cells("global batch-cp2 x fsdp2"),
    ),
    Fault(
        "routing: choices of the last micro-batch taken for the global batch's",
        BALANCE,
        [("self.counts.get(key, 0) + counts", "counts")],
        cells("global batch-accumulate 4"),
    ),
    Fault(
        "routing: choices counted once and for all",
        "parallel/spread.py",
        [("and loss.counts_first]", "and loss.counts_first and not loss._shares]")],
        ["tests/conformance/test_balance.py::test_each_step_counts_what_its_own_batch_chooses"],
    ),
    Fault(
        "routing: a mean over the sequences of one rank",
        "parallel/spread.py",
        [("StepFacts(len(batch.tokens) * self.layout.data_parallel,", "StepFacts(len(batch.tokens),")],
        cells("sequence-hsdp2x2"),
    ),
    Fault(
        "routing: gradient through the share of tokens alone",
        "model/observer.py",
        [("return grad, derivative.expand(ctx.shape), None", "return grad, 0 * derivative.expand(ctx.shape), None")],
        ["tests/conformance/test_balance.py::test_training_is_on_the_equation[sequence]"],
    ),
    Fault(
        "routing: local heads taken for the first ones",
        MOH,
        [("return numbered[..., self.heads]", "return numbered[..., : len(self.heads)]")],
        ["tests/conformance/test_layouts.py::test_a_layout_equals_one_process[moh-tp2 x pp2]"],
    ),
    Fault(
        "routing: norms by place, not by number",
        MOH,
        [("square().sum(-1))[..., self.places]", "square().sum(-1))")],
        [UNIT],
    ),
    Fault(
        "routing: norms of queries that are normed and rotated",
        MOH,
        [
            ("        gates_BNH, active_BNH = self._gates(x, q_BNHd, ctx)\n", ""),
            (
                "        q_BNHd = self.turned(q_BNHd, ctx)\n",
                "        q_BNHd = self.turned(q_BNHd, ctx)\n"
                "        gates_BNH, active_BNH = self._gates(x, q_BNHd, ctx)\n",
            ),
        ],
        [UNIT],
    ),
    Fault(
        "routing: the gradient of gathered norms not summed over ranks",
        "parallel/region.py",
        [
            (
                "return Gather.apply(x_BNh.transpose(1, 2), self.region.group, self.region.size).transpose(1, 2)",
                "x = Gather.apply(x_BNh.transpose(1, 2), self.region.group, self.region.size)\n"
                "        x = x.transpose(1, 2).detach()\n"
                "        share = self.region.share(x.shape[-1])\n"
                "        return torch.cat((x[..., : share.start], x_BNh, x[..., share.stop :]), dim=-1)",
            ),
            ("from torch import Tensor\n", "import torch\nfrom torch import Tensor\n"),
        ],
        cells("norm-tp2, sequence whole"),
    ),
    Fault(
        "routing: a step chooses otherwise than prefill",
        MOH,
        [
            (
                "        chosen_BNU = choose_units(scores_BNU, self.config.active_units)\n",
                "        apart_BNU = scores_BNU - scores_BNU.mean(1, keepdim=True)\n"
                "        chosen_BNU = choose_units(apart_BNU, self.config.active_units)\n",
            )
        ],
        [f"{SUITE}::test_prefill_and_steps_equal_forward", UNIT],
    ),
    Fault(
        "routing: of equal scores the last are chosen",
        ROUTING,
        [
            (
                "return scores_BNU.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]",
                "return scores_BNU.detach().sort(dim=-1, stable=True).indices[..., -count:]",
            )
        ],
        [UNIT],
    ),
    Fault(
        "routing: scores in the dtype of the stream",
        ROUTING,
        [("F.linear(x.to(wide), self.weight.to(wide))", "F.linear(x, self.weight.to(x.dtype)).to(wide)")],
        [UNIT],
    ),
    Fault(
        "routing: gates over all heads instead of those chosen",
        MOH,
        [
            (
                "scores_BNU.masked_fill(~chosen_BNU, -torch.inf).softmax(-1) * config.active_units",
                "scores_BNU.softmax(-1) * chosen_BNU * config.active_units",
            )
        ],
        [UNIT],
    ),
    Fault(
        "routing: shared heads weigh as routed ones",
        MOH,
        [
            (
                "stages_BN2[..., :1], routed_BNU * stages_BN2[..., 1:]",
                "stages_BN2[..., 1:], routed_BNU * stages_BN2[..., :1]",
            )
        ],
        [UNIT],
    ),
    Fault(
        "routing: nothing goes straight through",
        MOH,
        [("scores_BNU.softmax(-1)\n            through", "scores_BNU.softmax(-1).detach()\n            through")],
        [UNIT],
    ),
    Fault(
        "routing: unchosen heads counted as operations",
        MOH,
        [("return (self.config.shared_heads + self.config.active_heads) / self.config.num_heads", "return 1.0")],
        [UNIT],
    ),
    Fault(
        "routing: the order of heads not undone in exports",
        "model/hf/names.py",
        [("self.order.inverse.apply(parts[0])", "parts[0]")],
        [UNIT],
    ),
    Fault(
        "routing: the order of another model's heads taken for ours",
        "model/order.py",
        [("    if before == after or", "    if theirs[layer] is None and numbers == before or before == after or")],
        [RUNS],
    ),
    Fault(
        "routing: head load by place, not by number",
        MOH,
        [("for group in self.config.group_order for head", "for group in sorted(self.config.group_order) for head")],
        ["tests/parallel/test_diagnose.py", UNIT],
    ),
    Fault(
        "routing: shared heads all on the first ranks",
        MOH,
        [("parts = 1 if splits_a_group or shared == 0 else math.gcd(shared, groups)", "parts = 1")],
        [UNIT],
    ),
]
