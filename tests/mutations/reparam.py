"""Faults of reparametrised matrices."""

from __future__ import annotations

from tests.mutations.fault import Fault

FILE = "parallel/reparam.py"
LAYOUTS = "tests/conformance/test_reparam_layouts.py"
FAST = "tests/parallel/test_reparam.py::test_the_fast_form_equals_plain_autograd"


def cells(kind: str, *names: str) -> list[str]:
    return [f"{LAYOUTS}::test_a_layout_equals_one_process[{kind}-{name}]" for name in names]


FAULTS = [
    Fault(
        "a power iteration for every micro-batch",
        "parallel/spread.py",
        [
            (
                "            self._backward(total * scale)\n",
                "            self._backward(total * scale)\n            with self.reparam.raw_weights():\n"
                "                pass\n",
            )
        ],
        [f"{FAST}[1]"],
    ),
    Fault(
        "sigma of a rank's own rows and columns",
        FILE,
        [("        dist.all_reduce(products)\n", "")],
        cells("softmax", "tp4"),
    ),
    Fault(
        "a gain that is decayed",
        "trainer/optimizer.py",
        [('{"params": found, "weight_decay": 0.0,', '{"params": found, "weight_decay": config.weight_decay,')],
        [f"{FAST}[one]"],
    ),
    Fault(
        "gradients without the part along the singular vectors",
        FILE,
        [("beta=scale, alpha=-scale * factor)", "beta=scale, alpha=0.0)")],
        [f"{FAST}[defaults]"],
    ),
    Fault(
        "a gain's gradient of one rank's part",
        FILE,
        [("        dist.all_reduce(inner)\n", "")],
        cells("softmax", "tp4"),
    ),
    Fault(
        "replicas that count the same rows twice",
        FILE,
        [("                        counts_here(whole),\n", "                        True,\n")],
        [f"{LAYOUTS}::test_a_product_equals_one_process[tp2 x hsdp2x2]"],
    ),
    Fault(
        "a norm of gradients before they are completed",
        "trainer/step.py",
        [
            ("        self.model.reparam.complete_gradients()\n", ""),
            (
                "        # These numbers are the same on all ranks",
                "        self.model.reparam.complete_gradients()\n        # These numbers are the same on all ranks",
            ),
        ],
        [f"{FAST}[defaults]"],
    ),
    Fault(
        "an optimizer that steps on what is multiplied",
        FILE,
        [("            self._apply(torch._foreach_div_, self._trained)\n", "            pass\n")],
        [f"{FAST}[one]"],
    ),
    Fault(
        "vectors that are not resumed",
        "trainer/checkpoint.py",
        [("    beside = model.beside | model.kept\n", "    beside = model.beside\n")],
        [f"{LAYOUTS}::test_in_the_same_layout_it_continues_bit_for_bit[tp2 x pp2-fp32]"],
    ),
    Fault(
        "gains that are not resumed",
        "trainer/checkpoint.py",
        [("for name, x in (model.beside | model.kept).items()", "for name, x in model.kept.items()")],
        [f"{LAYOUTS}::test_in_the_same_layout_it_continues_bit_for_bit[tp2 x pp2-fp32]"],
    ),
    Fault(
        "frozen matrices that are scaled all the same",
        FILE,
        [("for piece in self._pieces if piece.index not in frozen]", "for piece in self._pieces]")],
        ["tests/parallel/test_reparam.py::test_frozen_matrices_stay_bit_for_bit_and_frozen_gains_too"],
    ),
    Fault(
        "a gain that goes on while its matrix is frozen",
        FILE,
        [('.spectral_gain"].requires_grad_(False)', '.spectral_gain"].requires_grad_(True)')],
        ["tests/parallel/test_reparam.py::test_frozen_matrices_stay_bit_for_bit_and_frozen_gains_too"],
    ),
    Fault(
        "queries, keys and values on top of each other in one matrix",
        FILE,
        [("                first_row += count\n", "")],
        [f"{FAST}[0.7,fused]"],
    ),
    Fault(
        "a start from no particular vector",
        "model/reparam.py",
        [("    far = short.T @ near\n", "    near = near.flip(1)\n    far = short.T @ near\n")],
        ["tests/model/test_reparam.py::test_the_start_is_exact[shape1]"],
    ),
    Fault(
        "a skipped update that changes sigma",
        "trainer/step.py",
        [
            (
                "        if not skipped:\n",
                "        if skipped:\n            with self.model.reparam.raw_weights():\n                pass\n"
                "        else:\n",
            )
        ],
        ["tests/parallel/test_reparam.py::test_a_skipped_update_leaves_vectors_gains_and_weights"],
    ),
    Fault(
        "one direction followed instead of several",
        FILE,
        [
            (
                "products[piece.rows] += weight @ self.u[piece.columns]",
                "products[piece.rows, :1] += weight @ self.u[piece.columns, :1]",
            )
        ],
        [
            "tests/parallel/test_reparam.py::test_after_a_hundred_steps_the_spectral_norm_is_the_gain",
            f"{FAST}[defaults]",
        ],
    ),
    Fault(
        "released matrices scaled by the stored norm",
        "model/hf/released.py",
        [
            (
                "/ sigma * weight.double()",
                '/ self._files.read(f"{layer}.spectral_normed_weight.spectral_norm").double() * weight.double()',
            )
        ],
        ["tests/trainer/test_reparam.py::test_the_released_format_is_read"],
    ),
    Fault(
        "a run that goes on with the gains of a beginning",
        "trainer/checkpoint.py",
        [("model.reparam.begin(as_they_are=True)", "model.reparam.begin()")],
        ["tests/trainer/test_reparam.py::test_a_run_that_goes_on_is_not_changed_by_other_settings[plain-changed0]"],
    ),
    Fault(
        "vectors of another shape that are read all the same",
        "trainer/checkpoint.py",
        [("if shapes.get(name) == tuple(x.shape)}", "if name in shapes}")],
        ["tests/trainer/test_reparam.py::test_a_run_that_goes_on_is_not_changed_by_other_settings[twin-changed1]"],
    ),
]
