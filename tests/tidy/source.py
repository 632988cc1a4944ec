"""Where the project's files are, parsed, for the tests that look at the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "zrmq").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = sorted(file for folder in ("examples", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in ("docs", "tests", "benchmarks") for page in (ROOT / name).rglob("*.md"))])

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def where(file: Path, line: int = 1) -> str:
    """Path and line as an editor opens them."""
    return f"{file.relative_to(ROOT)}:{line}"


@cache
def tree_of(file: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(file.read_text(), str(file))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file, nested ones too."""
    for part in ast.walk(tree_of(file)):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield part


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from `def` to its end, its docstring not counted."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines
