"""Which brokers are avoided, and for how long."""

from __future__ import annotations

import pytest

from zrmq.client.faults import FaultTable


@pytest.mark.parametrize(
    ("latency_ms", "avoid_ms"),
    [(0, 0), (49, 0), (50, 0), (549, 0), (550, 2_000), (1_799, 2_000), (1_800, 5_000), (3_000, 6_000), (5_000, 10_000),
     (14_999, 10_000), (15_000, 30_000), (1e9, 30_000)],
)
def test_avoids_a_broker_as_long_as_the_table_says(latency_ms: float, avoid_ms: float) -> None:
    faults = FaultTable()
    faults.record("a", latency_ms, now_ms=1_000)
    assert faults.is_avoided("a", 1_000) is (avoid_ms > 0)
    assert faults.is_avoided("a", 999 + avoid_ms) is (avoid_ms > 0)
    assert not faults.is_avoided("a", 1_000 + avoid_ms)


def test_a_failure_counts_as_ten_seconds() -> None:
    faults = FaultTable()
    faults.record_failure("a", now_ms=0)
    assert faults.is_avoided("a", 9_999)
    assert not faults.is_avoided("a", 10_000)


def test_a_quick_answer_ends_it() -> None:
    faults = FaultTable()
    faults.record_failure("a", now_ms=0)
    faults.record("a", 5, now_ms=10)
    assert not faults.is_avoided("a", 11)


def test_brokers_do_not_pay_for_each_other() -> None:
    faults = FaultTable()
    faults.record_failure("a", now_ms=0)
    assert not faults.is_avoided("b", 1)
