"""Who plays in a soak: servers behind proxies, brokers on small disks, players; each can be broken and mended by name."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Self

import msgspec
import psutil

import zrmq
from tests.process.proxy import HOST, Mode, Proxy, free_port
from tests.process.small_disk import SmallDisk
from tests.process.soak_player import FAST, SAFE, TOPICS, Spec, decoder, now_ms
from tests.process.soak_verdict import Book
from zrmq.cli.children import Child, await_brokers, start_broker, start_nameserver
from zrmq.errors import RequestTimeoutError
from zrmq.message import FlushMode

MIB = 1 << 20
DISK_BYTES = 192 * MIB
REFUSE_BYTES = 24 * MIB
SESSION_TIMEOUT_MS = 2_500
QUEUE_COUNT = 4
PATIENCE_S = 60.0  # for what should be so within seconds
SORTERS_GROUP = "sorters"
STORE_OPTIONS = {  # on so small a disk; nothing may be deleted, as everything is read back
    "segment-bytes": 8 * MIB, "free-refuse-bytes": REFUSE_BYTES, "free-delete-bytes": 0, "free-warn-bytes": 0,
    "checkpoint-ms": 2_000, "checkpoint-bytes": MIB, "spare-segments-max": 1,
}


class Member:
    """One role: how its process is started, and the one that runs now."""

    def __init__(self, name: str, start: Callable[[], Child]) -> None:
        self.name = name
        self.start = start
        self.child: Child | None = None
        self.life = name
        self.is_stopped = False
        self.proxies: list[Proxy] = []
        self.disk: SmallDisk | None = None


class Cast:
    """Close it, whatever happened: nothing is left behind. One thread."""

    def __init__(self, folder: Path, *, has_disks: bool = False) -> None:
        self.book = Book()
        self.members: dict[str, Member] = {}
        self.memory_bytes: dict[str, int] = {}
        self.problems: list[str] = []
        self.leaving: set[str] = set()  # players that were asked to end
        self._folder = folder
        self._has_disks = has_disks
        self._stack = ExitStack()
        self._lines: queue.SimpleQueue[tuple[str, bytes | None]] = queue.SimpleQueue()
        self._lives = 0
        self._looked_ms = 0.0
        self.nameservers = ""
        self.brokers: Sequence[str] = ()
        self.producers: Sequence[str] = ()

    def raise_curtain(
        self, nameservers: Sequence[str], brokers: Sequence[str], sorters: Sequence[str], screens: Sequence[str],
        producers: Sequence[str],
    ) -> None:
        """Start everybody; return when the producers are about to. Raises what `Child.wait_address` and `await_brokers` do."""
        self.brokers, self.producers = brokers, producers
        for name in nameservers:
            self._add_nameserver(name)
        for name in brokers:
            self._add_broker(name)
        await_brokers(self.nameservers, len(brokers))
        with zrmq.connect(self.nameservers) as fabric:
            fabric.admin().create_topic(SAFE, queue_count=QUEUE_COUNT)
            fabric.admin().create_topic(FAST, queue_count=QUEUE_COUNT, flush_mode=FlushMode.ASYNC.value)
        for name in sorters:
            self._add_player(name, "clustering", SORTERS_GROUP)
        for name in screens:
            self._add_player(name, "broadcasting", "screens")
        assert self.wait(lambda: len(self.book.ready) == len(sorters) + len(screens) and self.is_owned())
        for name in producers:
            self._add_player(name)

    # --- who is there -------------------------------------------------------------------------------------------------

    def _add_nameserver(self, name: str) -> None:
        """A NameServer behind a proxy."""
        port = free_port()
        log_file = self._log_file(name)
        self._enter(Member(name, lambda: start_nameserver(name, log_file, port=port)[0]), port)
        self.nameservers = ",".join(filter(None, [self.nameservers, f"tcp://{HOST}:{port}"]))

    def _add_broker(self, name: str) -> None:
        """A broker behind two proxies, one for each port, on a disk of its own where that is possible."""
        port, ingest_port = free_port(), free_port()
        member = Member(name, lambda: start_broker(
            name, self._log_file(name), self.nameservers, self._folder / name / "data", "--advertise-host", HOST,
            "--ingest-port", str(ingest_port), "--session-timeout-ms", str(SESSION_TIMEOUT_MS),
            *(f"--store-{option}={value}" for option, value in STORE_OPTIONS.items()), port=port,
        )[0])
        if self._has_disks:
            member.disk = self._stack.enter_context(SmallDisk(self._folder / name, DISK_BYTES))
        self._enter(member, port, ingest_port)

    def _add_player(self, name: str, model: str = "", group: str = "soakers", pause_ms: int = 100) -> None:
        """A producer, or a consumer with a message model."""

        def start() -> Child:
            life = member.life
            spec = Spec(life if not model else name, self.nameservers, group, model, pause_ms)
            arguments = [msgspec.json.encode(spec).decode()]
            return Child(
                name, "tests.process.soak_player", arguments, self._log_file(name),
                on_line=lambda child, line: self._lines.put((life, line)),
            )

        if model:
            self.book.read_by(name, group if model == "clustering" else name)
        member = Member(name, start)
        self._enter(member)

    def _enter(self, member: Member, *ports: int) -> None:
        self.members[member.name] = member
        member.proxies = [self._stack.enter_context(closing(Proxy(port))) for port in ports]
        self._stack.callback(self._kill_quietly, member)
        self.start(member.name)

    def _log_file(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    # --- what is done to them -----------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """A new life."""
        member = self.members[name]
        self._lives += 1
        member.life = f"{name}#{self._lives}"
        member.child = member.start()
        self._look_at_memory()

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._child(name).kill()
        self.members[name].child = None

    def dismiss(self, name: str) -> None:
        """Ask a player to end in order: a producer waits for its answers, as long as that takes."""
        self.leaving.add(name)
        self._child(name).end_input()

    def has_left(self, name: str) -> bool:
        """Whether one that was asked to has ended."""
        return self._child(name).exit_code is not None

    def stop(self, name: str) -> None:
        """End it in order; a problem when it takes too long or its exit code is not 0."""
        child = self._child(name)
        if name not in self.leaving and not self.members[name].proxies:
            self.dismiss(name)
        if name in self.leaving:
            with suppress(RequestTimeoutError):  # what takes too long is seen by its exit code
                child.wait()
        code = child.exit_code if child.exit_code is not None else child.stop()
        self.leaving.discard(name)
        self.members[name].child = None
        child.kill()
        if code:
            self.problems.append(f"exit: {name} ended with code {code}. {child.log_tail()}")

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        self._child(name).signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT. The time is noted before it goes on."""
        self.book.stops[self.members[name].life].append(now_ms())
        self._child(name).signal(signal.SIGCONT)

    def network(self, name: str, mode: Mode, victim: str = "") -> None:
        """Break or heal what is between a server and everybody, or one other."""
        pid = self._child(victim).pid if victim else None
        for proxy in self.members[name].proxies:
            proxy.set(mode, pid)

    def delay(self, name: str, ms: float) -> None:
        """Slow the network to a server."""
        for proxy in self.members[name].proxies:
            proxy.delay(ms)

    def disk(self, name: str) -> SmallDisk:
        """The disk of a broker."""
        disk = self.members[name].disk
        assert disk is not None
        return disk

    def _child(self, name: str) -> Child:
        child = self.members[name].child
        assert child is not None, f"{name} does not run"
        return child

    # --- what they say ------------------------------------------------------------------------------------------------

    def feed(self, timeout_s: float) -> None:
        """Hand reports to the book for so long, and look for crashes."""
        deadline_ms = now_ms() + timeout_s * 1000
        while (left_ms := deadline_ms - now_ms()) > 0:
            with suppress(queue.Empty):
                self._take(*self._lines.get(timeout=left_ms / 1000))
        if now_ms() > self._looked_ms + 1_000:
            self._look_at_memory()
        for member in self.members.values():
            if member.child is not None and member.child.exit_code is not None and member.name not in self.leaving:
                self.problems.append(f"crash: {member.name} ended with {member.child.exit_code}. {member.child.log_tail()}")
                member.child.kill()
                member.child = None
                self.start(member.name)

    def wait(self, is_so: Callable[[], bool]) -> bool:
        """Take reports until it is so; False when patience has an end."""
        deadline_ms = now_ms() + PATIENCE_S * 1000
        while not is_so():
            if now_ms() > deadline_ms:
                return False
            self.feed(0.05)
        return True

    def is_owned(self) -> bool:
        """Whether every queue has one owner among the sorters, by their own word."""
        owners = self.book.owners(SORTERS_GROUP)
        return len(owners) == QUEUE_COUNT * len(TOPICS) * len(self.brokers) and all(len(who) == 1 for who in owners.values())

    def _take(self, life: str, line: bytes | None) -> None:
        if line is None:
            self.book.gone(life, now_ms())
        elif line.endswith(b"\n"):  # else the last, broken one of somebody who was killed
            self.book.take(life, decoder.decode(line))

    def _look_at_memory(self) -> None:
        self._looked_ms = now_ms()
        for member in self.members.values():
            with suppress(psutil.NoSuchProcess):
                if member.child is not None:
                    used = psutil.Process(member.child.pid).memory_info().rss
                    self.memory_bytes[member.name] = max(self.memory_bytes.get(member.name, 0), used)

    def complaints(self) -> list[str]:
        """What nobody's log should have: tracebacks and errors, a sentence each."""
        found = []
        for file in sorted((self._folder / "logs").glob("*.log")):
            for line in file.read_text(errors="replace").splitlines():
                if "Traceback" in line or '"level": "error"' in line or '"level": "critical"' in line:
                    found.append(f"log: {file.stem} said {line[:500]}")
        return found

    # --- the end ------------------------------------------------------------------------------------------------------

    def _kill_quietly(self, member: Member) -> None:
        if member.child is not None:
            member.child.kill()

    def close(self) -> None:
        """Kill whoever is left, free ports and disks."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
