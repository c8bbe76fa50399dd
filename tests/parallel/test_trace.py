"""What a trace counts, on tensors small enough to count by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.trace import Trace
from parallel.traffic import TRAFFIC, Message, messages
from tests.pool import Pool

KIB = 1024


def block(kib: int) -> Tensor:
    return torch.ones(kib * KIB, dtype=torch.uint8)


def traced() -> Trace:
    return Trace(fake=False, gloo=False)


def test_the_peak_is_what_was_held_at_one_time() -> None:
    with traced() as trace:
        a = block(3)
        b = block(5)
        view = a[:KIB]  # the same memory
        del b, a
        c = block(6)
    assert trace.peak == 9 * KIB
    assert view is not None
    assert c is not None


def test_memory_that_is_resized_is_followed() -> None:
    with traced() as trace:
        a = block(4)
        a.untyped_storage().resize_(0)
        b = block(6)
        assert trace.peak == 6 * KIB
        a.untyped_storage().resize_(4 * KIB)
        assert trace.peak == 10 * KIB
        a.untyped_storage().resize_(0)
        c = block(3)
    assert trace.peak == 10 * KIB
    assert trace.memory()["rest"] == 10 * KIB
    assert b is not None
    assert c is not None


def test_what_is_held_has_a_name() -> None:
    weight = torch.ones(256, 256, requires_grad=True)  # 256 KiB
    with traced() as trace:
        trace.own("parameters", [weight])
        trace.own("optimizer", [torch.zeros(128)])  # gone at once
        hidden = (torch.ones(512, 256) @ weight).sin()  # 512 KiB each: the input, the product, and its sine
        loss = hidden.square().sum()
        del hidden
        loss.backward()
        block(3 * KIB)
    memory = trace.memory()
    assert sum(memory.values()) == trace.peak
    assert memory["parameters"] == memory["gradients"] == 256 * KIB
    assert memory["optimizer"] == 0
    # The peak comes after backward: nothing is kept for it any more but the scalar.
    assert memory["rest"] == 3 * KIB * KIB
    assert memory["activations"] <= 16


def test_what_forward_keeps_for_backward_are_activations() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    with traced() as trace:
        trace.own("parameters", [weight])
        x = torch.ones(512, 256) @ weight
        y = x.sin()
        z = y.square().sum()
        del x, y
        z.backward()
    memory = trace.memory()
    # The matrix product keeps its input, the sine its own, the square the sine: 512 KiB each. And there is the sum.
    assert 3 * 512 * KIB <= memory["activations"] <= 3 * 512 * KIB + 16
    # Backward begins with the gradient of the square, and what it makes of it.
    assert memory["rest"] + memory["gradients"] <= 3 * 512 * KIB + 8


def test_values_that_are_not_there_are_one() -> None:
    with FakeTensorMode(), Trace(fake=True, gloo=False):
        x = torch.zeros(3)
        values = [x.sum().item(), x.long().sum().item(), (x == 0).all().item()]
    assert values == [1, 1, 1]
    assert isinstance(values[0], float)


def sums_and_gathers() -> tuple[dict, bool, int, int]:
    """Traffic of four collectives of 64 KiB, functional and not; peaks of a gather without and with gloo's copies."""
    name, rank = dist.group.WORLD.group_name, dist.get_rank()
    ops = torch.ops._c10d_functional
    with traced() as trace:
        x = torch.ones(16 * KIB)
        dist.all_reduce(x)
        ops.wait_tensor(ops.all_gather_into_tensor(x[: 4 * KIB], 4, name))
        ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", 4, name))
        dist.send(x, 1) if rank == 0 else dist.recv(x, 0) if rank == 1 else None
    peaks = []
    for gloo in (False, True):
        with Trace(fake=False, gloo=gloo) as counted:
            ops.wait_tensor(ops.all_gather_into_tensor(torch.ones(4 * KIB), 4, name))
        peaks.append(counted.peak)
    found = {kind: (traffic.count, traffic.sent) for (kind, _), traffic in trace.traffic.items()}
    return found, {group for _, group in trace.traffic} == {name}, *peaks


def test_messages_are_counted_as_a_ring_sends_them(pool: Pool) -> None:
    results = pool.run(sums_and_gathers, 4)
    size = 64 * KIB
    ring = {"all-reduce": (1, 1.5 * size), "all-gather": (1, 0.75 * size), "reduce-scatter": (1, 0.75 * size)}
    for rank, (found, in_one_group, plain, with_copies) in enumerate(results):
        assert found == ring | ({"send": (1, size)} if rank == 0 else {})
        assert in_one_group
        assert (plain, with_copies) == (16 * KIB + size, 16 * KIB + 2 * size)


def test_operations_of_our_own_say_what_they_send() -> None:
    @torch.library.custom_op("headway_test::exchange", mutates_args=())
    def exchange(x: Tensor, group: str) -> Tensor:
        return x.clone()

    op = torch.ops.headway_test.exchange.default
    assert messages(op, (torch.ones(8), "g"), {}, torch.ones(8)) == []
    said = Message("all-to-all", "g", ranks=4, size=32)
    TRAFFIC["headway_test::exchange"] = lambda x, group: [Message("all-to-all", group, 4, x.numel() * x.itemsize)]
    try:
        with traced() as trace:
            exchange(torch.ones(8), "g")
        assert trace.traffic["all-to-all", "g"].sent == said.sent == 24
    finally:
        del TRAFFIC["headway_test::exchange"]
