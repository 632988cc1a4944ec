"""The command line as a whole: the table, help, exit codes, and how errors are told."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from zrmq import errors
from zrmq.cli import main as cli
from zrmq.cli.failures import EXIT_DONE, EXIT_FAILED, EXIT_UNREACHABLE, EXIT_USAGE, Invocation, run_command
from zrmq.cli.main import COMMANDS, main


def run(*arguments: str, **extra: Any) -> Result:
    return CliRunner().invoke(main, list(arguments), **extra)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command that does something, by its words."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def test_exit_codes_are_those_of_the_contract() -> None:
    assert (EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE) == (0, 1, 2, 3)


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == EXIT_DONE
    for name, (_, what) in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert what.endswith(".")


def test_help_is_quick() -> None:
    """It imports click and the table, and none of the commands nor what they need."""
    program = "import sys\nfrom zrmq.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded & {"zmq", "msgspec", "structlog", "rich", "sqlite3", "zrmq.config", "zrmq.cli.send", "zrmq.cli.topic"} == set()


@pytest.mark.parametrize("words", list(commands(main)), ids=" ".join)
def test_each_command_has_help_that_ends_in_examples(words: tuple[str, ...]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == EXIT_DONE
    assert "Examples:" in result.stdout
    assert f"zrmq {' '.join(words)}" in result.stdout.split("Examples:")[1]


@pytest.mark.parametrize("words", list(commands(main)), ids=" ".join)
def test_each_command_can_print_json(words: tuple[str, ...]) -> None:
    assert "--json" in run(*words, "--help").stdout


def test_the_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (EXIT_DONE, "zrmq 0.1.0\n")


@pytest.mark.parametrize("arguments", [["nope"], ["--nope"], ["topic", "nope"], ["topic", "list", "--nope"], ["topic", "show"]])
def test_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == EXIT_USAGE
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_wrong_usage_as_json() -> None:
    result = run("topic", "create", "--json", "meters", "--queues", "0")
    assert result.exit_code == EXIT_USAGE
    error = json.loads(result.stderr)["error"]
    assert "0 is not in the range 1<=x<=1024" in error["message"]
    assert (error["code"], error["name"]) == (61005, "CONFIG")


@pytest.mark.parametrize(
    "line", ["up --json --nope", "up --nope --json", "topic --json nope", "nope --json", "send --json", "send meters --json"]
)
def test_wrong_usage_is_json_wherever_json_is_asked_for(line: str) -> None:
    result = run(*line.split())
    assert result.exit_code == EXIT_USAGE
    assert json.loads(result.stderr)["error"]["name"] == "CONFIG"


@pytest.mark.parametrize("line", ["send meters --nope -- --json", "send meters --tag --json --timeout soon x"])
def test_what_only_looks_like_json_is_not_taken_for_it(line: str) -> None:
    result = run(*line.split())
    assert result.exit_code == EXIT_USAGE
    assert result.stderr.startswith("Usage: zrmq send ")


def test_python_m_zrmq_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "zrmq", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "zrmq 0.1.0\n"


# --- errors -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Callable[..., Result]]:
    """Adds a command `fail` that raises; returns how to run it."""

    def add(error: BaseException) -> Callable[..., Result]:
        from zrmq.cli.options import json_option

        @click.command()
        @json_option
        def fail(as_json: bool) -> None:
            raise error

        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: fail)
        return lambda *arguments: run("fail", *arguments)

    return add


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TopicNotFoundError("No topic 'x'; create it.", topic="x"), EXIT_FAILED),
        (errors.RequestTimeoutError("No answer."), EXIT_FAILED),
        (errors.DiskFullError("The disk is full."), EXIT_FAILED),
        (errors.FolderLockedError("Somebody else has the folder."), EXIT_FAILED),
        (errors.InvalidArgumentError("A topic needs a name."), EXIT_USAGE),
        (errors.ConfigError("host is wrong."), EXIT_USAGE),
        (errors.UnreachableError("Nobody answers at tcp://127.0.0.1:1."), EXIT_UNREACHABLE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_a_sentence_and_a_code(failing: Any, error: errors.ZrmqError, code: int) -> None:
    result = failing(error)()
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"Error: {error.message} [{int(error.code)} {error.code.name}]\n"


def test_an_error_as_json(failing: Any) -> None:
    result = failing(errors.PayloadTooLargeError("Too large.", size_bytes=5, path=Path("/x"), what=None))("--json")
    assert result.exit_code == EXIT_FAILED
    assert json.loads(result.stderr) == {
        "error": {
            "code": 41300, "name": "PAYLOAD_TOO_LARGE", "message": "Too large.",
            "facts": {"size_bytes": 5, "path": "/x", "what": None},
        }
    }


@pytest.mark.parametrize("as_json", [False, True])
def test_a_fault_of_ours_leaves_a_report(failing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = failing(ZeroDivisionError("one by zero"))(*["--json"] * as_json)
    assert result.exit_code == EXIT_FAILED
    [report] = tmp_path.iterdir()
    assert str(report) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    text = report.read_text()
    assert "ZeroDivisionError: one by zero" in text
    assert "Traceback" in text
    if as_json:
        error = json.loads(result.stderr)["error"]
        assert (error["report"], error["code"], error["name"]) == (str(report), 50000, "INTERNAL_ERROR")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_report_that_cannot_be_written_is_told(
    failing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    result = failing(ZeroDivisionError("one by zero"))(*["--json"] * as_json)
    assert result.exit_code == EXIT_FAILED
    told = "".join(map(str, json.loads(result.stderr)["error"].values())) if as_json else result.stderr
    assert "nobody thought of (ZeroDivisionError: one by zero)." in told
    assert "Traceback" in told


def test_ctrl_c_is_not_done(failing: Any) -> None:
    result = failing(KeyboardInterrupt())()
    assert (result.exit_code, result.stderr.strip()) == (EXIT_FAILED, "Error: Interrupted.")
    result = failing(KeyboardInterrupt())("--json")
    told = {"error": {"code": 61003, "name": "CLOSED", "message": "Interrupted."}}
    assert (result.exit_code, json.loads(result.stderr)) == (EXIT_FAILED, told)


@pytest.mark.parametrize(("number", "name"), [(errno.ENOSPC, "DISK_FULL"), (errno.ENOENT, "FOLDER_UNUSABLE")])
def test_a_file_that_cannot_be_used_has_a_code(number: int, name: str) -> None:
    """In a process of its own: the command gives its stdout up."""
    program = (
        "import sys\nfrom zrmq.cli.failures import Invocation, run_command\n"
        f"def command():\n    raise OSError({number}, 'No.', '/x')\n"
        "asked = Invocation()\nasked.as_json = True\nsys.exit(run_command(command, asked))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == EXIT_FAILED
    assert json.loads(done.stderr)["error"]["name"] == name


def test_a_command_may_choose_its_exit_code() -> None:
    assert run_command(lambda: 3, Invocation()) == EXIT_UNREACHABLE
    assert run_command(lambda: None, Invocation()) == EXIT_DONE


def test_a_gap_in_the_output_is_a_failure() -> None:
    invocation = Invocation()
    invocation.is_partial = True
    assert run_command(lambda: None, invocation) == EXIT_FAILED


def test_a_reader_that_leaves_is_no_fault() -> None:
    """`zrmq ... | head` must not end in a traceback."""
    program = (
        "import sys\nfrom zrmq.cli.failures import Invocation, run_command\n"
        "def command():\n    while True: print('x' * 1000)\n"
        "sys.exit(run_command(command, Invocation()))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == EXIT_FAILED


# --- nothing reachable --------------------------------------------------------------------------------------------------


CLIENTS = ["topic list", "topic create meters", "group list", "cluster", "broker-status", "send meters x", "tail meters"]


@pytest.mark.parametrize("line", CLIENTS)
def test_nothing_reachable(line: str) -> None:
    result = run(*line.split(), "--nameservers", "tcp://127.0.0.1:1", "--timeout", "1s")
    assert result.exit_code == EXIT_UNREACHABLE
    assert "tcp://127.0.0.1:1" in result.stderr
    assert "or give the right addresses by --nameservers or ZRMQ_NAMESERVERS." in result.stderr


@pytest.mark.parametrize("line", CLIENTS)
def test_an_address_that_cannot_be(line: str) -> None:
    result = run(*line.split(), "--nameservers", "tcp://box:99999")
    assert result.exit_code == EXIT_USAGE
    assert "tcp://HOST:PORT" in result.stderr


def test_the_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRMQ_NAMESERVERS", "tcp://127.0.0.1:2")
    result = run("cluster", "--timeout", "1s")
    assert result.exit_code == EXIT_UNREACHABLE
    assert "tcp://127.0.0.1:2" in result.stderr
