"""`headway doctor`: its exit codes, and that each look tells what is well from what is not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from kernels import dispatch
from kernels.apex import Apex
from tests.documents import ROOT
from trainer.doctor import devices, finding, limits, network, place, software
from trainer.doctor.finding import Finding
from trainer.doctor.show import show

GIB = 2**30


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def doctor(*argv: str, columns: int) -> tuple[int, str]:
    """The command as a user runs it."""
    environment = os.environ | {"COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer", "doctor", *argv]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert not ran.stderr, ran.stderr
    return ran.returncode, ran.stdout


def test_a_machine_that_trains(tmp_path: Path) -> None:
    code, said = doctor(str(tmp_path / "run"), columns=80)
    assert code == 0 and "Nothing stands in the way of training." in said, said
    assert all(title in said for title in ("Software", "Devices", "Network", "Folders and clocks", "Limits"))
    assert max(map(len, said.splitlines())) <= 80
    assert os.listdir(tmp_path) == []


def test_a_run_folder_that_cannot_be(tmp_path: Path) -> None:
    """Under a file: not even root can write there."""
    (tmp_path / "file").write_text("")
    code, said = doctor(str(tmp_path / "file" / "run"), columns=120)
    assert code == 2 and "In the way" in said and "Nothing stands in the way" not in said
    assert "cannot be written (not a folder)" in " ".join(said.split()) and "run.dir" in said
    assert max(map(len, said.splitlines())) <= 120


def faults(found: list[Finding]) -> list[str]:
    return [one.fault for one in found if one.fault]


def hints(found: list[Finding]) -> list[str]:
    return [one.hint for one in found if one.hint]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(software.versions()) == []
    has = {"torch": "2.9.1+cu126", "megatron-core": None, "transformers": "5.100.0"}
    real = software.installed
    monkeypatch.setattr(software, "installed", lambda name: has.get(name, real(name)) if name in has else real(name))
    old, missing = faults(software.versions())
    assert "torch 2.9.1+cu126 is too old, 2.11 or newer" in old and "pip install 'torch>=2.11'" in old
    assert "megatron-core is not installed" in missing


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults(software.names()) == []
    monkeypatch.setattr(software, "clashing_distributions", lambda: ["kernels 3 is installed.", "trainer 2 as well."])
    monkeypatch.setattr("kernels.apex.apex", lambda: Apex("another", "apex 0.9 (Pyramid) is another project"))
    found = software.names()
    assert faults(found) == ["kernels 3 is installed.", "trainer 2 as well."]
    assert any("another project" in hint and "pip uninstall apex" in hint for hint in hints(found))


def test_imports_that_fail_are_told_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_MEGATRON", "raise ImportError('libcuda.so.1 is gone')")
    assert "libcuda.so.1 is gone" in software.megatron().fault
    monkeypatch.setattr(software, "installed", lambda name: "0.1")
    monkeypatch.setattr(software, "_DEEPSPEED", "raise ImportError('no such thing')")
    (found,) = software.deepspeed()
    assert "no such thing" in found.hint and not found.fault
    monkeypatch.setattr(software, "_DEEPSPEED", "print('noise'); print('{\"cpu_adam\": true, \"async_io\": false}')")
    can, cannot = software.deepspeed()
    assert (can.meaning, cannot.meaning) == ("cpu_adam", "async_io")
    monkeypatch.setattr(software, "installed", lambda name: None)
    assert software.deepspeed() == []


def test_a_question_without_an_answer() -> None:
    assert finding.ask_python("import time; time.sleep(60)", seconds=0.2) == (None, "no answer in 0.2 s")
    assert finding.run("no-such-program") is None and finding.run("false") is None


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "run", lambda *_: "NVIDIA H100, 550.54\nNVIDIA H100, 550.54\n")
    (found,) = devices.gpus()
    assert "nvidia-smi lists 2 GPUs (NVIDIA H100, 550.54)" in found.fault and "CUDA_VISIBLE_DEVICES" in found.fault
    monkeypatch.setattr(devices, "run", lambda *_: None)
    (found,) = devices.gpus()
    assert found.found == "none" and not found.fault


TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tSYS\tPXB\t0-31\t0
GPU1\tNV18\t X \tSYS\tPXB\t0-31\t0
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1
NIC0\tPXB\tPXB\tSYS\t X

Legend:
"""


def test_what_connects_gpus() -> None:
    slow, fast = devices.connections(TOPOLOGY)
    assert (slow.found, fast.found, fast.meaning) == ("2 pairs: SYS", "1 pair: NV18", "NVLink")
    assert "parallel.tp" in slow.hint and not fast.hint


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        taken = network.meeting_place(port)
        assert taken.found == "taken" and f"process {os.getpid()} " in taken.hint and "--master-port" in taken.hint
    free = network.meeting_place(port)
    assert free.found == "free" and not free.hint


