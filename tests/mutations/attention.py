"""Faults of sigmoid attention, and of what takes weight in softmax attention beside tokens."""

from __future__ import annotations

from tests.mutations.fault import Fault

CONFORMANCE = "tests/conformance/test_mixers.py"
KERNEL, SIGMOID, SOFTMAX = "tests/kernels/test_sigmoid.py", "tests/model/test_sigmoid.py", "tests/model/test_softmax.py"


def other(kind: str, example: int, name: str) -> list[str]:
    """A test of the matrix: one of a mixer's further examples in this layout."""
    return [f"tests/conformance/test_layouts.py::test_other_settings_of_a_mixer[{kind}-{example}-{name}]"]


FAULTS = [
    Fault(
        "ALiBi slopes from the local head index",
        "parallel/tensor.py",
        [("buffer[share.start : share.stop].clone()", "buffer[: len(share)].clone()")],
        [f"{SIGMOID}::test_a_tensor_parallel_rank_has_the_slopes_of_its_global_heads"],
    ),
    Fault(
        "ALiBi slopes from the local head index, in a layout",
        "parallel/tensor.py",
        [("buffer[share.start : share.stop].clone()", "buffer[: len(share)].clone()")],
        other("sigmoid", 1, "tp2"),
    ),
    Fault(
        "ALiBi slopes of a power of two for any number of heads",
        "model/mixers/sigmoid.py",
        [
            (
                "ladder = alibi_ladder(self.config.num_heads)",
                "ladder = [2.0 ** (-8 * (h + 1) / self.config.num_heads) for h in range(self.config.num_heads)]",
            )
        ],
        [f"{SIGMOID}::test_slopes_are_those_of_alibi"],
    ),
    Fault(
        "distances of a piece of the sequence",
        "kernels/attention/sigmoid.py",
        [("((queries_R + first_index)[:, None] - keys_M)", "(queries_R[:, None] - keys_M)")],
        [f"{KERNEL}::test_queries_after_cached_keys_are_the_last_rows"],
    ),
    Fault(
        "a sigmoid's bias from the local length",
        "model/mixers/sigmoid.py",
        [
            ("bias=self._bias,", "bias=-math.log(q_BNHd.shape[1]),"),
            ("scores_BHNM - math.log(self.config.length)", "scores_BHNM - math.log(x.shape[1])"),
        ],
        ["tests/conformance/test_layouts.py::test_a_layout_equals_one_process[softmax+sigmoid+moh+bam-cp4]"],
    ),
    Fault(
        "a bias by row from the keys of a piece",
        "kernels/attention/sigmoid.py",
        [
            (
                "offsets = bias - seen_BHRM.sum(",
                "offsets = bias - seen_BHRM[..., max(0, first_index - first_key) :].sum(",
            )
        ],
        other("sigmoid", 3, "cp2"),
    ),
    Fault(
        "a sigmoid's mask left out",
        "kernels/attention/sigmoid.py",
        [(".sigmoid_().masked_fill_(~seen_BHRm, 0)", ".sigmoid_()")],
        [KERNEL],
    ),
    Fault(
        "a sigmoid that cancels",
        "kernels/attention/sigmoid.py",
        [(".sigmoid_().masked", ".mul_(0.5).tanh_().mul_(0.5).add_(0.5).masked")],
        [KERNEL],
    ),
    Fault(
        "a sigmoid's derivative without its second factor",
        "kernels/attention/sigmoid.py",
        [(".mul_(weights_BGrm.neg_().add_(1))", "")],
        [KERNEL],
    ),
    Fault(
        "keys of the window's first query left out",
        "kernels/attention/visible.py",
        [("max(0, first + self.first_index - self.window + 1)", "max(0, first + self.first_index - self.window + 2)")],
        [KERNEL],
    ),
    Fault(
        "a norm on the output that stands behind the residual",
        "model/stack.py",
        [
            (
                "mixed = self.mixer_out_norm(self.mixer(normed, ctx, cache, head_gate))",
                "mixed = self.mixer(normed, ctx, cache, head_gate)",
            ),
            ("        x = x + mixed\n", "        x = self.mixer_out_norm(x + mixed)\n"),
        ],
        [SIGMOID],
    ),
    Fault(
        "a key bias that is rotated",
        "model/mixers/softmax.py",
        [
            (
                "from model.mixers.attention import",
                "from model.positions import rotate\nfrom model.mixers.attention import",
            ),
            ("self._extra_logit(q_BNHd)\n", "self._extra_logit(rotate(q_BNHd, ctx.shared[self._rotary]))\n"),
        ],
        [SOFTMAX],
    ),
    Fault(
        "a key bias by key instead of by query head",
        "model/mixers/softmax.py",
        [("self.key_bias) * self", "self.key_bias[:1].expand_as(self.key_bias)) * self")],
        [SOFTMAX],
    ),
    Fault(
        "a sink added to the score of every key",
        "kernels/attention/softmax.py",
        [("F.pad(k_BMGd, (0, 1))", "F.pad(k_BMGd, (0, 1), value=1.0)")],
        [SOFTMAX],
    ),
    Fault(
        "an extra key that the mask hides",
        "model/mixers/softmax.py",
        [("F.pad(mask, (1, 0), value=True)", "F.pad(mask, (1, 0), value=False)")],
        [CONFORMANCE + "::test_forward_and_gradients_equal_the_reference", SOFTMAX],
    ),
    Fault(
        "queries that see as many keys as there are before an extra one",
        "kernels/attention/softmax.py",
        [
            ("int(is_causal), 0))", "0, int(is_causal)))"),
            ("[:, int(is_causal) :, :, :head_dim]", "[:, : out_BNHd.shape[1] - int(is_causal), :, :head_dim]"),
        ],
        [SOFTMAX],
    ),
    Fault(
        "an extra logit scaled like a product",
        "kernels/attention/softmax.py",
        [("extra_BNH * head_dim**0.5", "extra_BNH")],
        [SOFTMAX],
    ),
    Fault(
        "a sink exported as a Llama",
        "model/hf/formats/llama.py",
        [(" + extra_weight_faults(settings)", "")],
        [SOFTMAX],
    ),
]
