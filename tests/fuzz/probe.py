"""What a target may do with an input: succeed, or raise a typed error; within so much memory and so much processor time."""

from __future__ import annotations

import hashlib
import logging
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from random import Random
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import structlog

from tests.fuzz.mutation import Make
from tests.memory import peak_bytes
from zrmq.clock import SystemClock
from zrmq.errors import Code, ZrmqError
from zrmq.protocol.requests import Failed, decode_reply, encode, failed

CPU_SECONDS_MAX = 10.0  # for one input; the slowest take some milliseconds, and a machine may have other things to do
BASE_BYTES_MAX = 1 << 20  # that any input may take for a moment
MULTIPLE_MAX = 64  # so many bytes of memory for a byte of input: MessagePack's shortest values become Python objects
GROWTH_BYTES_MAX = 8 << 20  # of the process's peak by an input that is not traced: then it is given once more, and traced
SPACE_BYTES_MAX = 1 << 29  # beyond it an input gets a MemoryError, and the machine goes on
STATM = Path("/proc/self/statm")  # Linux only: elsewhere an input may take what the machine has
KEPT = Path(__file__).parents[1] / "corpus" / "fuzz"  # inputs that found something once


class Target(NamedTuple):
    """Something that takes bytes from others."""

    name: str
    take: Callable[[bytes], object]
    seeds: Sequence[bytes]
    make: Make
    size: Callable[[bytes], int] = len  # what the input counts for memory: what it may unpack to
    weight: float = 1  # its share of the inputs
    traced_every: int = 1  # which inputs' memory is traced: that takes most of the time of what runs long


class TookTooLongError(BaseException):
    """No target may handle it."""


class Finding(NamedTuple):
    """One input that did what none may."""

    target: str
    what: str
    where: str
    data: bytes

    def keep(self, folder: Path = KEPT) -> Path:
        """Write the input to a file, named by its target and content, for the test that replays them."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:12]}.bin"
        path.write_bytes(self.data)
        return path


class Probe:
    """Feeds inputs to targets and looks at what they do. In a `with`, from the main thread: it measures memory and time."""

    def __init__(self) -> None:
        self.inputs: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.traced: Counter[str] = Counter()
        self.peak_bytes: Counter[str] = Counter()  # most memory one input took, by target
        self.findings: dict[tuple[str, str, str], Finding] = {}
        self.found_count = 0

    def __enter__(self) -> Self:
        self._old = signal.signal(signal.SIGPROF, _too_long)
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        if STATM.exists():
            used = int(STATM.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + SPACE_BYTES_MAX, self._limits[1]))
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # damage is reported as such
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        structlog.reset_defaults()
        resource.setrlimit(resource.RLIMIT_AS, self._limits)
        signal.signal(signal.SIGPROF, self._old)

    def run(self, target: Target, rng: Random, count: int) -> None:
        """So many new inputs."""
        for _ in range(count):
            self.feed(target, target.make(rng, target.seeds))

    def feed(self, target: Target, data: bytes) -> None:
        """One input."""
        is_traced = self.inputs[target.name] % target.traced_every == 0
        self.inputs[target.name] += 1
        if not is_traced:
            before = _rss_peak_bytes()
            self._give(target, data)
            if _rss_peak_bytes() - before <= GROWTH_BYTES_MAX:
                return
        self._trace(target, data)

    def _trace(self, target: Target, data: bytes) -> None:
        limit = BASE_BYTES_MAX + MULTIPLE_MAX * len(data)
        took = peak_bytes(lambda: self._give(target, data), limit)
        self.traced[target.name] += 1
        self.peak_bytes[target.name] = max(took, self.peak_bytes[target.name])
        if took > limit and took > BASE_BYTES_MAX + MULTIPLE_MAX * target.size(data):
            self._note(target, data, f"{took} bytes of memory", None)

    def _give(self, target: Target, data: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_MAX, 1.0)  # again, where one that is closed is stuck too
        try:
            target.take(data)
        except ZrmqError as error:
            self.refused[target.name] += 1
            if not _can_travel(error):
                self._note(target, data, f"{type(error).__name__} that cannot be sent", error)
        except TookTooLongError as error:
            self._note(target, data, f"more than {CPU_SECONDS_MAX} s of the processor", error)
        except Exception as error:  # noqa: BLE001 - what a target may not raise is what is looked for
            self._note(target, data, f"{type(error).__name__}: {str(error)[:80]}", error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _note(self, target: Target, data: bytes, what: str, error: BaseException | None) -> None:
        self.found_count += 1
        where = "" if error is None else _where(error)
        kind = what.split(":")[0] if error is not None else "memory"
        self.findings.setdefault((target.name, kind, where), Finding(target.name, what, where, data))

    def report(self, elapsed_ms: float) -> dict[str, Any]:
        """What was done and found, for a person or a program."""
        return {
            "inputs": self.inputs.total(), "refused": self.refused.total(), "elapsed_ms": round(elapsed_ms),
            "by_target": {
                name: {
                    "inputs": count, "refused": self.refused[name], "traced": self.traced[name],
                    "peak_bytes": self.peak_bytes[name],
                }
                for name, count in self.inputs.items()
            },
            "rss_peak_bytes": _rss_peak_bytes(),
            "found": self.found_count,
            "findings": [found._asdict() | {"data": found.data[:200].hex()} for found in self.findings.values()],
        }


def run_targets(targets: Sequence[Target], seed: int, count: int) -> tuple[Probe, float]:
    """`count` inputs in all, each target's share rounded up, and the milliseconds it took. One seed, the same inputs."""
    clock = SystemClock()
    began_ms = clock.monotonic_ms()
    weights = sum(target.weight for target in targets)
    with Probe() as probe:
        for target in targets:
            probe.run(target, Random(f"{seed} {target.name}"), ceil(count * target.weight / weights))
    return probe, clock.monotonic_ms() - began_ms


def _rss_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _where(error: BaseException) -> str:
    """The last lines of zrmq that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/zrmq/" in frame.filename]
    return " < ".join(f"{frame.filename.rpartition('/zrmq/')[2]}:{frame.lineno} {frame.name}" for frame in frames[:-4:-1])


def _can_travel(error: ZrmqError) -> bool:
    reply = decode_reply(encode(failed(7, error)))
    return isinstance(error.code, Code) and isinstance(reply, Failed) and reply.code == error.code


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLongError
