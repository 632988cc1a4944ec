"""The public names are what they claim to be, and importing zrmq costs next to nothing."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

import zrmq
import zrmq.errors
from tests.tidy.source import ROOT, tree_of

HEAVY = {"structlog", "sqlite3", "click", "rich", "psutil", "asyncio", "msgpack", "http", "email", "unittest"}


def test_all_is_sorted_and_unique() -> None:
    assert zrmq.__all__ == ["__version__", *sorted(set(zrmq.__all__) - {"__version__"})]


@pytest.mark.parametrize("name", zrmq.__all__)
def test_each_name_exists(name: str) -> None:
    assert getattr(zrmq, name) is not None


def test_editors_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the table that loads lazily name the same things of the same modules."""
    block = next(part for part in tree_of(ROOT / "zrmq" / "__init__.py").body if isinstance(part, ast.If))
    seen = {alias.name: part.module for part in block.body if isinstance(part, ast.ImportFrom) for alias in part.names}
    assert seen == zrmq._HOMES


def test_every_error_is_public() -> None:
    errors = {
        name for name, value in vars(zrmq.errors).items()
        if inspect.isclass(value) and issubclass(value, zrmq.ZrmqError) and not name.startswith("_")
    }
    assert errors <= set(zrmq.__all__)


def test_the_error_tree_is_drawn() -> None:
    drawn = zrmq.errors.__doc__ or ""
    errors = [name for name in zrmq.__all__ if name.endswith("Error")]
    assert [name for name in errors if name not in drawn] == [], "Draw the class in the tree on top of zrmq/errors.py."


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Partition'"):
        zrmq.Partition  # noqa: B018 - looking it up is the test


def test_dir_lists_the_names() -> None:
    assert set(zrmq.__all__) <= set(dir(zrmq))


def test_every_module_can_be_imported_alone() -> None:
    for file in sorted((ROOT / "zrmq").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))


def test_every_folder_with_modules_is_a_package() -> None:
    """setuptools leaves out a folder without `__init__.py`: it would be missing only where zrmq is installed."""
    folders = {file.parent for file in (ROOT / "zrmq").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def loaded_by(program: str) -> set[str]:
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_nothing() -> None:
    assert loaded_by("import zrmq") & (HEAVY | {"zmq", "msgspec"}) == set()


def test_clients_load_pyzmq_and_msgspec_only() -> None:
    """asyncio comes with pyzmq; everything else that is heavy stays away until it is used."""
    loaded = loaded_by("import zrmq\nzrmq.Producer, zrmq.PushConsumer, zrmq.PullConsumer, zrmq.Message, zrmq.connect")
    assert {"zmq", "msgspec"} <= loaded
    assert loaded & {"structlog", "sqlite3", "click", "rich", "psutil", "msgpack"} == set()
