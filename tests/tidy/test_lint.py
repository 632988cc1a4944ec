"""ruff finds nothing to say about the source, the tests, the examples and the benchmarks."""

from __future__ import annotations

import subprocess
import sys

from tests.tidy.source import ROOT


def test_ruff_is_content() -> None:
    folders = [name for name in ("zrmq", "tests", "examples", "benchmarks") if (ROOT / name).is_dir()]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"Run `ruff check {' '.join(folders)}` and do what it says:\n{done.stdout}{done.stderr}"
