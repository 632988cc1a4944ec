"""What SIGINT and SIGTERM mean while something runs in the main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def until_signal(on_signal: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `on_signal` at the first of them; from then on, and afterwards, they mean what they meant before.

    It runs in the middle of whatever the main thread does, such as a log line, so it must not wait for anything. Only the main
    thread can set handlers; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: C code's, which Python cannot put back

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        on_signal(signal.Signals(number))

    try:
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, handle)
        yield
    finally:
        restore()
