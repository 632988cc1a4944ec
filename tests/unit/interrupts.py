"""A signal handler wherever one may run: Python looks for signals after calls, and when a function is entered.

    for at in count():
        interrupt = Interrupt(at, accumulator_module)
        with interrupt.may_come():
            setup.append()
        if not interrupt.came:
            break  # there are no more places

It raises an exception, as Ctrl-C does, unless it is given something else to do.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, ModuleType
from typing import Any

LOOKS_AFTER = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}  # operations after which Python looks


class Interrupt(BaseException):
    """What the handler raises, once, at the place of number `at` (from 0) in code of `modules`; or else it calls `act`."""

    def __init__(self, at: int, *modules: ModuleType, act: Callable[[], object] | None = None) -> None:
        super().__init__(at)
        self.came = False
        self._act = act or self._throw
        self._left = at
        self._files = {module.__file__ for module in modules}
        self._last: dict[FrameType, str] = {}
        self._operations: dict[CodeType, dict[int, str]] = {}

    @contextmanager
    def may_come(self) -> Iterator[None]:
        """What is done in here may be ended by it."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        except Interrupt as raised:
            assert raised is self
        finally:
            sys.settrace(before)
            self._last.clear()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            if self.came or frame.f_code.co_filename not in self._files:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self._last[frame] = "RESUME"  # which some versions do not tell
        elif event == "opcode" and not self.came:
            if self._last.get(frame) in LOOKS_AFTER:
                if self._left == 0:
                    self.came = True
                    self._act()
                self._left -= 1
            self._last[frame] = self._operation(frame)
        elif event == "return" and frame.f_back is not None:
            self._last[frame.f_back] = ""  # it looked on entry, and does not on return
        return self._trace

    def _throw(self) -> None:
        raise self

    def _operation(self, frame: FrameType) -> str:
        code = frame.f_code
        if code not in self._operations:
            self._operations[code] = {each.offset: each.opname for each in dis.get_instructions(code)}
        names, at = self._operations[code], frame.f_lasti
        while names[at] == "EXTENDED_ARG":  # what it belongs to is not told
            at += 2
        return names[at]
