"""Faults of experts of attention: of their gates, the order of their heads, and how their outputs add up over ranks."""

from __future__ import annotations

from tests.mutations.fault import Fault

BAM, UNIT = "model/mixers/bam.py", "tests/model/test_bam.py"
MIXING, RUNS = "trainer/mixing.py", "tests/trainer/test_bam.py"
SUITE = "tests/conformance/test_mixers.py::test_forward_and_gradients_equal_the_reference"
TP2 = "tests/conformance/test_layouts.py::test_a_layout_equals_one_process[bam-tp2 x pp2]"


def bam(what: str, *replacements: tuple[str, str], file: str = BAM, tests: tuple[str, ...] = (UNIT,)) -> Fault:
    return Fault(f"attention experts: {what}", file, list(replacements), list(tests))


FAULTS = [
    bam("gates that do not add up to one", ("self.router(x).softmax(-1)", "self.router(x).sigmoid()")),
    bam(
        "gates rounded to the type of the stream",
        ("self.router(x).softmax(-1)", "self.router(x).softmax(-1).to(x.dtype)"),
    ),
    bam("another expert's gate", (".unsqueeze(-1).unbind(-2)", ".unsqueeze(-1).flip(-2).unbind(-2)")),
    bam(
        "keys and values expert by expert, not group by group",
        ("return _together(keys, 1), _together(values, 1)", "return torch.cat(keys, 2), torch.cat(values, 2)"),
        tests=(SUITE,),
    ),
    bam("one norm of queries for all experts", ("[expert.q_norm(", "[self.experts[0].q_norm(")),
    bam(
        "heads expert by expert, of which no rank has a share in a row",
        (
            "torch.stack([x_BNhd.unflatten(2, (-1, size)) for x_BNhd in by_expert], dim=3).flatten(2, 4)",
            "torch.cat(list(by_expert), dim=2)",
        ),
        (
            "(-1, self.config.num_experts, self.config.group_size)).unbind(3)",
            "(self.config.num_experts, -1, 1)).unbind(2)",
        ),
        ("        return [\n            expert *", "        return sorted(\n            expert *"),
        ("range(config.group_size)\n        ]", "range(config.group_size)\n        )"),
        tests=("tests/parallel/test_diagnose.py::test_heads_of_experts_are_found_by_their_numbers",),
    ),
    bam(
        "operations of one expert's heads",
        ("len(self.head_numbers) * self.head_dim", "self.config.num_heads * self.head_dim"),
        file="model/mixers/attention.py",
    ),
    bam(
        "the biases of experts added on every rank",
        ("plain.adds_bias = float(region.rank == 0)", "plain.adds_bias = 1.0"),
        file="parallel/tensor.py",
        tests=(TP2,),
    ),
    bam(
        "gradients of experts' biases on one rank only",
        (
            "inside = region.cuts_sequence or (together and norm is None)",
            "inside = region.cuts_sequence and not together",
        ),
        file="parallel/tensor.py",
        tests=("tests/parallel/test_tensor.py::test_what_is_not_cut_stays_alike_on_all_ranks",),
    ),
    bam(
        "maps out of chosen feed-forwards that stay as large",
        (" / mixture.top_k if mixture.ffn_gate_norm", " / len(experts) if mixture.ffn_gate_norm"),
        file=MIXING,
        tests=(f"{RUNS}::test_models_that_are_alike_make_the_seed",),
    ),
    bam(
        "what gates do to a map out, but not to its bias",
        ("(weight|bias)", "weight"),
        file=MIXING,
        tests=(f"{RUNS}::test_models_that_are_alike_make_the_seed",),
    ),
    bam(
        "norms and embeddings of the last model instead of the average",
        ("mean = mean + (found.float() - mean) / count", "mean = found.float()"),
        file=MIXING,
        tests=(f"{RUNS}::test_each_expert_is_one_models_and_the_rest_an_average",),
    ),
    bam(
        "the seed in the average, though it is no expert",
        ("Parts(opened if mixture.with_seed else opened[1:],", "Parts(opened,"),
        file=MIXING,
        tests=(f"{RUNS}::test_each_expert_is_one_models_and_the_rest_an_average",),
    ),
    bam(
        "a check of experts that looks at the first only",
        ("        scores[..., expert] = 0.0\n", "        scores[..., 0] = 0.0\n"),
        file=MIXING,
        tests=(RUNS,),
    ),
]
