"""The floors hold (import-linter's contracts in setup.cfg), and no module-level randomness hides in a core."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from tests.tidy.source import LIBRARY, ROOT, tree_of, where


def test_contracts_are_kept() -> None:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command(['--no-cache']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (
        "An import breaks a contract of setup.cfg. Move the code to the floor where it belongs; move a line of the contract "
        f"only in a change that says why:\n{done.stdout}{done.stderr}"
    )
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept is not None
    assert int(kept.group(1)) >= 6


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_pages_draw_the_floors_of_the_contract(page: str) -> None:
    contract = re.search(r"^layers =\n((?: {4}.+\n)+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert contract is not None
    floors = [line.strip() for line in contract.group(1).splitlines() if line.strip() != "__main__"]
    drawings = re.findall(r"^```\n(cli .*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert [[re.split(r" {2,}", line)[0].strip() for line in drawing.splitlines()] for drawing in drawings] == [floors]


def test_randomness_is_handed_in() -> None:
    faults = []
    for file in LIBRARY:
        for part in ast.walk(tree_of(file)):
            if isinstance(part, ast.ImportFrom) and part.module == "random":
                faults += [where(file, part.lineno) for alias in part.names if alias.name not in ("Random", "SystemRandom")]
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "random":
                faults += [where(file, part.lineno)] * (part.attr not in ("Random", "SystemRandom"))
    assert not faults, f"Take a random.Random as an argument, so that a seed repeats the run: {faults}"
