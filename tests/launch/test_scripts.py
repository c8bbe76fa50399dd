"""`headway launch`: what is written, what is refused, and the script for torchrun on two hosts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.cli import main
from launch.scripts.hostfile import hostfile_faults
from launch.scripts.settings import SlurmSettings
from launch.scripts.writing import TEMPLATES, render, shell_words
from tests.launch.hosts import INTERFACE, ROOT, Host, Started, wait_until
from tests.pool import Pool
from tests.trainer.runs import assert_twins, train, write_config, write_tokens

QUICKSTART = str(ROOT / "configs" / "quickstart.toml")
TWO_BY_TWO = ("--nodes", "2", "--processes", "2")
OWN = {
    "torchrun": (),
    "slurm": (),
    "deepspeed": ("--hostfile", "hosts"),
    "kubernetes": ("--image", "registry/headway:1", "--claim", "shared"),
}


def headway_launch(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """`headway launch` in a folder; its exit code and all that it said."""
    with contextlib.chdir(folder):
        code = main(["launch", *argv])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with a hostfile for two hosts of two processes."""
    (tmp_path / "hosts").write_text("# of the third rack\nnode1 slots=2\n\nnode2 slots=2\n")
    return tmp_path


@pytest.mark.parametrize("kind", OWN)
def test_a_script_is_written_once_whole_and_says_the_next_command(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (kind, QUICKSTART, *TWO_BY_TWO, *OWN[kind])
    code, said = headway_launch(folder, capsys, *argv)
    assert code == 0, said
    (out,) = folder.glob("quickstart.*")
    assert out.name == f"quickstart.{kind}.{'yaml' if kind == 'kubernetes' else 'sh'}"
    next_command = {"slurm": "sbatch", "kubernetes": "kubectl apply -f"}.get(kind, "bash")
    assert f"{next_command} {out.name}" in said
    text = out.read_text()
    assert "{{" not in text and f"# Written by: headway launch {kind} {QUICKSTART} --nodes 2 --processes 2" in text
    if out.suffix == ".sh":
        assert out.stat().st_mode & 0o111
        subprocess.run(["bash", "-n", str(out)], check=True, timeout=10)

    out.write_text("edited by hand")
    code, said = headway_launch(folder, capsys, *argv)
    assert (code, out.read_text()) == (2, "edited by hand")
    assert f"{out.name} is there already: give --overwrite" in said
    code, said = headway_launch(folder, capsys, *argv, "--overwrite")
    assert (code, out.read_text().replace(" --overwrite", "")) == (0, text)
    assert {path.name for path in folder.iterdir()} == {"hosts", out.name}, "nothing half-written remains"


def test_everything_wrong_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hostfile's faults, those of the settings, of the configuration and of the layout."""
    (folder / "hosts").write_text("a slots=2\nb slot=2\na slots=3\n")
    argv = ["deepspeed", QUICKSTART, *TWO_BY_TWO, "--hostfile", "hosts", "--port", "80", "--out", "none/start.sh"]
    argv += ["--parallel.tp", "3", "--schedule.stesp", "3", "--data.train", '["a b"]']
    code, said = headway_launch(folder, capsys, *argv)
    assert code == 2
    for sentence in (
        "schedule.stesp is no key of [schedule]; the nearest known key is schedule.steps.",
        "tp 3 = 3, but 4 processes were started",
        "--port 80: expected 1024 to 65535.",
        """'["a b"]' goes through a shell on every host""",
        "hosts, line 2: 'b slot=2' is not HOST slots=N.",
        "hosts, line 3: a stands in line 1 already.",
        "hosts, line 3: a has slots=3, and --processes says 2 for each node: write slots=2, or give --processes 3.",
        "--out none/start.sh: there is no folder none.",
    ):
        assert sentence in said
    assert [path.name for path in folder.iterdir()] == ["hosts"]


@pytest.mark.parametrize(
    ("text", "nodes", "processes", "faults"),
    [
        ("a slots=2\nb slots=2\n", 2, 2, []),
        ("a slots=2\n", 2, 2, ["has 1 host, and --nodes says 2: give --nodes 1.", "has 2 slots in all"]),
        ("a slots=4\nb slots=4\n", 2, 2, ["line 1: a has slots=4", "line 2: b has slots=4", "has 8 slots in all"]),
        # As many in all, but not what each node is asked for.
        ("a slots=1\nb slots=3\n", 2, 2, ["line 1: a has slots=1", "line 2: b has slots=3"]),
        ("a\n", 1, 2, ["line 1: 'a' is not HOST slots=N."]),
        ("a slots=2 gpus=2\n", 1, 2, ["line 1: 'a slots=2 gpus=2' is not HOST slots=N."]),
        ("# none\n", 1, 2, ["has 0 hosts, and --nodes says 1: write HOST slots=N for each."]),
        (None, 1, 2, ["cannot be read: No such file or directory."]),
    ],
)
def test_hostfiles(text: str | None, nodes: int, processes: int, faults: list[str], tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    _, found = hostfile_faults(path, nodes, processes)
    assert len(found) == len(faults), found
    for fault, sentence in zip(found, faults, strict=True):
        assert sentence in fault


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("torchrun", QUICKSTART, "--nodes", "0"), "--nodes 0: expected at least 1."),
        (("torchrun", QUICKSTART, *TWO_BY_TWO, "--patience", "-1"), "--patience -1: expected at least 0."),
        (("torchrun", "none.toml", "--nodes", "2"), "none.toml does not exist."),
        (("torchrun", QUICKSTART, "--nodes", "3", "--processes", "1"), "data.global_batch_size = 16 cannot be cut"),
        (("slurm", QUICKSTART, *TWO_BY_TWO, "--time", "soon"), "--time 'soon': expected D-HH:MM:SS"),
        (("slurm", QUICKSTART, *TWO_BY_TWO, "--time", "5"), "--grace 300: not before the time is over, which is 300 s"),
        (("slurm", QUICKSTART, *TWO_BY_TWO, "--name", "a b"), "--name 'a b': expected one word"),
        (
            ("kubernetes", QUICKSTART, *TWO_BY_TWO, *OWN["kubernetes"], "--name", "A_b"),
            "--name 'A_b': expected a letter",
        ),
        (
            ("kubernetes", QUICKSTART, *TWO_BY_TWO, *OWN["kubernetes"], "--workdir", "/opt/headway"),
            'run.dir = "runs/quickstart" is /opt/headway/runs/quickstart in a pod, outside the claim at /shared',
        ),
    ],
)
def test_what_cannot_be_is_refused(
    argv: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = headway_launch(tmp_path, capsys, *argv)
    assert (code, sentence in said) == (2, True), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("time", "fits"), [("6", True), ("5", False), ("5:01", True), ("0:05:00", False), ("1-0", True), ("0-00:05", False)]
)
def test_times_are_read_as_sbatch_reads_them(time: str, fits: bool) -> None:
    settings = SlurmSettings(config=Path("c.toml"), nodes=1, time=time, grace=300)
    assert (settings.faults([]) == []) == fits


