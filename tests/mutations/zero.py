"""Faults in DeepSpeed's engine, in the fragments that its checkpoints are made of, and in what is refused."""

from __future__ import annotations

from tests.mutations.fault import Fault

LAYOUTS = "tests/conformance/test_zero.py::test_zero_equals_one_process"
OTHERS = "tests/conformance/test_zero.py::test_zero_of_other_models"
BF16 = "tests/conformance/test_zero.py::test_bf16_is_that_of_torch"
RUNS = "tests/trainer/test_zero.py"
FRAGMENTS = "tests/model/test_fragments.py"


def on(*names: str) -> list[str]:
    return [f"{LAYOUTS}[{name}]" for name in names]


FAULTS = [
    Fault(
        "zero: the loss is not multiplied by the ranks that DeepSpeed averages over",
        "parallel/zero.py",
        [("return self.mesh.data.size()", "return 1")],
        on("zero 2 on 2"),
    ),
    Fault(
        "zero: every micro-batch counts as the last",
        "parallel/zero.py",
        [("set_gradient_accumulation_boundary(last)", "set_gradient_accumulation_boundary(True)")],
        on("zero 1 on 2"),
    ),
    Fault(
        "zero: routers' gradients are those of one rank",
        "parallel/zero.py",
        [("            sum_lists(summands, dist.group.WORLD)\n", "")],
        [f"{OTHERS}[experts-zero 1 on 2]"],
    ),
    Fault(
        "zero: routers' gradients are multiplied by the ranks",
        "parallel/zero.py",
        [("            torch._foreach_div_(summands, self.gradient_divisor)\n", "")],
        [f"{OTHERS}[experts-zero 1 on 2]"],
    ),
    Fault(
        "zero: routers count in the norm on every rank",
        "parallel/zero.py",
        [("*(alike if dist.get_rank() == 0 else [])", "*alike")],
        [f"{OTHERS}[experts-zero 1 on 2]"],
    ),
    Fault(
        "zero: routers are not updated",
        "parallel/zero.py",
        [("        if self.adamw is not None:\n            self.adamw.step()\n", "")],
        [f"{OTHERS}[experts-zero 1 on 2]"],
    ),
    Fault(
        "zero: routers are bf16 like everything else",
        "parallel/zero.py",
        [('if not getattr(module, "keep_fp32", False):', "if True:")],
        [f"{OTHERS}[experts-zero 1 on 2]", BF16],
    ),
    Fault(
        "zero: a selection bias does not move",
        "parallel/zero.py",
        [("        self._move_selection()\n", "        pass\n")],
        [f"{RUNS}::test_experts_are_balanced_as_by_torch"],
    ),
    Fault(
        "zero: forward does not see what the masters were given",
        "parallel/zero_partitions.py",
        [("            self.optimizer.update_lp_params()\n", "")],
        on("zero 2 on 2"),
    ),
    Fault(
        "zero 3: forward does not see what the masters were given",
        "parallel/zero_partitions.py",
        [("            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)\n", "            pass\n")],
        on("zero 3 on 2"),
    ),
    Fault(
        "zero 3: a run begins at the rank's own elements",
        "parallel/zero_partitions.py",
        [("begin = min(dist.get_rank() * size, parameter.ds_numel)", "begin = 0 * size")],
        on("zero 3 on 2"),
    ),
    Fault(
        "zero 3: padding counts as elements",
        "parallel/zero_partitions.py",
        [("min(size, parameter.ds_numel - begin))", "size)")],
        [f"{RUNS}::test_parameters_that_three_processes_cannot_share_evenly"],
    ),
    Fault(
        "zero: fragments begin where they lie in the partition",
        "parallel/zero_partitions.py",
        [("here.start, there.start, here.numel", "here.start, here.start, here.numel")],
        on("zero 2 on 2"),
    ),
    Fault(
        "zero: moments are not read back",
        "parallel/zero_partitions.py",
        [("flats = self.flat if moment is None else", "flats = [f.clone() for f in self.flat] if moment is None else")],
        [f"{RUNS}::test_a_resumed_run_is_its_twin"],
    ),
    Fault(
        "zero: the count of updates is not resumed",
        "parallel/zero_partitions.py",
        [('self.adamw.state[flat]["step"].fill_(counts[least])', "pass")],
        [f"{RUNS}::test_a_resumed_run_is_its_twin"],
    ),
    Fault(
        "zero: counts of updates that differ are not noticed",
        "parallel/zero_partitions.py",
        [("if counts[least] != counts[most]:", "if False:")],
        [f"{RUNS}::test_parameters_that_were_updated_less_often_are_refused"],
    ),
    Fault(
        "zero: a step that is not finite is made all the same",
        "parallel/zero_partitions.py",
        [("        self.adamw.step = lambda closure=None: None\n", "        self.adamw.step = self.adamw.step\n")],
        [f"{RUNS}::test_a_step_that_is_not_finite_is_skipped"],
    ),
    Fault(
        "zero: DeepSpeed looks for an overflow as well, and keeps what it finds",
        "parallel/zero_config.py",
        [(', "check_grad_overflow": False}', "}")],
        [f"{RUNS}::test_a_step_that_is_not_finite_is_skipped"],
    ),
    Fault(
        "zero: masters are rounded to bf16 when a run begins",
        "parallel/zero.py",
        [("draw_all(self.whole_parameters(), self._inits, self._seed)", "self._partitions.publish(); pass")],
        [BF16],
    ),
    Fault(
        "zero: gradients are reduced in bf16",
        "parallel/zero_config.py",
        [('"communication_data_type": "fp32"', '"communication_data_type": "bf16"')],
        [BF16],
    ),
    Fault(
        "zero: gradients of micro-batches are added up in bf16",
        "parallel/zero_config.py",
        [('"data_types": {"grad_accum_dtype": "fp32"},', "")],
        [BF16],
    ),
    Fault(
        "zero: DeepSpeed clips once more",
        "parallel/zero_config.py",
        [('"gradient_clipping": 0.0,', '"gradient_clipping": 0.1,')],
        on("zero 2 on 2"),
    ),
    Fault(
        "fsdp: rotary tables are cast to bf16",
        "parallel/data.py",
        [("torch.float32, cast_forward_inputs=False)", "torch.float32)")],
        ["tests/conformance/test_layouts.py::test_rotary_tables_stay_fp32_under_bf16"],
    ),
    Fault(
        "fragments: the rest of a row is left out",
        "model/fragments.py",
        [("        row += 1\n", "        row += 0\n")],
        [FRAGMENTS],
    ),
    Fault(
        "fragments: all boxes begin in the first column",
        "model/fragments.py",
        [("_boxes(inner, within, rest))", "_boxes(inner, 0, rest))")],
        [FRAGMENTS],
    ),
    Fault(
        "fragments: what is read is a copy",
        "model/fragments.py",
        [
            ("        self.state_dict |= fragments\n", "        self.state_dict |= copy.deepcopy(fragments)\n"),
            ("import math\n", "import copy\nimport math\n"),
        ],
        [FRAGMENTS],
    ),
    Fault(
        "refusals: the batch size of a JSON is not compared",
        "trainer/zero.py",
        [('"train_batch_size": (rows,', '"train_batch_size": (...,')],
        [f"{RUNS}::test_all_that_does_not_go_together_is_said_at_once"],
    ),
    Fault(
        "refusals: unknown keys of a JSON are handed on",
        "trainer/zero.py",
        [(', *_strangers(theirs, "", list(wanted))]', "]")],
        [f"{RUNS}::test_all_that_does_not_go_together_is_said_at_once"],
    ),
    Fault(
        "refusals: tp under ZeRO is not noticed",
        "parallel/zero_config.py",
        [('for name in ("tp", "pp", "cp", "ep"):', 'for name in ("pp", "cp", "ep"):')],
        [f"{RUNS}::test_all_that_does_not_go_together_is_said_at_once"],
    ),
]
