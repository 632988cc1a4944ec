"""`zrmq topic`, `group`, `cluster` and `broker-status`, over a real NameServer and two brokers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

import zrmq
from tests.unit.real_cluster import running_cluster
from zrmq.cli import topic as topic_command
from zrmq.cli.group import queues_of, summary
from zrmq.cli.main import main
from zrmq.message import MessageModel
from zrmq.protocol.requests import GroupInfo, LeaseInfo, MemberInfo, Subscription

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def nameservers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), ("broker-a", "broker-b")) as address:
        yield address


@pytest.fixture
def run(nameservers: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command line against the cluster."""
    monkeypatch.setenv("ZRMQ_NAMESERVERS", nameservers)
    return lambda line, **extra: CliRunner().invoke(main, line.split(), **extra)


def lines(result: Result) -> list[dict[str, Any]]:
    """The JSON lines of a command that was done."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# --- topics -------------------------------------------------------------------------------------------------------------


def test_create_show_list_update_delete(run: Run) -> None:
    created = run("topic create meters --queues 2 --flush-mode async --retention 7d --retention-bytes 1GiB")
    assert (created.exit_code, created.stdout) == (
        0, "created meters: 4 queues at broker-a, broker-b, flush async, permission rw, retention 604800000 ms,"
        " retention 1073741824 bytes\n",
    )
    again = run("topic create meters --queues 2")
    assert (again.exit_code, again.stdout[:22]) == (0, "left as it is: meters:")
    facts = {
        "topic": "meters", "brokers": ["broker-a", "broker-b"], "queue_count": 4, "messages": 0, "flush_mode": "async",
        "permission": "rw", "retention_ms": 604_800_000, "retention_bytes": 1 << 30,
        "retention_of": "topic",
    }
    assert facts in lines(run("topic list --json"))
    [shown] = lines(run("topic show meters --json"))
    assert shown == {**facts, "queues": [
        {"broker_name": broker, "queue_id": queue_id, "min_offset": 0, "max_offset": 0}
        for broker in ("broker-a", "broker-b") for queue_id in (0, 1)
    ]}
    [updated] = lines(run("topic update meters --queue-count 3 --permission r --json"))
    assert updated == {**facts, "queue_count": 6, "permission": "r"}
    [unbound] = lines(run("topic update meters --retention none --json"))
    assert unbound == {**updated, "retention_ms": None}
    [unbound] = lines(run("topic update meters --retention 5m --retention-bytes none --json"))
    assert unbound == {**updated, "retention_ms": 300_000, "retention_bytes": None}
    assert run("topic delete meters --yes").stdout == "deleted meters at broker-a, broker-b\n"
    assert run("topic show meters").exit_code == 1


def test_a_deletion_says_where_it_was_done(run: Run) -> None:
    """Not more: a broker that is away keeps the topic."""
    run("topic create gone")
    assert lines(run("topic delete gone --yes --json")) == [
        {"topic": "gone", "deleted": True, "brokers": ["broker-a", "broker-b"]}
    ]
    assert "at every broker that is live" in " ".join(run("topic delete --help").stdout.split())


def test_a_topic_without_bounds_of_its_own_may_be_asked_for(run: Run) -> None:
    [made] = lines(run("topic create unbound --retention none --retention-bytes none --json"))
    assert (made["retention_ms"], made["retention_bytes"], made["retention_of"]) == (None, None, "broker")
    assert run("topic create unbound").stdout.endswith(", retention as the broker's\n")
    assert "retention_ms: as the broker's\n" in run("topic show unbound").stdout
    run("topic update unbound --retention-bytes 1GiB")
    shown = run("topic show unbound").stdout
    assert "retention_bytes: 1073741824\n" in shown
    assert "retention_ms" not in shown, "a topic with a bound of its own has no other"


def test_no_permission_is_not_no_bound(run: Run) -> None:
    assert lines(run("topic create shut --permission none --json"))[0]["permission"] == "none"


@pytest.mark.parametrize("command", ["create", "update"])
def test_the_help_says_what_keeps_messages_longer_than_their_topic(run: Run, command: str) -> None:
    told = " ".join(run(f"topic {command} --help").stdout.split())
    assert told.count("none behind what another topic keeps longer: the broker's one log is deleted from its front") == 2


def test_topics_as_text(run: Run) -> None:
    run("topic create alarms --queues 1 --permission w")
    listed = run("topic list").stdout.splitlines()
    assert listed[0].split() == ["topic", "brokers", "queues", "messages", "flush", "permission"]
    assert ["alarms", "broker-a,broker-b", "2", "0", "sync", "w"] in [line.split() for line in listed]
    shown = run("topic show alarms").stdout.splitlines()
    assert shown[:4] == ["topic: alarms", "flush_mode: sync", "permission: w", "retention_ms: as the broker's"]
    assert [line.split() for line in shown[5:]] == [["broker-a", "0", "0", "0"], ["broker-b", "0", "0", "0"]]


def test_a_topic_knows_how_much_it_holds(run: Run, nameservers: str) -> None:
    run("topic create counted --queues 1")
    with zrmq.Producer("test", nameservers=nameservers) as producer:
        producer.send_batch("counted", [b"a", b"b", b"c"])
    [facts] = [row for row in lines(run("topic list --json")) if row["topic"] == "counted"]
    assert facts["messages"] == 3


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("topic create a.b", "contains '.'"),
        ("topic create meters --queues 0", "not in the range"),
        ("topic create meters --queues 2000", "not in the range"),
        ("topic create meters --flush-mode never", "'never' is not one of"),
        ("topic update meters", "Nothing to change is given"),
        ("topic delete alarms", "say --yes"),
    ],
)
def test_wrong_usage(run: Run, line: str, sentence: str) -> None:
    run("topic create alarms --queues 1 --permission w")
    result = run(line)
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("topic show nowhere", "'nowhere' does not exist"),
        ("topic update nowhere --queues 2", "'nowhere' does not exist"),
        ("topic delete nowhere --yes", "'nowhere' does not exist"),
        ("topic create busy --queues 3", "exists at broker-a with queue_count 2"),
        ("topic update busy --queues 1", "cannot shrink to 1"),
        ("group show nowhere", "'nowhere' does not exist"),
        ("broker-status broker-z", "No live broker is named 'broker-z'"),
    ],
)
def test_what_cannot_be_done(run: Run, line: str, sentence: str) -> None:
    run("topic create busy --queues 2")
    result = run(line)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr


@pytest.mark.parametrize(("answer", "is_deleted"), [("y\n", True), ("n\n", False), ("", False)])
def test_deleting_asks_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, is_deleted: bool) -> None:
    monkeypatch.setattr(topic_command, "stdin_is_terminal", lambda: True)
    run("topic create asked --queues 1")
    result = run("topic delete asked", input=answer)
    assert "Delete asked with its 0 messages?" in result.stdout
    assert (result.exit_code == 0) is is_deleted
    assert (run("topic show asked").exit_code == 1) is is_deleted


def test_deleting_never_waits_where_nobody_answers(run: Run) -> None:
    run("topic create kept --queues 1")
    assert run("topic delete kept", input="y\n").exit_code == 2
    assert run("topic show kept").exit_code == 0


# --- groups -------------------------------------------------------------------------------------------------------------


BROKERS = {
    "broker-b": GroupInfo("reports", None, [Subscription("meters")], [], [], [("", "meters", 0, -1, 5)]),
    "broker-a": GroupInfo(
        "reports", MessageModel.CLUSTERING, [Subscription("meters", "hall")], [MemberInfo("c-1", "box", 5)],
        [LeaseInfo("meters", 1, "c-1", 7)], [("", "meters", 1, 10, 12), ("", "meters", 0, 3, 3)],
    ),
}


def test_a_group_is_summed_over_its_brokers() -> None:
    assert summary("reports", BROKERS) == {
        "group": "reports", "message_model": "clustering", "members": ["c-1"], "topics": {"meters": "hall"}, "lag": 7,
    }


def test_the_queues_of_a_group_are_in_order() -> None:
    rows = queues_of(BROKERS)
    keys = ("broker_name", "queue_id", "committed_offset", "lag", "client_id")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("broker-a", 0, 3, 0, None), ("broker-a", 1, 10, 2, "c-1"), ("broker-b", 0, None, 5, None),
    ]


def test_no_groups(run: Run) -> None:
    assert lines(run("group list --json")) == []
    assert run("group list").stdout == "group  model  members  lag  topics\n"


# --- brokers ------------------------------------------------------------------------------------------------------------


def test_the_cluster(run: Run) -> None:
    rows = lines(run("cluster --json"))
    assert [(row["cluster"], row["broker_name"], row["broker_id"], row["role"], row["state"]) for row in rows] == [
        ("DefaultCluster", "broker-a", 0, "MASTER", "alive"), ("DefaultCluster", "broker-b", 0, "MASTER", "alive"),
    ]
    assert all(row["address"].startswith("tcp://127.0.0.1:") for row in rows)
    assert run("cluster").stdout.splitlines()[0].split() == ["cluster", "broker", "id", "role", "address", "epoch", "state"]


def test_the_state_of_brokers(run: Run) -> None:
    assert [facts["broker_name"] for facts in lines(run("broker-status --json"))] == ["broker-a", "broker-b"]
    [facts] = lines(run("broker-status broker-b --json"))
    assert facts["broker_name"] == "broker-b"
    text = run("broker-status broker-b").stdout
    assert text.splitlines()[0].split() == ["fact", "value"]
    assert "broker-b" in text


def test_a_silent_broker_leaves_a_gap_and_exit_code_1(run: Run, nameservers: str) -> None:
    from tests.unit.test_client_admin import Ghost

    with Ghost(nameservers):
        result = run("topic list --timeout 700ms")
    assert result.exit_code == 1
    assert "broker broker-ghost did not answer" in result.stderr
    assert result.stdout.startswith("topic ")
