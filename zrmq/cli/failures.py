"""How a command ends: the exit codes, and one place that turns every error into a sentence, or into JSON."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import click

from zrmq.errors import Code, ConfigError, InvalidArgumentError, UnreachableError, ZrmqError

EXIT_DONE = 0  # everything that was asked for
EXIT_FAILED = 1  # not, or not all of it; stderr says why
EXIT_USAGE = 2  # an argument, option, variable or configuration file cannot be
EXIT_UNREACHABLE = 3  # no NameServer, or no broker, answered


class Invocation:
    """What the end of a command depends on: how to tell an error, and whether something was missing in the output."""

    as_json = False
    is_partial = False


def run_command(command: Callable[[], Any], invocation: Invocation) -> int:
    """Run the command and return the exit code. Whatever it raises is told on stderr, in one sentence."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`: nobody wants to hear
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_FAILED if invocation.is_partial else EXIT_DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _end_usage(error, invocation)
    except (click.Abort, KeyboardInterrupt):
        _tell(Code.CLOSED, "Interrupted.", invocation)
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the last place where an error can be told to a person
        return _end_error(error, invocation)


def _end_usage(error: click.ClickException, invocation: Invocation) -> int:
    if invocation.as_json or not isinstance(error, click.UsageError):
        _tell(Code.CONFIG, error.format_message(), invocation)
    else:
        error.show()
    return error.exit_code


def _end_error(error: Exception, invocation: Invocation) -> int:
    from zrmq.files import FULL

    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return _drop_output()
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        sentence = f"{error.filename or 'The output'} cannot be used: {error.strerror}. Use another place."
        _tell(Code.DISK_FULL if error.errno in FULL else Code.FOLDER_UNUSABLE, sentence, invocation)
        return _drop_output()
    if not isinstance(error, ZrmqError):
        _report(error, invocation)
        return EXIT_FAILED
    sentence = _for_shell(error.message)
    if invocation.as_json:
        _tell(error.code, sentence, invocation, facts=error.plain_facts())
    else:
        click.echo(f"Error: {sentence} [{int(error.code)} {error.code.name}]", err=True)
    if isinstance(error, InvalidArgumentError | ConfigError):
        return EXIT_USAGE
    return EXIT_UNREACHABLE if isinstance(error, UnreachableError) else EXIT_FAILED


def _drop_output() -> int:
    """Whoever read our output has left (`zrmq tail | head`), or there is no room for it. stdout must not try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED


def _report(error: Exception, invocation: Invocation) -> None:
    """A fault of ours: the traceback goes into a file, so that it can be sent to somebody."""
    sentence = f"zrmq failed in a way nobody thought of ({type(error).__name__}: {error})."
    trace = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="zrmq-report-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"zrmq {' '.join(sys.argv[1:])}\nPython {sys.version}\n\n{trace}")
    except OSError:  # no folder, no room, no descriptor for it
        _tell(Code.INTERNAL_ERROR, sentence if invocation.as_json else f"{sentence}\n{trace}", invocation, trace=trace)
    else:
        _tell(Code.INTERNAL_ERROR, f"{sentence} {path} has the details.", invocation, report=path)


def _for_shell(sentence: str) -> str:
    """What the library says to a program, for who typed a command: the flag in place of the argument."""
    return sentence.replace(" nameservers= ", " --nameservers ")


def _tell(code: Code, sentence: str, invocation: Invocation, **more: Any) -> None:
    """The sentence; as JSON with the code, for programs, and whatever else there is to know."""
    if not invocation.as_json:
        click.echo(f"Error: {sentence}", err=True)
        return
    import msgspec

    error = {"code": int(code), "name": code.name, "message": sentence, **more}
    click.echo(msgspec.json.encode({"error": error}).decode(), err=True)
