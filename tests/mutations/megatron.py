"""Faults of Megatron's checkpoints and layers, of apex, and of the doctor."""

from __future__ import annotations

from tests.mutations.fault import Fault

CONVERT = "tests/trainer/test_convert_megatron.py::"
REFUSE = "tests/trainer/test_convert_megatron_refusals.py::"
LAYERS = "tests/parallel/test_megatron.py::"

FAULTS = [
    Fault(
        "Megatron's queries, keys and values one after the other",
        "model/megatron/names.py",
        [("queries_keys_values, groups, cut=0)", "queries_keys_values, 1, cut=0)")],
        [f"{CONVERT}test_out_and_in_again[grouped, tied, with biases]"],
    ),
    Fault(
        "gate and up of Megatron's ranks put together as one",
        "model/megatron/names.py",
        [("spans=len(gate_up), cut=0)", "cut=0)")],
        [f"{CONVERT}test_weights_of_a_rank_come_back_together"],
    ),
    Fault(
        "layers of a later stage of Megatron's counted from one",
        "model/megatron/ranks.py",
        [("before += len(layers)", "before += 1")],
        [f"{CONVERT}test_what_megatron_core_writes_comes_in[ranks]"],
    ),
    Fault(
        "Megatron's exact GELU taken for the approximation",
        "model/megatron/arguments.py",
        [('return bool(found.get("openai_gelu") or fused)', "return True")],
        [f"{CONVERT}test_out_and_in_again[gpt2, exact gelu, untied]"],
    ),
    Fault(
        "rows of padding taken for tokens",
        "model/megatron/folder.py",
        [("return self.rows if trained else said", "return self.rows")],
        [f"{CONVERT}test_out_and_in_again[gpt2]"],
    ),
    Fault(
        "pickled files of Megatron's read without restriction",
        "model/megatron/pickled.py",
        [
            ("if foreign := sorted(asked - stand_ins):", "if foreign := []:"),
            ("weights_only=True", "weights_only=False"),
        ],
        [f"{REFUSE}test_a_checkpoint_that_is_not_read[code]"],
    ),
    Fault(
        "a mixer that takes itself for the next layer's",
        "parallel/megatron.py",
        [("layer=layer_number - 1,", "layer=layer_number - 1 and 0,")],
        [f"{LAYERS}test_a_model_of_theirs_with_our_mixer_is_ours[lightning]"],
    ),
    Fault(
        "positions that do not begin again where Megatron's mask does",
        "parallel/megatron.py",
        [("positions=places - begins_BN", "positions=places")],
        [f"{LAYERS}test_documents_are_read_from_the_mask[diag_block]"],
    ),
    Fault(
        "apex counts from one after a resume",
        "kernels/apex.py",
        [('group["step"] = next(iter(steps), 0)', "pass")],
        ["tests/kernels/test_apex.py::test_a_right_one_is_taken_and_updates_as_torch_does"],
    ),
    Fault(
        "an apex that computes no numbers is taken",
        "kernels/apex.py",
        [("if not difference <= TOLERANCE", "if difference > TOLERANCE")],
        ["tests/kernels/test_apex.py::test_wrong_numbers_are_noticed[float('nan')]"],
    ),
    Fault(
        "a sick machine is called well",
        "trainer/commands/doctor.py",
        [("return REFUSED if any", "return 0 if any")],
        ["tests/trainer/test_doctor.py::test_a_run_folder_that_cannot_be"],
    ),
]
