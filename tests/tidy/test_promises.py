"""Each promise of ARCHITECTURE.md names its checker and the test that guards it, and these exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.tidy.source import ROOT, tree_of

PAGE = (ROOT / "ARCHITECTURE.md").read_text()
GUARD = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


CHECKERS = {"soak": "tests/process/soak_verdict.py", "fuzz": "tests/fuzz/test_fuzz.py", "corpus": "tests/corpus/README.md"}
RAISING = re.compile(r"(?:BrokenPromise|_fail)\(\s*\"(\w+)\"")
OF_THE_TOOL = {"fault"}  # what the simulator says of itself


def checkers() -> list[tuple[str, list[str]]]:
    """The rows of the promises table: what is promised, and the checkers of it."""
    return [(row.split("|")[1].strip(), re.findall(r"\w+", row.split("|")[2])) for row in rows()]


def kinds() -> set[str]:
    """What the simulator's checkers report."""
    files = (ROOT / "zrmq" / "testing" / "simulation").glob("*.py")
    return {kind for file in files for kind in RAISING.findall(file.read_text())} - OF_THE_TOOL


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """The same rows: what is promised, and the tests that guard it as (file, function or nothing)."""
    return [(row.split("|")[1].strip(), GUARD.findall(row)) for row in rows()]


def rows() -> list[str]:
    found = re.search(r"^## Promises.*?\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    if found is None:
        return []
    lines = [line for line in found.group(1).splitlines() if line.startswith("|") and not re.match(r"\|[ |:-]+\|$", line)]
    return lines[1:]


def test_there_are_promises() -> None:
    assert len(promises()) >= 5, "ARCHITECTURE.md needs a section '## Promises': a table of them and of their tests."


def test_no_promise_is_made_twice() -> None:
    begun = [re.split(r"[,:;(]", promise)[0].strip() for promise, _ in promises()]
    assert len(begun) == len(set(begun)), [beginning for beginning in begun if begun.count(beginning) > 1]


@pytest.mark.parametrize(("promise", "guards"), promises(), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_each_promise_is_guarded(promise: str, guards: list[tuple[str, str]]) -> None:
    assert guards, f"{promise!r} names no test: write tests/....py::test_... beside it."
    for name, function in guards:
        file = ROOT / name
        assert file.is_file(), f"{name}, which guards {promise!r}, does not exist."
        if function:
            defined = {part.name for part in ast.walk(tree_of(file)) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert function in defined, f"{name} has no {function}, which guards {promise!r}."


@pytest.mark.parametrize(("promise", "names"), checkers(), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_each_promise_has_a_checker(promise: str, names: list[str]) -> None:
    assert names, f"{promise!r} names no checker: write a kind of the simulator's, or one of {sorted(CHECKERS)}."
    for name in names:
        there = name in kinds() or (ROOT / CHECKERS.get(name, "nowhere")).is_file()
        assert there, f"There is no checker {name!r} for {promise!r}."


def test_each_checker_of_the_simulator_is_there_for_a_promise() -> None:
    assert kinds() - {name for _, names in checkers() for name in names} == set()
