"""`zrmq send` and `zrmq tail`, over a real NameServer and broker: what goes in comes out, in every form."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any

import pytest
from click.testing import CliRunner, Result

import zrmq
from tests.unit.interrupts import Interrupt
from tests.unit.real_cluster import running_cluster
from zrmq.cli import send as send_module
from zrmq.cli.main import main
from zrmq.cli.send import CUT_SHORT_MS, LineSending, parse_property, read_lines, send_stdin
from zrmq.cli.tail import facts_of, parse_start
from zrmq.client.admin import Admin
from zrmq.errors import RequestTimeoutError
from zrmq.message import BatchSource, ConsumeFrom, Message
from zrmq.protocol.limits import check_body

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def nameservers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), default_queue_count=2) as address:
        yield address


@pytest.fixture
def run(nameservers: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command line, given as words, against the cluster."""
    monkeypatch.setenv("ZRMQ_NAMESERVERS", nameservers)
    return lambda *words, **extra: CliRunner().invoke(main, list(words), **extra)


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A topic of the test's own."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


def lines(result: Result) -> list[dict[str, Any]]:
    """The JSON lines of a command that was done."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def everything(run: Run, topic: str, *options: str) -> list[dict[str, Any]]:
    """All that the topic holds."""
    return lines(run("tail", topic, "--from", "earliest", "--until-end", "--json", *options))


# --- one message --------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_printed(run: Run, topic: str) -> None:
    parts = ["--tag", "kitchen", "--key", "dev-7", "--key", "k2", "--message-group", "house"]
    parts += ["--property", "unit=C", "--property", "a=b=c"]
    [receipt] = lines(run("send", topic, "21.5", *parts, "--json"))
    [message] = everything(run, topic)
    assert receipt == {
        "topic": topic, "broker_name": "broker-a", "queue_id": message["queue_id"], "queue_offset": 0,
        "message_id": message["message_id"], "store_timestamp_ms": message["store_timestamp_ms"], "durability": "sync",
        "duplicate": False,
    }
    assert message == {
        "topic": topic, "broker_name": "broker-a", "queue_id": receipt["queue_id"], "queue_offset": 0,
        "message_id": receipt["message_id"], "tag": "kitchen", "keys": ["dev-7", "k2"], "message_group": "house",
        "properties": {"unit": "C", "a": "b=c"}, "store_timestamp_ms": receipt["store_timestamp_ms"], "delivery_attempt": 1,
        "body": "21.5",
    }


def test_as_text(run: Run, topic: str) -> None:
    sent = run("send", topic, "a\x1b[2J", "--tag", "hall").stdout
    [message] = everything(run, topic)
    assert sent == f"stored {message['message_id']} in {topic}, queue {message['queue_id']} of broker-a, offset 0 (sync)\n"
    [printed] = run("tail", topic, "--from", "earliest", "--count", "1").stdout.splitlines()
    stamp, place, rest = printed.split(" ", 2)
    assert abs(datetime.fromisoformat(stamp).timestamp() * 1000 - message["store_timestamp_ms"]) < 1
    assert place == f"broker-a/{message['queue_id']}@0"
    assert rest == "[hall] a\\x1b[2J"


def test_an_empty_body(run: Run, topic: str) -> None:
    run("send", topic, "")
    assert [message["body"] for message in everything(run, topic)] == [""]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tag", "a|b"], "contains '|'"), (["--tag", " "], "not blank"), (["--key", ""], "not blank"),
        (["--property", "unit"], "NAME=VALUE"), (["--message-group", "g" * 65], "65 bytes"),
        (["--property", "\x00=1"], "control character"),
    ],
)
def test_what_cannot_be_sent_is_wrong_usage(run: Run, topic: str, options: list[str], sentence: str) -> None:
    result = run("send", topic, "x", *options)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_topic_that_cannot_be(run: Run) -> None:
    assert run("send", "a.b", "x").exit_code == 2
    assert run("tail", "a.b").exit_code == 2


def test_properties_are_names_and_values() -> None:
    assert parse_property("a=") == ("a", "")
    assert parse_property("a==b") == ("a", "=b")


# --- lines of stdin -----------------------------------------------------------------------------------------------------


def test_each_line_is_a_message_with_a_receipt(run: Run, topic: str) -> None:
    result = run("send", topic, "-", "--json", "--tag", "t", input=b"one\ntwo\r\n\nlast")
    receipts = lines(result)
    bodies = {message["message_id"]: message["body"] for message in everything(run, topic)}
    assert [bodies[receipt["message_id"]] for receipt in receipts] == ["one", "two", "", "last"]
    assert result.stderr == f"stored 4 messages in {topic}\n"


def test_many_lines_as_text(run: Run, topic: str) -> None:
    result = run("send", topic, "-", input=b"".join(b"%d\n" % number for number in range(25_000)))
    assert (result.exit_code, result.stdout) == (0, f"stored 25000 messages in {topic}\n")
    assert sorted(int(message["body"]) for message in everything(run, topic)) == list(range(25_000))


def test_no_lines(run: Run, topic: str) -> None:
    result = run("send", topic, "-", input=b"")
    assert (result.exit_code, result.stdout) == (0, f"stored 0 messages in {topic}\n")


def test_a_line_that_cannot_be_sent_is_told_with_what_was_stored(run: Run, topic: str) -> None:
    result = run("send", topic, "-", "--json", input=b"one\n" + bytes(5 * 1024 * 1024) + b"\nthree\n")
    assert result.exit_code == 1
    told = json.loads(result.stderr.splitlines()[-1])["error"]
    assert told["name"] == "MESSAGE_BODY_TOO_LARGE"
    assert told["message"].startswith("Line 2: The body has 5242880 bytes")
    assert told["facts"]["line"] == 2
    assert result.stderr.splitlines()[0] == f"stored 1 message in {topic}"
    [receipt] = result.stdout.splitlines()
    [message] = everything(run, topic)
    assert (message["body"], message["message_id"]) == ("one", json.loads(receipt)["message_id"])


def test_a_line_that_cannot_be_sent_as_text(run: Run, topic: str) -> None:
    result = run("send", topic, "-", input=b"one\ntwo\n" + bytes(5 * 1024 * 1024) + b"\nfour\n")
    assert (result.exit_code, result.stdout) == (1, f"stored 2 messages in {topic}\n")
    assert result.stderr.startswith("Error: Line 3: The body has 5242880 bytes")
    assert sorted(message["body"] for message in everything(run, topic)) == ["one", "two"]


class Line:
    """What `send_async` gives for a line that a broker stores, or does not."""

    def __init__(self, body: bytes, *, is_done: bool) -> None:
        self.body = body
        self.is_done = is_done

    def done(self) -> bool:
        return self.is_done

    def result(self) -> bytes:
        if self.body.startswith(b"lost"):
            raise RequestTimeoutError("No answer.", topic="meters")
        assert self.is_done or not self.body.startswith(b"silent"), "this would be waited for"
        return self.body


class FakeProducer:
    """Lines that begin with `late` are done when it is flushed, those with `silent` never; the others at once."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.story: list[str] = []

    def send_async(self, topic: str, body: bytes) -> Line:
        check_body(body)
        self.lines.append(Line(body, is_done=not body.startswith((b"late", b"silent"))))
        return self.lines[-1]

    def flush(self, timeout_ms: int) -> None:
        self.story.append(f"flush {timeout_ms}")
        for line in self.lines:
            line.is_done = line.is_done or not line.body.startswith(b"silent")
        if not all(line.is_done for line in self.lines):
            raise RequestTimeoutError("Some are still on their way.")

    def close(self, timeout_ms: int) -> None:
        self.story.append(f"close {timeout_ms}")


