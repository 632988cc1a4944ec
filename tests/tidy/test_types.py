"""mypy --strict passes over the library, and a user's program sees the types of the lazy public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import zrmq
from tests.tidy.source import ROOT

pytestmark = pytest.mark.timeout(300)  # the first run, without a cache, reads every library


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_library_is_typed() -> None:
    done = mypy()
    assert done.returncode == 0, f"Run `mypy` and add the types it misses:\n{done.stdout}{done.stderr}"


def test_users_see_the_types_of_public_names(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    names = [name for name in zrmq.__all__ if name != "__version__"]
    program.write_text("import zrmq\n" + "".join(f"reveal_type(zrmq.{name})\n" for name in names))
    done = mypy("--strict", str(program))
    faults = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert done.returncode == 0, f"Name each public name under TYPE_CHECKING in zrmq/__init__.py: {faults}"
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names)
    misspelt = tmp_path / "misspelt.py"
    misspelt.write_text("import zrmq\nzrmq.Prodcer\n")
    assert "has no attribute" in mypy("--strict", str(misspelt)).stdout
    untyped = [line for line in revealed if '"Any"' in line or '"object"' in line]
    assert not untyped, f"These reach users without a type: {untyped}"
