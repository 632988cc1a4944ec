"""Log lines: one per decision, an event's name and its facts. structlog is loaded by the first line that is written.

A library must not decide where its user's logs go. So:

- a program that configured structlog gets our lines, all levels, the way it asked for;
- a program that did not gets warnings and errors on stderr, in structlog's own look, and nothing is loaded before the first;
- the processes we own (`zrmq up`, `zrmq broker`, ...) call `configure_logging` once, at their start.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from zrmq.errors import ConfigError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

LogFormat = Literal["auto", "pretty", "json"]  # auto: pretty on a terminal, json otherwise
LogLevel = Literal["debug", "info", "warning", "error"]

_LEVELS: dict[str, int] = {
    "debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR,
}
_FORMATS = ("auto", "pretty", "json")


class Logger:
    """Log lines of one part of zrmq. Any thread may use it, at any time; made by `get_logger`.

    An event's name is a noun and what happened to it (`segment_rolled`); everything else is a fact.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, /, **facts: object) -> None:
        """For somebody who looks for a fault in zrmq itself."""
        if _is_configured():
            self._target().debug(event, **facts)

    def info(self, event: str, /, **facts: object) -> None:
        """A decision that was taken in the normal course of things."""
        if _is_configured():
            self._target().info(event, **facts)

    def warning(self, event: str, /, **facts: object) -> None:
        """Something an operator should know of; zrmq goes on by itself."""
        if _Quiet.depth == 0 or _is_configured():
            self._target().warning(event, **facts)

    def error(self, event: str, /, **facts: object) -> None:
        """Something an operator has to do something about."""
        self._target().error(event, **facts)

    def exception(self, event: str, /, **facts: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._target().exception(event, **facts)

    def _target(self) -> FilteringBoundLogger | _Plain:
        try:
            import structlog

            target = structlog.get_logger() if structlog.is_configured() else structlog.wrap_logger(
                _lines,
                processors=_processors(pretty=True),
                wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            )
        except OSError:  # no descriptor to load it by: nobody's thread may end because it has something to say
            return _Plain(self._name)
        return target.bind(logger=self._name)  # type: ignore[no-any-return]


class _Quiet:
    depth = 0


@contextmanager
def quiet() -> Iterator[None]:
    """Within it warnings are dropped, in all threads, unless the program configured structlog: for a command that tells its user
    itself what goes wrong, in one sentence."""
    _Quiet.depth += 1
    try:
        yield
    finally:
        _Quiet.depth -= 1


def get_logger(name: str) -> Logger:
    """The logger of one part of zrmq, named like its package (`store`, `routing`). Loads nothing."""
    return Logger(name)


def configure_logging(log_format: LogFormat = "auto", level: LogLevel = "info") -> None:
    """Send the log lines of this process to stderr, from `level` on. Only for processes we own; a library never calls it.

    Raises `ConfigError` for a format or level that does not exist.
    """
    import structlog

    _check_choice("log_format", log_format, _FORMATS)
    _check_choice("log_level", level, tuple(_LEVELS))
    pretty = log_format == "pretty" or (log_format == "auto" and _is_terminal())
    structlog.configure(
        processors=_processors(pretty),
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda: _lines,
        cache_logger_on_first_use=False,
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(choices)}.", value=value, choices=choices)


def _processors(pretty: bool) -> list[Processor]:
    from structlog.dev import ConsoleRenderer, plain_traceback
    from structlog.processors import JSONRenderer, TimeStamper, add_log_level, format_exc_info

    steps: list[Processor] = [add_log_level, TimeStamper(fmt="iso", utc=True)]
    if not pretty:
        return [*steps, format_exc_info, JSONRenderer()]
    # A plain traceback: the decorated one shows local variables, and those can be message bodies.
    return [*steps, ConsoleRenderer(colors=_is_terminal(), exception_formatter=plain_traceback)]


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _is_configured() -> bool:
    """Whether the program, or `configure_logging`, said where log lines go. Asks without loading structlog."""
    is_configured: Any = getattr(sys.modules.get("structlog"), "is_configured", None)  # None while another thread is loading it
    return is_configured is not None and bool(is_configured())


class _Lines:
    """Writes to sys.stderr as it is at each line. One that cannot be written is lost: a closed terminal must not end a broker.

    structlog's own writer holds a lock meanwhile. A signal handler that logs waits for it for ever when it has interrupted a line
    of its thread, and so does a forked child when another thread was writing. Lines are whole without it, as each is one `write`;
    Python refuses the handler's (RuntimeError) while it is in the middle of another.
    """

    def debug(self, line: str) -> None:
        with suppress(OSError, ValueError, RuntimeError):
            if sys.stderr is not None:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()

    info = warning = error = debug


_lines = _Lines()


class _Plain:
    """Lines while structlog cannot be loaded."""

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, **facts: object) -> None:
        _lines.debug(f"{event} [{self._name}] " + " ".join(f"{name}={fact!r}" for name, fact in facts.items()))

    info = warning = error = debug

    def exception(self, event: str, **facts: object) -> None:
        self.error(event, **facts, exception=traceback.format_exc())
