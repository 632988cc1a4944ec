"""Fuzz by hand: `python -m tests.fuzz --target decoders|cores|files|ports --inputs N --seed S [--json] [--keep]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.fuzz import cores, decoders, files
from tests.fuzz.ports import run_ports
from tests.fuzz.probe import run_targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Feed as many inputs as asked for; 1 when one of them found something."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.target == "ports":
            report = run_ports(Path(folder), options.seed, options.inputs)
            found = report["faults"]
        else:
            report, found = _run(options, Path(folder))
    report = {"target": options.target, "seed": options.seed, **report}
    encoded = msgspec.json.encode(report)
    sys.stdout.write((encoded if options.json else msgspec.json.format(encoded)).decode() + "\n")
    return 1 if found else 0


def _run(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    targets = {"decoders": lambda: decoders.targets(folder), "cores": cores.targets, "files": files.targets}[options.target]()
    probe, elapsed_ms = run_targets(targets, options.seed, options.inputs)
    report = probe.report(elapsed_ms)
    if options.keep:
        report["kept"] = [str(finding.keep()) for finding in probe.findings.values()]
    return report, report["findings"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Feed bent bytes to everything that takes bytes from others. The same seed makes the same inputs.",
        epilog="Exit codes: 0 nothing found, 1 something, 2 wrong usage. "
        "Example: python -m tests.fuzz --target decoders --inputs 100000 --seed 1",
    )
    parser.add_argument("--target", choices=("decoders", "cores", "files", "ports"), default="decoders", help="what takes them")
    parser.add_argument("--inputs", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=1, help="where the dice begin (default 1)")
    parser.add_argument("--json", action="store_true", help="one line")
    parser.add_argument("--keep", action="store_true", help="write inputs that found something to tests/corpus/fuzz")
    return parser


if __name__ == "__main__":
    sys.exit(main())
