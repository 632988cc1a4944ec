"""The checkers bite: each way of breaking a promise is caught within a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import zrmq.store.segment
from zrmq.message import FlushMode
from zrmq.serving.leases import LeaseDesk
from zrmq.serving.outbox import Outbox
from zrmq.store.store import Store
from zrmq.store.tables import Tables
from zrmq.testing.simulation.run import run_seed
from zrmq.testing.simulation.trace import SimulationError

SEEDS = 60  # each variant is caught within so many
Break = Callable[[pytest.MonkeyPatch], None]


def acknowledge_before_flush(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outbox, "after_flush", lambda self, position, peer, reply: self.now(peer, reply))


def show_before_flush(patch: pytest.MonkeyPatch) -> None:
    write = Store.write

    def write_and_show(self: Store) -> None:
        touched = dict(self._touched)
        write(self)
        for queue, offset in touched.items():
            self._show(queue, offset)

    patch.setattr(Store, "write", write_and_show)


def no_dedup(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tables, "find_duplicate", lambda self, *key: None)


def dedup_forgotten_at_a_restart(patch: pytest.MonkeyPatch) -> None:
    started = Tables._broker_started

    def forget(self: Tables, event: Any) -> None:
        started(self, event)
        self.windows.clear()

    patch.setattr(Tables, "_broker_started", forget)


def no_follows_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tables, "has_stored", lambda self, *key: True)


def a_queue_goes_to_whoever_asks(patch: pytest.MonkeyPatch) -> None:
    lease = LeaseDesk._lease
    asking: list[bool] = []

    def acquire(self: LeaseDesk, session: Any, request: Any, frames: Any) -> None:
        asking.append(True)
        try:
            original(self, session, request, frames)
        finally:
            asking.clear()

    def blind(self: LeaseDesk, key: Any) -> Any:
        if asking:
            asking.clear()
            return None
        return lease(self, key)

    original = LeaseDesk.acquire
    patch.setattr(LeaseDesk, "acquire", acquire)
    patch.setattr(LeaseDesk, "_lease", blind)


def leases_forgotten_at_a_restart(patch: pytest.MonkeyPatch) -> None:
    started = Tables._broker_started

    def forget(self: Tables, event: Any) -> None:
        started(self, event)
        for group in self.groups.values():
            group.leases.clear()

    patch.setattr(Tables, "_broker_started", forget)


def committed_offsets_go_back(patch: pytest.MonkeyPatch) -> None:
    fold = Tables._offsets_committed

    def halve(self: Tables, event: Any) -> None:
        offsets = [(topic_id, queue_id, offset // 2) for topic_id, queue_id, offset in event.offsets]
        fold(self, type(event)(event.group, event.instance_name, offsets))

    patch.setattr(Tables, "_offsets_committed", halve)


def no_crc_in_recovery(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zrmq.store.segment, "crc32", lambda *data: 0)


def flush_nothing(patch: pytest.MonkeyPatch) -> None:
    from zrmq.store.commit_log import LogFlush

    patch.setattr(LogFlush, "work", lambda self: None)


VARIANTS: list[Break] = [
    acknowledge_before_flush, show_before_flush, no_dedup, dedup_forgotten_at_a_restart, no_follows_check,
    a_queue_goes_to_whoever_asks, leases_forgotten_at_a_restart, committed_offsets_go_back, flush_nothing,
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("break_it", VARIANTS, ids=lambda variant: variant.__name__)
def test_a_broken_promise_is_caught(break_it: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    for seed in range(1, SEEDS + 1):
        try:
            run_seed(seed)
        except SimulationError as error:
            assert f"--seed {seed}" in str(error), "the failure says how to repeat it"
            return
    pytest.fail(f"{break_it.__name__} passed {SEEDS} seeds: a check has lost its teeth.")


def test_the_flush_mode_that_is_checked_is_the_default() -> None:
    assert FlushMode.SYNC.value == "sync"
