"""Lightning attention: causal linear attention whose memory of the past fades by a fixed factor per token and head.

    S_t = exp(-s) S_{t-1} + k_t^T v_t,    o_t = q_t S_t

Three forms of the same function, with one signature. `lightning_attention` works in chunks: its cost per token does not
grow with the length. `lightning_attention_reference` is the dense quadratic form, `lightning_attention_recurrent` the
recurrence read aloud; both are there to be checked against the equation, and to check the first.
`lightning_final_state` gives the state after the last token alone.
`decay_slopes` gives the slopes s of a layer under the schedules in use.

Sources: "Various Lengths, Constant Speed", arXiv 2405.17381, Appendices A and B; "Lightning Attention-2",
arXiv 2401.04658.
"""

from kernels.lightning.chunked import lightning_attention
from kernels.lightning.decay import SCHEDULES, decay_slopes
from kernels.lightning.final_state import lightning_final_state
from kernels.lightning.reference import lightning_attention_recurrent, lightning_attention_reference

__all__ = [
    "SCHEDULES",
    "decay_slopes",
    "lightning_attention",
    "lightning_attention_recurrent",
    "lightning_attention_reference",
    "lightning_final_state",
]