def test_words_come_through_a_shell_as_they_were(tmp_path: Path) -> None:
    words = ["a b.toml", "--data.train", '["x", "it\'s"]', "--run.dir=$HOME `x`", "--run.seed", "3"]
    script = tmp_path / "echo.sh"
    script.write_text(f"words=(\n{shell_words(Path(words[0]), words[1:])}\n)\nprintf '%s\\n' \"${{words[@]}}\"\n")
    said = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True, timeout=10).stdout
    assert said.splitlines() == words


def test_templates_are_filled_whole_or_not_at_all() -> None:
    assert render("a {{b}}\n  {{none}}\nc\n", {"b": "1", "none": ""}) == "a 1\nc\n"
    for values in ({}, {"b": "1", "c": "2"}):
        with pytest.raises(AssertionError, match="differ"):
            render("a {{b}}\n", values)


def test_an_installed_package_has_the_scripts() -> None:
    carried = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["launch"]
    needed = [*TEMPLATES.iterdir(), *(ROOT / "launch").glob("*.sh")]
    assert len(needed) >= 6
    for path in needed:
        assert any(path.relative_to(ROOT / "launch").match(pattern) for pattern in carried), path


@pytest.mark.cluster
def test_two_hosts_by_the_script_for_torchrun(pool: Pool, two_hosts: list[Host], tmp_path: Path) -> None:
    """The second host is started once the first has given up on it a first time: the first has patience."""
    (tmp_path / "twin").mkdir()
    twin = write_config(tmp_path / "twin", write_tokens(tmp_path / "walk"))
    results = pool.run(train, 4, twin)
    assert [code for code, _ in results] == [0] * 4, results
    write_config(tmp_path, str(tmp_path / "walk"))
    with contextlib.chdir(tmp_path):
        assert main(["launch", "torchrun", "config.toml", *TWO_BY_TWO, "--run.dir", "run"]) == 0

    def start(index: int) -> Started:
        return two_hosts[index].start(
            f"node-{index}",
            *("bash", "config.torchrun.sh"),
            cwd=tmp_path,
            NODE_RANK=str(index),
            MASTER_ADDR=two_hosts[0].address,
            INTERFACE=INTERFACE,
            WAIT="2",
            PYTHON=sys.executable,
        )

    first = start(0)
    wait_until(lambda: "The preflight is tried again" in first.said, 60, "the first host is impatient")
    second = start(1)
    assert [run.ends_within(150) for run in (first, second)] == [0, 0], first.said + second.said
    print(first.said[-1500:])
    assert_twins(tmp_path / "run", tmp_path / "twin" / "run")
