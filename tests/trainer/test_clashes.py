"""Distributions with the names of our packages: recognised, named, and refused before anything fails far away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT
from trainer.clashes import FLOORS, clashing_distributions


def install(folder: Path, name: str, package: str) -> None:
    """As pip leaves a distribution: a package, what is known of it, and the list of its files."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("raise AssertionError('imported')")
    about = folder / f"{name}-3.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.1\n")
    (about / "RECORD").write_text(f"{package}/__init__.py,,\n{about.name}/METADATA,,\n")


def test_nothing_clashes_here() -> None:
    assert clashing_distributions() == []


@pytest.mark.parametrize("name", FLOORS)
def test_a_distribution_of_our_name_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind ours on the path, as in site-packages: others, transformers among them, would find ours for theirs."""
    install(tmp_path, name, name)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (said,) = clashing_distributions()
    assert f"the distribution {name} 3.1 is installed" in said and f"`pip uninstall {name}`" in said


def test_a_distribution_with_another_package_is_none_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "launch", "launch_services")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert clashing_distributions() == []


def test_the_command_is_refused_before_it_imports(tmp_path: Path) -> None:
    """A package before ours on the path, without any distribution: `headway` says where it is, and ends with 2."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "start.py").write_text(
        f"import sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from trainer.cli import main\nsys.exit(main(['doctor']))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "start.py")],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2 and f"`import kernels` finds {tmp_path}" in ran.stderr, ran.stderr