def sending_of(producer: Any, receipts: list[Any], topic: str = "meters") -> LineSending:
    return LineSending(producer, topic, {}, receipts.append)


@pytest.mark.parametrize("last", [b"last", bytes(5 * 1024 * 1024)])
def test_lines_behind_one_that_a_broker_refused_are_counted_too(last: bytes) -> None:
    receipts: list[Any] = []
    sending = sending_of(FakeProducer(), receipts)
    with pytest.raises(RequestTimeoutError, match="^Line 3: No answer") as caught:
        sending.run([b"one", b"late, two", b"lost", b"four", b"lost too", last])
    assert caught.value.facts == {"topic": "meters", "line": 3}
    assert receipts == [b"one", b"late, two", b"four", *([last] if last == b"last" else [])]
    assert (sending.stored, sending.unacknowledged) == (len(receipts), 0)


def test_no_more_is_sent_when_a_line_is_known_to_have_failed() -> None:
    receipts: list[Any] = []
    producer = FakeProducer()
    with pytest.raises(RequestTimeoutError, match="^Line 2: No answer"):
        sending_of(producer, receipts).run([b"one", b"lost", b"three"])
    assert [line.body for line in producer.lines] == [b"one", b"lost"]


def test_receipts_come_while_lines_still_do(nameservers: str, topic: str) -> None:
    """Whoever feeds the pipe slowly sees each receipt when its line is stored, not with the next line."""
    read_end, write_end = os.pipe()
    receipts: list[Any] = []
    seen: list[bool] = []

    def feed() -> None:
        for number in range(3):
            came.clear()
            os.write(write_end, b"%d\n" % number)
            seen.append(came.wait(20))
        os.close(write_end)

    came = threading.Event()
    feeder = threading.Thread(target=feed)
    with zrmq.Producer("test", nameservers=nameservers) as producer, open(read_end, "rb") as stdin:
        sending = LineSending(producer, topic, {}, lambda receipt: (receipts.append(receipt), came.set()))  # type: ignore[func-returns-value]
        feeder.start()
        sending.run(read_lines(stdin, sending.is_waiting))
        feeder.join()
    assert seen == [True] * 3
    assert len(receipts) == sending.stored == 3


