"""Single faults that last longer than a session may be silent, at real processes under load; then the soak's verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.process.soak import settle
from tests.process.soak_cast import SORTERS_GROUP, Cast
from tests.process.soak_verdict import Verdict
from zrmq.client.admin import Admin

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2, where the proxies listen, without being told"),
]


def await_suspect(cast: Cast) -> None:
    """Return when the NameServer has heard nothing of the broker for 3 s: longer than the sessions at it may be silent."""
    with Admin(cast.nameservers) as admin:
        assert cast.wait(lambda: all(broker.suspect for broker in admin.cluster()))


def settled(cast: Cast) -> Verdict:
    """The verdict when all has come to rest; its problems are the caller's."""
    verdict = Verdict()
    settle(cast, verdict)
    return verdict


def owners_at(cast: Cast, broker: str) -> set[str]:
    """Who owns queues of a broker, by name."""
    owners = cast.book.owners(SORTERS_GROUP).items()
    return {life.partition("#")[0] for queue, lives in owners for life in lives if queue.broker_name == broker}


def test_a_broker_that_is_stopped_for_longer_than_sessions_last_loses_nothing(tmp_path: Path) -> None:
    with Cast(tmp_path) as cast:
        cast.raise_curtain(["nameserver"], ["broker-a"], ["sorter-1", "sorter-2"], ["screen"], ["producer"])
        assert cast.wait(lambda: len(cast.book.acknowledged) > 100)
        cast.pause("broker-a")
        await_suspect(cast)
        cast.resume("broker-a")
        verdict = settled(cast)
    assert verdict.problems == []
    assert verdict.acknowledged > 100
    assert verdict.healthy_after_s >= 0


def test_half_open_connections_are_replaced(tmp_path: Path) -> None:
    with Cast(tmp_path) as cast:
        cast.raise_curtain(["nameserver"], ["broker-a"], ["sorter-1", "sorter-2"], ["screen"], ["producer"])
        assert cast.wait(lambda: len(cast.book.acknowledged) > 100)
        requests = cast.members["broker-a"].proxies[0]
        before = requests.accepted
        cast.network("broker-a", "stall")
        cast.network("broker-a", "open")  # for new connections: those of before get no answer, and no end, for ever
        verdict = settled(cast)
        assert requests.accepted - before >= 4, "each of the clients has made another one"
    assert verdict.problems == []
    assert verdict.healthy_after_s >= 0


def test_a_consumer_that_one_broker_cannot_hear_gets_its_queues_there_again(tmp_path: Path) -> None:
    with Cast(tmp_path) as cast:
        cast.raise_curtain(["nameserver"], ["broker-a", "broker-b"], ["sorter-1", "sorter-2"], [], ["producer"])
        alone = "sorter-1" if "sorter-1" in owners_at(cast, "broker-a") else "sorter-2"
        other = {"sorter-1": "sorter-2", "sorter-2": "sorter-1"}[alone]
        cast.network("broker-a", "cut", alone)
        assert cast.wait(lambda: cast.is_owned() and owners_at(cast, "broker-a") == {other})
        before = len(cast.book.bodies[SORTERS_GROUP])
        assert cast.wait(lambda: len(cast.book.bodies[SORTERS_GROUP]) > before + 100), "messages go on meanwhile"
        cast.network("broker-a", "open")
        assert cast.wait(lambda: cast.is_owned() and owners_at(cast, "broker-a") == {alone}), "shares are as before"
        verdict = settled(cast)
    assert verdict.problems == []