def test_speeds_of_networks(tmp_path: Path) -> None:
    for name, text in (("fast", "25000\n"), ("slow", "100\n"), ("down", "-1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(text)
    found = [network.speed(name, tmp_path) for name in ("fast", "slow", "down", "lo")]
    assert found == ["25 Gb/s", "0.1 Gb/s", "speed not known", "loopback"]
    for number, state in (("1", "4: ACTIVE"), ("2", "1: DOWN")):
        port = tmp_path / "infiniband" / "mlx5_0" / "ports" / number
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    up, down = network.infiniband(tmp_path / "infiniband")
    assert (up.what, up.found, up.hint) == ("mlx5_0, port 1", "400 Gb/sec (4X NDR)", "") and "1: DOWN" in down.hint


def test_a_machine_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": ""})
    assert [one.what for one in network.addresses()] == ["lo", "other machines"]
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5"})
    assert hints(network.addresses()) == []


def test_room_on_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, kind in ((GIB // 2, "fault"), (5 * GIB, "hint"), (500 * GIB, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free, 0, free))
        found = place.room("its disk", tmp_path / "not" / "there", needed=True)
        assert (bool(found.fault), bool(found.hint)) == (kind == "fault", kind == "hint"), found
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert not place.room("their disk", tmp_path).fault


def test_folders(tmp_path: Path) -> None:
    assert place.folder("this", tmp_path, "go").found == "writable"
    assert place.folder("this", tmp_path / "a" / "b", "go").found == "will be made"
    (tmp_path / "file").write_text("")
    assert "or go" in place.folder("this", tmp_path / "file" / "x", "go").fault
    found = place.folder("this", tmp_path / "file", "go", needed=False)
    assert found.hint and not found.fault
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not place.file_clock(tmp_path).hint
    real = place.time.time
    for shift in (-100.0, 100.0):
        monkeypatch.setattr(place.time, "time", lambda shift=shift: real() + shift)
        assert (
            "get times 100.0" in place.file_clock(tmp_path).hint or "get times 99.9" in place.file_clock(tmp_path).hint
        )
    for said, state in (("yes\n", "followed"), ("no\n", "not followed")):
        monkeypatch.setattr(place, "run", lambda *_, said=said, **__: said)
        assert place.network_time().found == state
    monkeypatch.setattr(place, "run", lambda *_, **__: None)
    for kernel, state in (("yes", "followed"), ("no", "not followed"), ("unknown", "unknown")):
        monkeypatch.setattr(place, "_kernel_time", lambda kernel=kernel: kernel)
        found = place.network_time()
        assert found.found == state and bool(found.hint) is (kernel == "no") and "adjtimex" in found.meaning


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, little, many = (limits.open_files(soft) for soft in (100, 1024, 65536))
    assert "ulimit -n 65536" in few.fault and little.hint and not little.fault and not many.hint
    assert limits.open_files(limits.resource.RLIM_INFINITY).found == "unlimited"
    assert limits.shared_memory(tmp_path / "none", gpus=2)[0].found == "none"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 64 * 2**20))
    (two,), (one,) = (limits.shared_memory(tmp_path, gpus=count) for count in (2, 1))
    assert "--shm-size" in two.fault and "64 MiB" in two.fault and one.hint and not one.fault


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits(width: int) -> None:
    long = "/a/very/long/" + "x" * 200
    report = {
        "Here": [Finding("a [b] c", long, "why " * 60, hint="do " * 80), Finding("d", long, fault="mend " + long)]
    }
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(report, console)
    said: Any = console.export_text()
    assert max(map(len, said.splitlines())) <= width and "a [b] c" in said
    assert said.index("In the way") < said.index("Worth knowing") and "Nothing stands" not in said


def test_kernels_say_what_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = software.kernels()
    assert [one.what.removeprefix("kernels: ") for one in found] == list(dispatch.OPERATIONS)
    assert hints(found) == [] and all(one.found in (dispatch.TRITON, dispatch.PORTABLE) for one in found)
    monkeypatch.setitem(dispatch._WISHES, "glu", dispatch.PORTABLE)
    told = {one.what: (one.found, one.meaning) for one in software.kernels()}
    assert told["kernels: glu"] == ("torch", "asked for")


def test_a_kernel_that_was_asked_for_and_cannot_run_is_worth_knowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_missing", lambda operation: "triton is not installed")
    monkeypatch.setitem(dispatch._WISHES, "glu", dispatch.TRITON)
    (hint,) = hints(software.kernels())
    assert "glu was asked for, and cannot run: triton is not installed" in hint
