"""Each promise of ARCHITECTURE.md names the test that guards it, and that test exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.tidy.source import ROOT, tree_of

PAGE = (ROOT / "ARCHITECTURE.md").read_text()
GUARD = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """The rows of the promises table: what is promised, and the tests that guard it as (file, function or nothing)."""
    found = re.search(r"^## Promises.*?\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if found is None:
        return []
    rows = [line for line in found.group(1).splitlines() if line.startswith("|") and not re.match(r"\|[ |:-]+\|$", line)]
    return [(row.split("|")[1].strip(), GUARD.findall(row)) for row in rows[1:]]


def test_there_are_promises() -> None:
    assert len(promises()) >= 5, "ARCHITECTURE.md needs a section '## Promises': a table of them and of their tests."


@pytest.mark.parametrize(("promise", "guards"), promises(), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_each_promise_is_guarded(promise: str, guards: list[tuple[str, str]]) -> None:
    assert guards, f"{promise!r} names no test: write tests/....py::test_... beside it."
    for name, function in guards:
        file = ROOT / name
        assert file.is_file(), f"{name}, which guards {promise!r}, does not exist."
        if function:
            defined = {part.name for part in ast.walk(tree_of(file)) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert function in defined, f"{name} has no {function}, which guards {promise!r}."