def test_nobody_looks_around_while_nothing_is_out() -> None:
    """A pipe that is silent for hours costs nothing."""
    read_end, write_end = os.pipe()
    waits: list[float | None] = []

    class Select:
        @staticmethod
        def select(*arguments: Any) -> Any:
            waits.append(arguments[3])
            return (arguments[0] if len(waits) != 2 else [], [], [])

    with pytest.MonkeyPatch.context() as patched, open(read_end, "rb") as stdin:
        patched.setattr(send_module, "select", Select)
        os.write(write_end, b"one\ntwo\r\n\nlast")
        os.close(write_end)
        is_waiting = iter([False, True, True])
        assert list(read_lines(stdin, lambda: next(is_waiting))) == [b"one", b"two\r", b"", None, b"last"]
    assert waits == [None, send_module.LOOK_S, send_module.LOOK_S]


@pytest.mark.parametrize("size", [1, 100_000, 1_000_000])
def test_a_line_may_come_in_pieces(size: int) -> None:
    read_end, write_end = os.pipe()

    def feed() -> None:
        with open(write_end, "wb", buffering=0) as end:
            for piece in (b"x" * size, b"y\nz", b"\n"):
                end.write(piece)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with open(read_end, "rb") as stdin:
        assert list(read_lines(stdin, lambda: False)) == [b"x" * size + b"y", b"z"]
    feeder.join()


# --- lines that are cut short -------------------------------------------------------------------------------------------


