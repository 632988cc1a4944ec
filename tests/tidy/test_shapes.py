"""The house rules that a reader would otherwise have to enforce: sizes, docstrings, words, and things never done."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import pytest

from tests.tidy.source import LIBRARY, OTHERS, PAGES, ROOT, TESTS, Definition, functions, length, tree_of, where

FUNCTION_LINES_MAX = 70
FUNCTION_LINES_MEDIAN = 8
FUNCTION_LINES_MOST = 30  # nine in ten
MODULE_LINES_MAX = 700

BANNED_WORDS = {
    "partition": "queue (MessageQueue)",
    "channel": "connection, link or topic",
    "subscriber": "consumer",
    "exchange": "topic",
    "node": "broker, NameServer or server",
    "leader": "master",
    "manager": "the noun of what it holds",
    "util": "the noun of what it is about",
    "utils": "the noun of what it is about",
    "helper": "the noun of what it is about",
    "helpers": "the noun of what it is about",
    "common": "the noun of what it is about",
}


def report(faults: list[str], advice: str) -> None:
    """Fail with all places at once, and with what to do about them."""
    assert not faults, f"{advice}\n  " + "\n  ".join(faults)


def test_functions_fit_on_a_screen() -> None:
    faults = [
        f"{where(file, function.lineno)} {function.name} has {length(function)} lines"
        for file in LIBRARY for function in functions(file) if length(function) > FUNCTION_LINES_MAX
    ]
    report(faults, f"Keep functions within {FUNCTION_LINES_MAX} lines: name the steps and move them out; ifs above, loops below.")


def test_most_functions_are_tiny() -> None:
    lengths = [length(function) for file in LIBRARY for function in functions(file)]
    middle, most = median(lengths), quantiles(lengths, n=10)[-1]
    assert middle <= FUNCTION_LINES_MEDIAN, f"The median function has {middle} lines; aim at {FUNCTION_LINES_MEDIAN}."
    assert most <= FUNCTION_LINES_MOST, f"Nine functions in ten have up to {most} lines; aim at {FUNCTION_LINES_MOST}."


def test_modules_have_one_subject() -> None:
    faults = [
        f"{where(file)} has {lines} lines"
        for file in LIBRARY if (lines := len(file.read_text().splitlines())) > MODULE_LINES_MAX
    ]
    report(faults, f"Keep modules within {MODULE_LINES_MAX} lines (aim at 250): give the second subject a file of its own.")


def test_tests_are_as_long_as_the_source() -> None:
    """The simulator and the faulty disk count as tests: that is what they are, although users get them too."""
    engines = [file for file in LIBRARY if "testing" in file.parts]
    library = [file for file in LIBRARY if file not in engines]
    source, tests = (sum(len(file.read_text().splitlines()) for file in files) for files in (library, [*TESTS, *engines]))
    assert tests >= source, f"{tests} lines of tests for {source} lines of source; write the missing ones."


# --- docstrings ---------------------------------------------------------------------------------------------------------


def test_each_file_begins_with_a_sentence() -> None:
    faults = []
    for file in [*LIBRARY, *TESTS, *OTHERS]:
        opening = (ast.get_docstring(tree_of(file)) or "").split("\n\n")[0].strip()
        if not opening.endswith((".", ":", "?", "!")) or tree_of(file).body[0].lineno != 1:
            faults.append(where(file))
    report(faults, "Begin each file, on its first line, with a docstring that says in a sentence what the file is for.")


def test_public_names_have_docstrings() -> None:
    documented = documented_in_interfaces()
    faults = [
        f"{where(file, part.lineno)} {name}"
        for file in LIBRARY for name, part in public_definitions(file)
        if ast.get_docstring(part) is None and not (part.name in documented and "." in name) and not is_plain(part, name)
    ]
    report(faults, "Give each public name a docstring: meaning, units, bounds, errors, thread rules.")


def public_definitions(file: Path) -> Iterator[tuple[str, Definition]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    for part in tree_of(file).body:
        if not isinstance(part, Definition) or part.name.startswith("_"):
            continue
        yield part.name, part
        if isinstance(part, ast.ClassDef):
            for inner in part.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                    yield f"{part.name}.{inner.name}", inner


def is_plain(part: Definition, name: str) -> bool:
    """Whether it is a method of one statement, which says what it does as well as a sentence would."""
    return "." in name and len(part.body) == 1 and not isinstance(part.body[0], ast.If | ast.For | ast.With | ast.Try)


def documented_in_interfaces() -> set[str]:
    """Names of methods that a `Protocol` or an abstract method of this package documents for all who implement it."""
    names = set()
    for file in LIBRARY:
        for part in tree_of(file).body:
            if isinstance(part, ast.ClassDef):
                is_protocol = any("Protocol" in ast.unparse(base) for base in part.bases)
                for inner in part.body:
                    if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner):
                        is_abstract = "NotImplementedError" in ast.unparse(inner.body[-1])
                        names |= {inner.name} if is_protocol or is_abstract else set()
    return names


# --- words --------------------------------------------------------------------------------------------------------------


def test_names_use_the_words_of_the_glossary() -> None:
    faults = []
    for file in LIBRARY:
        names = [(1, part) for part in file.relative_to(ROOT).with_suffix("").parts]
        for line, name in [*names, *defined_names(file)]:
            for word in BANNED_WORDS.keys() & words_of(name):
                faults.append(f"{where(file, line)} {name}: instead of {word!r} say {BANNED_WORDS[word]}")
    report(faults, "Use the project's words (CONTRIBUTING.md, glossary):")


def words_of(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)}


def defined_names(file: Path) -> Iterator[tuple[int, str]]:
    """Every name that a file gives to something: functions, classes, arguments, variables, attributes."""
    for part in ast.walk(tree_of(file)):
        if isinstance(part, Definition):
            yield part.lineno, part.name
        elif isinstance(part, ast.arg):
            yield part.lineno, part.arg
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.lineno, part.id
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part.lineno, part.attr


def test_words_are_split_as_readers_do() -> None:
    assert words_of("MessageQueue_node") == {"message", "queue", "node"}
    assert words_of("contextmanager") == {"contextmanager"}
    assert words_of("HTTPManager2") == {"http", "manager2"}


# --- things never done --------------------------------------------------------------------------------------------------


def calls(file: Path) -> Iterator[tuple[int, str]]:
    for part in ast.walk(tree_of(file)):
        if isinstance(part, ast.Call):
            yield part.lineno, ast.unparse(part.func)


def test_no_test_sleeps() -> None:
    faults = [
        f"{where(file, line)} {name}"
        for file in TESTS for line, name in calls(file) if name.rpartition(".")[2] in ("sleep", "usleep", "nanosleep")
    ]
    faults += [  # an event that nobody else knows
        f"{where(file, part.lineno)} {ast.unparse(part)}"
        for file in TESTS for part in ast.walk(tree_of(file))
        if isinstance(part, ast.Call) and ast.unparse(part.func).endswith("Event().wait")
    ]
    report(faults, "Wait for the thing itself (an event, a line of output, a state), with a bound; or turn a clock by hand.")


def test_nothing_runs_what_a_peer_sent() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "pickle.loads", "pickle.load", "marshal.loads"}
    faults = [f"{where(file, line)} {name}" for file in LIBRARY for line, name in calls(file) if name in forbidden]
    for file in [*LIBRARY, *OTHERS]:
        for part in ast.walk(tree_of(file)):
            if isinstance(part, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in part.names] + [getattr(part, "module", None) or ""]
                faults += [f"{where(file, part.lineno)} {name}" for name in names if name in ("pickle", "marshal", "shelve")]
    report(faults, "Bytes from a peer, a file or a user are decoded by zrmq.protocol or msgspec, never run.")


def test_no_exception_is_swallowed() -> None:
    faults = [
        where(file, part.lineno)
        for file in LIBRARY for part in ast.walk(tree_of(file))
        if isinstance(part, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in part.body)
    ]
    report(faults, "Handle it, log it, or say by `with suppress(...)` and a comment why it does not matter.")


MARKERS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")


@pytest.mark.parametrize("file", [*LIBRARY, *TESTS, *OTHERS, *PAGES], ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_left_for_later(file: Path) -> None:
    faults = [where(file, number) for number, line in enumerate(file.read_text().splitlines(), 1) if MARKERS.search(line)]
    report(faults, "Do it, or leave it out; what is missing on purpose stands in the README.")
