"""zrmq/transport/backlog.py: what libzmq still holds, by peer. Over sockets: test_transport_server.py."""

from __future__ import annotations

import pytest

from zrmq.transport import backlog as backlog_module
from zrmq.transport.backlog import MARK_BYTES, Backlog


def test_a_message_counts_until_it_has_left() -> None:
    backlog = Backlog()
    frames = backlog.count(b"peer", [b"header", bytes(MARK_BYTES)])
    assert [bytes(frame) for frame in frames] == [b"header", bytes(MARK_BYTES)]
    assert backlog.size_bytes(b"peer") == MARK_BYTES + 6
    assert backlog.size_bytes(b"other") == 0
    del frames
    assert backlog.size_bytes(b"peer") == 0


def test_small_messages_add_up_to_a_mark() -> None:
    """The frames are those that were given, but for one in 64 KiB."""
    backlog = Backlog()
    message = [b"header", bytes(10_000)]
    kept = [backlog.count(b"peer", message) for _ in range(20)]
    assert [number for number, frames in enumerate(kept) if frames is not message] == [6, 13]
    assert backlog.size_bytes(b"peer") == 14 * 10_006


def test_what_left_later_does_not_hide_what_was_before() -> None:
    """Messages leave in order; should the news not come in order, nothing is struck off too early."""
    backlog = Backlog()
    first = backlog.count(b"peer", [bytes(MARK_BYTES)])
    second = backlog.count(b"peer", [bytes(MARK_BYTES)])
    del second
    assert backlog.size_bytes(b"peer") == 2 * MARK_BYTES
    assert len(first) == 1


def test_peers_that_have_read_everything_are_forgotten_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "SWEEP_PEERS_MIN", 10)
    backlog = Backlog()
    kept = [backlog.count(b"slow %d" % number, [bytes(MARK_BYTES)]) for number in range(5)]
    for number in range(1_000):
        backlog.count(b"%d" % number, [bytes(5_000)])
        assert len(backlog) <= 10
    assert [backlog.size_bytes(b"slow %d" % number) for number in range(5)] == [MARK_BYTES] * len(kept)
