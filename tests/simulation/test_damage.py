"""Writes that landed elsewhere in a broker's log: what the simulated disk has then, and that zrmq notices."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from zrmq.protocol.batch import ENTRY_HEADER_BYTES, entry_checks_out, peek_entry
from zrmq.testing.simulation.damage import LogDamage
from zrmq.testing.simulation.plan import draw_plan
from zrmq.testing.simulation.run import run_seed


@pytest.mark.timeout(120)
def test_a_misdirected_write_is_whole_at_a_place_that_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    move, seen = LogDamage._move, Counter[str]()

    def check(self: LogDamage, position: int, size: int, place: int) -> None:
        move(self, position, size, place)
        (start, path), (to_start, to_path) = self._segment_at(position), self._segment_at(place)
        moved = self._files.open(to_path).pread(size, place - to_start)
        header = peek_entry(moved)
        assert header is not None
        assert entry_checks_out(moved, header)
        assert header.position == position != place
        left = self._files.open(path).pread(size, position - start)
        seen.update(["own segment" if path == to_path else "other segment", "former bytes" if any(left) else "zeros"])
        if header.length < size:
            seen["several entries"] += 1
        former = peek_entry(left) if len(left) >= ENTRY_HEADER_BYTES else None
        assert former is None or former.position != position

    monkeypatch.setattr(LogDamage, "_move", check)
    for seed in range(1, 9):
        plan = draw_plan(seed, has_work=False, has_disk_faults=False)
        faults = {"misdirected_write": 300.0, "broker_kill": 1_500.0}
        counts = run_seed(seed, plan=msgspec.structs.replace(plan, faults=faults, segment_bytes=4_096)).counts
        assert counts["damaged"]
    assert seen.keys() == {"own segment", "other segment", "zeros", "former bytes", "several entries"}
