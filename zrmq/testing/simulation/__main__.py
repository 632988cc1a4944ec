"""Run seeds of the simulator: `python -m zrmq.testing.simulation --seed N --runs M [--events K] [--json]`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import msgspec

from zrmq.clock import Clock, SystemClock
from zrmq.testing.simulation.run import Result, run_seed
from zrmq.testing.simulation.trace import EVENTS_KEPT, SimulationError

FAILURES_MAX = 20  # after so many nothing new is learned


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as many seeds as asked for; 1 when one of them failed."""
    options = _parser().parse_args(arguments)
    tally = _Tally(SystemClock(), as_json=options.json)
    try:
        _run(options, tally)
    except KeyboardInterrupt:  # what was run so far counts
        tally.report()
        return 130
    tally.report()
    return 1 if tally.failed else 0


def _run(options: argparse.Namespace, tally: _Tally) -> None:
    for seed in range(options.seed, options.seed + options.runs):
        try:
            tally.add(run_seed(seed, events_kept=options.events))
        except SimulationError as error:
            tally.fail(error)
            if len(tally.failed) >= FAILURES_MAX:
                return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zrmq.testing.simulation",
        description="Run simulated clusters through faults and check every promise.",
        epilog="Exit codes: 0 all kept, 1 some broken, 2 wrong usage, 130 ended by Ctrl-C. "
        "Example: python -m zrmq.testing.simulation --seed 1 --runs 1000",
    )
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds, one after the other (default 1)")
    parser.add_argument("--events", type=int, default=EVENTS_KEPT, help="how many of the last events a failure shows")
    parser.add_argument("--json", action="store_true", help="one JSON object per run, and one for all")
    return parser


class _Tally:
    """Counts results, and writes what is asked for."""

    def __init__(self, clock: Clock, *, as_json: bool) -> None:
        self.failed: dict[int, str] = {}
        self._clock = clock
        self._began_ms = clock.monotonic_ms()
        self._as_json = as_json
        self._runs = 0
        self._virtual_ms = 0.0
        self._healed_ms_max = 0.0
        self._counts: Counter[str] = Counter()

    def add(self, result: Result) -> None:
        """A run went well."""
        self._runs += 1
        self._virtual_ms += result.virtual_ms
        self._healed_ms_max = max(self._healed_ms_max, result.healed_ms)
        self._counts.update(result.counts)
        if self._as_json:
            _write_json(msgspec.to_builtins(result))

    def fail(self, error: SimulationError) -> None:
        """A run broke a promise."""
        self._runs += 1
        self.failed[error.seed] = f"[{error.kind}] {error.reason}"
        if self._as_json:
            _write_json({"seed": error.seed, "kind": error.kind, "reason": error.reason, "story": error.story})
        else:
            sys.stdout.write(f"FAILED {error}\n\n")
            sys.stdout.flush()

    def report(self) -> None:
        """The end."""
        elapsed_ms = self._clock.monotonic_ms() - self._began_ms
        facts = {
            "runs": self._runs, "failed": sorted(self.failed), "elapsed_ms": round(elapsed_ms),
            "virtual_ms": round(self._virtual_ms), "healed_ms_max": round(self._healed_ms_max),
            "events": dict(sorted(self._counts.items())),
        }
        if self._as_json:
            _write_json(facts)
            return
        for seed, reason in self.failed.items():
            sys.stdout.write(f"seed {seed}: {reason}\n")
        sys.stdout.write(
            f"{self._runs} runs, {len(self.failed)} failed; {self._virtual_ms / 1000:.0f} virtual seconds in"
            f" {elapsed_ms / 1000:.1f} s, healthy at most {self._healed_ms_max / 1000:.1f} s after the last fault\n"
        )


def _write_json(facts: object) -> None:
    sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")


if __name__ == "__main__":
    sys.exit(main())
