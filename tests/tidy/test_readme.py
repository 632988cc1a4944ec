"""The pages keep their word: commands, folders, links and code blocks are those of this tree."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import zrmq.consumer
from tests.tidy.source import PAGES, ROOT
from tests.unit.real_cluster import running_cluster
from zrmq.cli.main import main

README = (ROOT / "README.md").read_text()


def section(title: str, text: str = README) -> str:
    """The text under one heading of level two."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"README.md needs a section '## {title}'."
    return found.group(1)


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("title", ["Run it", "Test it"])
def test_there_is_one_command_to_run_and_one_to_test(title: str) -> None:
    [(_, command)] = blocks(section(title))
    assert len(command.splitlines()) == 1
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")


def test_the_commands_use_extras_that_exist() -> None:
    extras = re.findall(r"^([a-z]+) =$", (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1], re.MULTILINE)
    for used in re.findall(r"\.\[(\w+)\]", README):
        assert used in extras


def test_continuous_integration_runs_the_line_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert '"## Test it"' in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


# --- the tour -----------------------------------------------------------------------------------------------------------


def toured() -> tuple[set[str], set[str]]:
    """What the tour names inside zrmq/, and beside it."""
    [(_, tour)] = blocks(section("A tour of the folders"))
    inside, beside = set(), set()
    for line in tour.splitlines():
        names = re.findall(r"[a-z_]+(?:\.py|/)", line.split("    ")[0] if line.startswith("  ") else line.split()[0])
        (inside if line.startswith("  ") else beside).update(names)
    return inside, beside


def test_the_tour_names_what_is_there() -> None:
    inside, beside = toured()
    assert [name for name in inside if not (ROOT / "zrmq" / name).exists()] == []
    assert [name for name in beside if not (ROOT / name).exists()] == []


def test_the_tour_leaves_nothing_out() -> None:
    inside, _ = toured()
    tree = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "zrmq").iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert tree - inside - {"__init__.py", "__main__.py"} == set(), "Name it in README.md, 'A tour of the folders'."


# --- promises -----------------------------------------------------------------------------------------------------------


def test_who_reads_of_order_reads_what_it_takes() -> None:
    """Where order is promised, the option that a listener needs for it is named."""
    [order] = re.findall(r"^- \*\*Order\*\*.*?(?=^- )", section("Good to know"), re.DOTALL | re.MULTILINE)
    for text in (order, zrmq.consumer.__doc__, zrmq.PushConsumer.__doc__):
        assert text is not None
        assert re.search(r"only\s+with\s+`in_order=True`|with\s+`in_order=True`\s+only", text)


# --- links --------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            faults.append(target)
    assert faults == [], f"{page.name} links to what is not there."


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_spoken_of_exist(page: Path) -> None:
    """`zrmq/...py`, `tests/...` and `docs/...` in running text are paths, so they have to be right."""
    spoken = re.findall(r"`((?:zrmq|tests|docs|examples|benchmarks)/[\w./-]+)`", page.read_text())
    assert [path for path in spoken if not (ROOT / path).exists() and "..." not in path] == []


# --- code ---------------------------------------------------------------------------------------------------------------


PYTHON_BLOCKS = [code for language, code in blocks(README) if language == "python"]
COMMANDS = [line for language, code in blocks(README) if not language for line in code.splitlines() if line.startswith("zrmq ")]


@pytest.fixture(scope="module")
def nameservers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as address:
        yield address


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_python_blocks_run(code: str, nameservers: str, tmp_path: Path) -> None:
    """As they stand. One that runs until Ctrl-C gets it after the first line it prints."""
    environment = {**os.environ, "ZRMQ_NAMESERVERS": nameservers, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", "-W", "error", "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        if ".run()" in code:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    assert "b'2" in first + out


def test_commands_run(nameservers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRMQ_NAMESERVERS", nameservers)
    assert len(COMMANDS) >= 3
    for line in COMMANDS:
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"
        assert result.stdout
