"""`zrmq send` and `zrmq tail` in pipes of real processes: what a shell user does with them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.unit.real_cluster import running_cluster


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables for commands of a running cluster."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), default_queue_count=1) as nameservers:
        yield {**os.environ, "ZRMQ_NAMESERVERS": nameservers, "PYTHONUNBUFFERED": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "zrmq", *words]


def test_a_pipe_from_end_to_end(environment: dict[str, str]) -> None:
    body = "".join(f"{number} µ\n" for number in range(5_000)).encode()
    sent = subprocess.run(command("send", "piped", "-"), input=body, env=environment, capture_output=True)
    assert (sent.returncode, sent.stdout, sent.stderr) == (0, b"stored 5000 messages in piped\n", b"")
    read = subprocess.run(
        command("tail", "piped", "--from", "earliest", "--until-end", "--json"), env=environment, capture_output=True
    )
    assert (read.returncode, read.stderr) == (0, b"")
    assert "".join(json.loads(line)["body"] + "\n" for line in read.stdout.splitlines()).encode() == body


def test_a_tail_prints_as_messages_come_and_ends_with_ctrl_c(environment: dict[str, str]) -> None:
    tail = subprocess.Popen(
        command("tail", "live", "--from", "earliest", "--json"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert tail.stderr.readline() == b"live does not exist yet; waiting for it (Ctrl-C ends that).\n"
        for number in range(3):
            sent = subprocess.run(command("send", "live", str(number)), env=environment, capture_output=True)
            assert sent.returncode == 0, sent.stderr
            assert json.loads(tail.stdout.readline())["body"] == str(number)
        tail.send_signal(signal.SIGINT)
        assert tail.wait() == 0
        assert tail.stderr.read() == b""


def test_a_reader_that_has_enough(environment: dict[str, str]) -> None:
    """`zrmq tail | head -1`: no traceback, no hanging."""
    lines = b"".join(b"%0100d\n" % number for number in range(20_000))
    subprocess.run(command("send", "headed", "-"), input=lines, env=environment, check=True, capture_output=True)
    tail = subprocess.Popen(
        command("tail", "headed", "--from", "earliest"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        assert tail.stdout.readline().endswith(b"0\n")
        tail.stdout.close()
        assert tail.wait() == 1
        assert tail.stderr.read() == b""


def test_lines_are_sent_though_nobody_reads_the_receipts(environment: dict[str, str]) -> None:
    send = subprocess.Popen(
        command("send", "unread", "-", "--json"), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with send:
        assert send.stdin is not None
        assert send.stdout is not None
        assert send.stderr is not None
        send.stdout.close()
        send.stdin.write(b"".join(b"%d\n" % number for number in range(20_000)))
        send.stdin.close()
        assert send.stderr.read() == b"stored 20000 messages in unread\n"
        assert send.wait() == 1


@pytest.mark.parametrize(
    ("words", "redirection", "code", "told"),
    [
        ("topic list", ">/dev/full", 1, b"The output cannot be used: No space left on device. Use another place."),
        ("send made x", ">/dev/full", 1, b" in made; stdout did not take that\nError: The output cannot be used"),
        ("send made x --json", ">/dev/full", 1, b" in made; stdout did not take that\n{"),
        ("send made -", "</dev/null >/dev/full", 1, b"stored 0 messages in made; stdout did not take that\n"),
        ("topic list", ">&-", 0, b""),
        ("send made x", ">&-", 0, b""),
        ("send made -", "<&-", 2, b"There is no stdin to read lines from; give it, or the body itself."),
        ("demo --data /proc/none", "", 1, b"/proc/none cannot be used: No such file or directory. Use another place."),
    ],
)
def test_streams_that_are_closed_or_full(
    environment: dict[str, str], words: str, redirection: str, code: int, told: bytes
) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(command(*words.split()))} {redirection}"], env=environment, capture_output=True
    )
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    assert b"nobody thought of" not in done.stderr


def test_a_body_from_the_command_line_may_be_any_bytes(environment: dict[str, str]) -> None:
    words = [*map(os.fsencode, command("send", "raw")), b"\xff\x01"]
    sent = subprocess.run(words, env=environment, capture_output=True)
    assert sent.returncode == 0, sent.stderr
    words = command("tail", "raw", "--from", "earliest", "--count", "1", "--json")
    read = subprocess.run(words, env=environment, capture_output=True)
    assert json.loads(read.stdout)["body_base64"] == "/wE="


def send_lines(environment: dict[str, str], topic: str, *options: str) -> subprocess.Popen[bytes]:
    """A `zrmq send -` that waits for lines."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command("send", topic, "-", *options), env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_lines_are_counted_and_not_done(environment: dict[str, str], number: signal.Signals) -> None:
    topic = f"cut-{number.name}"
    with send_lines(environment, topic) as send:
        assert send.stdin is not None
        send.stdin.write(b"one\ntwo\nhal")
        send.stdin.flush()
        read = subprocess.run(command("tail", topic, "--from", "earliest", "--count", "2"), env=environment, capture_output=True)
        assert read.stdout.count(b"\n") == 2
        send.send_signal(number)
        assert send.wait() == 1
        assert send.stdout is not None
        assert send.stderr is not None
        assert send.stdout.read() == f"stored 2 messages in {topic}\n".encode()
        assert send.stderr.read().strip() == b"Error: Interrupted."


def test_the_receipt_of_a_line_comes_before_the_next_line(environment: dict[str, str]) -> None:
    with send_lines(environment, "followed", "--json") as send:
        assert send.stdin is not None
        assert send.stdout is not None
        for number in range(3):
            send.stdin.write(b"%d\n" % number)
            send.stdin.flush()
            assert json.loads(send.stdout.readline())["queue_offset"] == number
        send.stdin.close()
        assert send.wait() == 0