@pytest.fixture
def meaning() -> Iterator[None]:
    """What SIGTERM means, before a test and after it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def interrupted_stdin(monkeypatch: pytest.MonkeyPatch, *bodies: bytes) -> None:
    """A stdin with these lines, and then Ctrl-C."""

    class Interrupted(io.BytesIO):
        def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]
            yield from bodies
            signal.raise_signal(signal.SIGTERM)

    class Text:
        buffer = Interrupted()

    monkeypatch.setattr(sys, "stdin", Text)


@pytest.mark.parametrize(
    ("bodies", "told"),
    [
        ([b"one\n", b"late\n"], "stored 2 messages in meters\n"),
        ([b"one\n", b"silent\n", b"late\n"], "stored 2 messages in meters; not acknowledged, so perhaps stored: 1\n"),
        ([], "stored 0 messages in meters\n"),
    ],
)
def test_what_is_out_at_a_signal_is_waited_for_a_moment_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], meaning: None, bodies: list[bytes], told: str
) -> None:
    interrupted_stdin(monkeypatch, *bodies)
    producer: Any = FakeProducer()
    with pytest.raises(KeyboardInterrupt):
        send_stdin(producer, "meters", {}, as_json=False)
    assert capsys.readouterr().out == told
    assert producer.story == [f"flush {CUT_SHORT_MS}", "close 0"]


def test_a_line_that_failed_is_told_though_it_was_cut_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], meaning: None
) -> None:
    interrupted_stdin(monkeypatch, b"late\n", b"lost\n", b"silent\n")
    producer: Any = FakeProducer()
    with pytest.raises(RequestTimeoutError, match="^Line 2: No answer"):
        send_stdin(producer, "meters", {}, as_json=False)
    assert capsys.readouterr().out == "stored 1 message in meters; not acknowledged, so perhaps stored: 1\n"


def test_a_second_ctrl_c_waits_for_nothing() -> None:
    class Impatient(FakeProducer):
        def flush(self, timeout_ms: int) -> None:
            raise KeyboardInterrupt

    producer = Impatient()
    sending = sending_of(producer, [])
    with pytest.raises(KeyboardInterrupt):
        sending.cut_short()
    assert producer.story == ["close 0"]


def test_all_are_counted_though_the_reader_of_the_receipts_got_ctrl_c_too() -> None:
    def fail(receipt: Any) -> None:
        raise BrokenPipeError

    producer: Any = FakeProducer()
    sending = LineSending(producer, "meters", {}, fail)
    for _ in range(3):
        sending._send(b"late")
    with pytest.raises(BrokenPipeError):
        sending.cut_short()
    assert (sending.stored, sending.unacknowledged) == (3, 0)


def test_wherever_ctrl_c_comes_no_line_is_forgotten_and_none_counted_twice() -> None:
    for at in count():
        producer = FakeProducer()
        receipts: list[Any] = []
        sending = sending_of(producer, receipts)
        interrupt = Interrupt(at, send_module)
        with interrupt.may_come():
            sending.run([b"one", b"late, two", None, b"three"])
        sending.cut_short()
        assert sending.stored <= len(producer.lines) <= sending.stored + sending.unacknowledged <= 3, at
        assert sending.unacknowledged <= 1, at  # that of the call which it interrupted
        assert len(receipts) in (sending.stored, sending.stored - 1), at
        assert len(set(receipts)) == len(receipts), at
        if not interrupt.came:
            break
    assert at > 20
    assert sending.stored == 3


def test_bytes_that_are_no_text(run: Run, topic: str) -> None:
    run("send", topic, "-", input=b"\xff\xfe\n")
    [message] = everything(run, topic)
    assert message["body_base64"] == "//4="
    assert "body" not in message


# --- where to begin and to end ------------------------------------------------------------------------------------------


@pytest.fixture
def filled(nameservers: str, topic: str) -> str:
    """A topic with 30 messages, tags a, b, c in turn."""
    with zrmq.Producer("test", nameservers=nameservers) as producer:
        for number in range(30):
            producer.send(topic, b"%d" % number, tag="abc"[number % 3])
    return topic


def bodies(rows: list[dict[str, Any]]) -> list[int]:
    return sorted(int(row["body"]) for row in rows)


def test_count_ends(run: Run, filled: str) -> None:
    assert len(lines(run("tail", filled, "--from", "earliest", "--count", "7", "--json"))) == 7


def test_the_end_is_the_end(run: Run, filled: str) -> None:
    assert bodies(everything(run, filled)) == list(range(30))
    assert len(everything(run, filled, "--count", "100")) == 30


def test_latest_has_nothing_behind_it(run: Run, filled: str) -> None:
    assert lines(run("tail", filled, "--until-end", "--json")) == []


def test_a_time_is_a_place_to_begin(run: Run, filled: str, topic: str) -> None:
    ordered = sorted(everything(run, filled), key=lambda row: int(row["body"]))
    moment = ordered[15]["store_timestamp_ms"]
    late = [int(row["body"]) for row in ordered if row["store_timestamp_ms"] >= moment]
    for text in (str(moment), datetime.fromtimestamp(moment / 1000, UTC).isoformat()):
        found = lines(run("tail", filled, "--from", text, "--until-end", "--json"))
        assert bodies(found) == late


@pytest.mark.parametrize(("expression", "remainders"), [("a", {0}), ("a || c", {0, 2}), ("*", {0, 1, 2}), ("d", set())])
def test_filters(run: Run, filled: str, expression: str, remainders: set[int]) -> None:
    expected = [number for number in range(30) if number % 3 in remainders]
    assert bodies(everything(run, filled, "--filter", expression)) == expected


def test_a_count_is_of_messages_that_are_printed(run: Run, filled: str) -> None:
    found = lines(run("tail", filled, "--from", "earliest", "--filter", "b", "--count", "10", "--json"))
    assert bodies(found) == list(range(1, 30, 3))


def test_a_topic_that_is_not_there_has_no_end(run: Run) -> None:
    result = run("tail", "nowhere", "--until-end")
    assert result.exit_code == 1
    assert "'nowhere' does not exist" in result.stderr


# --- groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--until-end"], ["--group", "readers", "--until-end"]])
def test_a_topic_that_may_not_be_read_is_told(run: Run, topic: str, options: list[str]) -> None:
    for words in (("topic", "create", topic), ("send", topic, "1"), ("topic", "update", topic, "--permission", "w")):
        assert run(*words).exit_code == 0
    result = run("tail", topic, "--from", "earliest", *options)
    assert result.exit_code == 1
    assert f"may not be read; 'zrmq topic update {topic} --permission rw' lets it be." in result.stderr


def test_a_group_goes_on_where_it_was(run: Run, filled: str) -> None:
    options = ["tail", filled, "--group", f"{filled}-g", "--from", "earliest", "--json"]
    first = bodies(lines(run(*options, "--count", "12")))
    rest = bodies(lines(run(*options, "--until-end")))
    assert len(first) == 12
    assert sorted(first + rest) == list(range(30))
    assert lines(run(*options, "--until-end")) == []


def test_a_group_is_shown(run: Run, filled: str) -> None:
    group = f"{filled}-g"
    run("tail", filled, "--group", group, "--from", "earliest", "--count", "30")
    run("send", filled, "30")
    [row] = [row for row in lines(run("group", "list", "--json")) if row["group"] == group]
    assert row == {"group": group, "message_model": None, "members": [], "topics": {filled: "*"}, "lag": 1}
    [shown] = lines(run("group", "show", group, "--json"))
    assert sum(queue["max_offset"] for queue in shown["queues"]) == 31
    assert sum(queue["committed_offset"] for queue in shown["queues"]) == 30
    text = run("group", "show", group).stdout
    assert text.startswith(f"group: {group}\nmodel: no member now\nlag: 1\n")


def test_members_and_what_they_hold_are_shown(run: Run, filled: str, nameservers: str) -> None:
    group = f"{filled}-g"
    with zrmq.PullConsumer(group, nameservers=nameservers) as consumer:
        consumer.subscribe(filled, "a || b")
        consumer.start()
        while len(consumer.assigned()) < 2:
            consumer.poll(1, 10)
        [shown] = lines(run("group", "show", group, "--json"))
        assert shown["members"] == [consumer.client_id]
        assert shown["message_model"] == "clustering"
        assert shown["topics"] == {filled: "a || b"}
        assert [queue["client_id"] for queue in shown["queues"]] == [consumer.client_id] * 2
        text = run("group", "show", group).stdout
        assert f"member: {consumer.client_id}\n" in text


def test_queues_of_other_members_are_not_waited_for(run: Run, filled: str, nameservers: str) -> None:
    """Another member holds a queue for ever; `--until-end` ends with the other one."""
    group = f"{filled}-g"
    with zrmq.PullConsumer(group, nameservers=nameservers, consume_from=ConsumeFrom.EARLIEST) as other:
        other.subscribe(filled)
        other.start()
        while len(other.assigned()) < 2:
            other.poll(1, 10)
        found = lines(run("tail", filled, "--group", group, "--until-end", "--json"))
        assert len({row["queue_id"] for row in found}) <= 1
    with Admin(nameservers) as admin:
        assert admin.group(group)


def test_another_subscription_is_refused(run: Run, filled: str, nameservers: str) -> None:
    group = f"{filled}-g"
    with zrmq.PullConsumer(group, nameservers=nameservers) as other:
        other.subscribe(filled, "a")
        other.start()
        result = run("tail", filled, "--group", group, "--filter", "b", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stderr.splitlines()[-1])["error"]["name"] == "SUBSCRIPTION_MISMATCH"


# --- parts --------------------------------------------------------------------------------------------------------------


def test_starts() -> None:
    assert parse_start("earliest") is ConsumeFrom.EARLIEST
    assert parse_start("latest") is ConsumeFrom.LATEST
    assert parse_start("1795000000123") == 1_795_000_000_123


def test_json_has_what_the_contract_names() -> None:
    message = Message(b"x", BatchSource("meters", "broker-a", 3, 100, 5, 4, 1, 2), 1)
    named = {
        "topic", "queue_id", "queue_offset", "message_id", "tag", "keys", "properties", "store_timestamp_ms",
        "delivery_attempt", "body",
    }
    assert named <= facts_of(message).keys()
