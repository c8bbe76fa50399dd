"""Faults of mixtures of experts: what chooses, what balances, and how experts are spread."""

from __future__ import annotations

from tests.mutations.fault import Fault

MOE, ROUTING, BALANCE, SPREAD = (
    "model/feedforward/moe.py",
    "model/routing.py",
    "parallel/balance.py",
    "parallel/spread.py",
)
EXPERTS, GROUPED, RUN = "parallel/experts.py", "kernels/grouped.py", "tests/conformance/test_experts.py"
UNIT = "tests/model/test_moe.py"
EQUATIONS = f"{RUN}::test_training_is_on_the_equations"
NUMBERS = f"{RUN}::test_numbers_move_against_the_load_once_an_update"


def spread(*names: str) -> list[str]:
    """Experts in these layouts."""
    return [f"{RUN}::test_experts_are_spread[{name}]" for name in names]


FAULTS = [
    Fault(
        "experts: the balance counted tp times in backward",
        BALANCE,
        [("(self._facts.gradient_divisor / self.mesh.layout.tp)", "self._facts.gradient_divisor")],
        spread("ep2 x tp2"),
    ),
    Fault(
        "experts: gradients divided by dp twice",
        SPREAD,
        [("torch._foreach_div_(gradients, self.layout.ep)", "torch._foreach_div_(gradients, self.gradient_divisor)")],
        spread("ep2 x cp2 x fsdp2"),
    ),
    Fault(
        "experts: gradients that are ep times too large",
        SPREAD,
        [("                torch._foreach_div_(gradients, self.layout.ep)\n", "                pass\n")],
        spread("ep2"),
    ),
    Fault(
        "experts: tokens dropped at a full buffer",
        MOE,
        [
            (
                "        made_RD = dispatch",
                "        full = max(1, len(order) // self.config.num_experts)\n"
                "        begins_E = counts_E.cumsum(0) - counts_E\n"
                "        late = torch.arange(len(order)) - begins_E.repeat_interleave(counts_E)\n"
                "        gates_BNK = gates_BNK * (late < full)[inverse].view_as(gates_BNK)\n"
                "        made_RD = dispatch",
            )
        ],
        [UNIT],
    ),
    Fault(
        "experts: rows given back in the order of experts",
        MOE,
        [("permuted(made_RD, inverse, order)", "permuted(made_RD, order, inverse)")],
        [UNIT],
    ),
    Fault(
        "experts: gates over all experts where they are to be over the chosen ones",
        MOE,
        [("scores_BNE.gather(-1, index_BNK).softmax(-1)", "scores_BNE.softmax(-1).gather(-1, index_BNK)")],
        [UNIT],
    ),
    Fault(
        "experts: gates see the numbers that choose",
        MOE,
        [
            (
                "        return scores, values.detach() + self.selection_bias",
                "        return (scores + self.selection_bias,) * 2",
            )
        ],
        [UNIT],
    ),
    Fault(
        "experts: an expert without rows is not run",
        "model/feedforward/experts.py",
        [
            (
                "zip(experts, parts, contexts, strict=True)])",
                "zip(experts, parts, contexts, strict=True) if len(part)])",
            )
        ],
        [UNIT],
    ),
    Fault(
        "experts: a shared feed-forward that only chosen tokens get",
        MOE,
        [("return out if self.shared is None else out + self.shared(x, ctx)", "return out")],
        [UNIT],
    ),
    Fault(
        "experts: local numbers taken for global ones",
        EXPERTS,
        [("int(number) // each != rank", "int(number) % size != rank")],
        spread("ep2"),
    ),
    Fault(
        "experts: rows of other ranks in the order in which they come",
        EXPERTS,
        [("of_expert.argsort(stable=True)", "torch.arange(len(of_expert))")],
        spread("ep2"),
    ),
    Fault(
        "experts: rows sent without a gradient",
        "parallel/collectives.py",
        [
            (
                "return ExchangeRows.apply(grad_RD, *ctx.back)",
                "return grad_RD.new_zeros(sum(ctx.back[0]), grad_RD.shape[1])",
            )
        ],
        spread("ep2"),
    ),
    Fault(
        "experts: the gradient of one copy of a row",
        GROUPED,
        [("(len(grad) // ctx.copies, ctx.copies)).sum(1)", "(len(grad) // ctx.copies, ctx.copies))[:, 0]")],
        [UNIT],
    ),
    Fault(
        "experts: a bias that every tensor-parallel rank adds",
        "parallel/tensor.py",
        [("float(region.rank == 0)", "1.0")],
        spread("ep2 x tp2"),
    ),
    Fault(
        "experts: what is summed over ranks stays a summand",
        "parallel/tensor.py",
        [("            return region.leave(out)\n", "            return region.piece(out)\n")],
        spread("ep2 x tp2"),
    ),
    Fault(
        "experts: checkpoints cut as if all ranks had all experts",
        SPREAD,
        [("self.mesh.expert_tensors if name in self._of_experts else self.mesh.tensors", "self.mesh.tensors")],
        [f"{RUN}::test_checkpoints_cross"],
    ),
    Fault(
        "experts: probabilities of the chosen experts alone in the balance",
        ROUTING,
        [
            (
                "            return self.scores_BNU.softmax(-1)\n",
                "            return self.scores_BNU.masked_fill(~self.chosen_BNU, -torch.inf).softmax(-1)\n",
            )
        ],
        [EQUATIONS],
    ),
    Fault(
        "experts: sigmoids that are not divided by their sum in the balance",
        ROUTING,
        [("return scores_BNU / (scores_BNU.sum(-1, keepdim=True) + SMALLEST_SUM)", "return scores_BNU")],
        [EQUATIONS],
    ),
    Fault(
        "experts: the balance averaged over layers",
        BALANCE,
        [("if balance.shared_out else 1", "if True else 1")],
        [f"{EQUATIONS}[softmax-sequence]"],
    ),
    Fault(
        "experts: the z-loss of logits without their square",
        BALANCE,
        [("logsumexp(-1).square()", "logsumexp(-1)")],
        [f"{EQUATIONS}[softmax-sequence]"],
    ),
    Fault(
        "experts: the z-loss a mean over the tokens of a piece",
        BALANCE,
        [
            (
                "self.layers[place] / self.num_tokens(routing)[1]",
                "self.layers[place] / routing.chosen_BNU[..., 0].numel()",
            )
        ],
        spread("ep2 x cp2 x fsdp2"),
    ),
    Fault(
        "experts: numbers move with the load",
        BALANCE,
        [("torch.sign(counts_E.mean() - counts_E)", "torch.sign(counts_E - counts_E.mean())")],
        [NUMBERS],
    ),
    Fault(
        "experts: numbers that count one micro-batch",
        BALANCE,
        [("self.counts.get(key, 0) + counts", "counts")],
        [NUMBERS],
    ),
    Fault(
        "experts: numbers by what one rank has seen",
        BALANCE,
        [("        dist.all_reduce(found)\n", "")],
        [f"{RUN}::test_other_experts_are_spread[three of eight, selection-ep2 x tp2]"],
    ),
    Fault(
        "experts: frozen routers whose numbers move",
        SPREAD,
        [("if name in self.parameters and name not in self.frozen:", "if name in self.parameters:")],
        [f"{RUN}::test_some_experts_are_frozen"],
    ),
    Fault(
        "experts: a vector of a matrix found by a process that has no part of it",
        "parallel/reparam.py",
        [("self.model.holders(matrix.parts[0])", "self.model.mesh.tensors")],
        [f"{RUN}::test_each_expert_is_a_matrix_to_sigma_reparam[ep2 x fsdp2]"],
    ),
]
