"""Where rows are played: starts the servers a run needs, once, and plays one contestant after the other on them."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from benchmarks.contestants import Contestant, Level
from benchmarks.rows import ROWS
from benchmarks.servers import Server, start_of, start_whole
from benchmarks.session import session_of
from zrmq.cli.bench import QUEUE_COUNT
from zrmq.cli.bench import Stage as ZrmqStage
from zrmq.cli.bench_figures import FIGURES, Figure, Reports, spec_of
from zrmq.cli.bench_players import Spec
from zrmq.cli.children import Child
from zrmq.client.admin import Admin
from zrmq.clock import SystemClock
from zrmq.message import FlushMode

PLAYER_TIMEOUT_S = 300.0
SETTLE_S = 1.0  # before memory is read
LARGE_BODY_BYTES = 8_192  # of the log that `recovery` makes
SHARED = ("zrmq", "rabbitmq", "mosquitto")  # one server for all levels: there a topic or queue decides
FLUSH_MODES = {Level.CACHE: FlushMode.ASYNC, Level.FLUSHED: FlushMode.SYNC}

_JSON_LINE = re.compile(rb"^\{.*\}\s*$")
_BATCHES = next(figure for figure in FIGURES if figure.name == "batches")

Values = dict[str, float]  # of one play, by what is measured


class Stage:
    """A run's folder and the servers in it. One thread. Close it, and every process it started has ended."""

    def __init__(self, folder: Path, messages: int, body_bytes: int, stored_messages: int, log_bytes: int) -> None:
        self._folder = folder
        self._messages = messages
        self._body_bytes = body_bytes
        self._stored_messages = stored_messages
        self._log_bytes = log_bytes
        self._servers: dict[tuple[str, Level | None], Server] = {}
        self._plays = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.stop()

    def play(self, contestant: Contestant, row: str) -> Values:
        """One round of a row by one contestant, on a topic of its own."""
        self._plays += 1
        figure = ROWS[row].figure
        if figure is None:
            return self._store(contestant) if row == "storage" else self._recover(contestant)
        if contestant.level is Level.LIMIT:
            return self._zrmq("").play_limit(figure)
        address = self._server(contestant).address
        if contestant.server == "zrmq":
            played = _BATCHES if contestant.name.endswith("send_batch") else figure
            return self._zrmq(address).play(played, FLUSH_MODES[contestant.level], self._plays)
        return self._play_peer(contestant, figure, address)

    def _zrmq(self, nameservers: str) -> ZrmqStage:
        return ZrmqStage(nameservers, self._folder, self._messages, self._body_bytes)

    def _server(self, contestant: Contestant) -> Server:
        key = (contestant.server, None if contestant.server in SHARED else contestant.level)
        if key not in self._servers:
            name = f"{contestant.server}-{key[1].name.lower()}" if key[1] else contestant.server
            self._servers[key] = start_of(contestant.server)[0](self._folder / name, contestant.level)
        return self._servers[key]

    def _play_peer(self, contestant: Contestant, figure: Figure, address: str) -> Values:
        messages = max(int(self._messages * contestant.share), 1)
        topic = f"bench-{figure.name}-{self._plays}"
        specs = [spec_of(figure, part, messages, self._body_bytes, "", topic) for part in figure.parts]
        specs = [msgspec.structs.replace(spec, address=address) for spec in specs]
        session = session_of(contestant.session, specs[0])
        session.prepare()
        try:
            if figure.fill:
                self._run(contestant, [msgspec.structs.replace(specs[0], part="produce")])
            reports = self._run(contestant, specs)
        finally:
            session.discard()
            session.close()
        return figure.read(reports, specs[0].messages)

    def _run(self, contestant: Contestant, specs: Sequence[Spec]) -> Reports:
        """Start the players in order, start the clock when all are warm, collect what they report."""
        players: list[Child] = []
        try:
            for spec in specs:
                module = "zrmq.cli.bench_players"
                if contestant.session:
                    module, spec = "benchmarks.player", msgspec.structs.replace(spec, part=f"{contestant.session}:{spec.part}")
                log_file = self._folder / "logs" / f"{contestant.peer}.log"
                players.append(Child(contestant.name, module, [msgspec.json.encode(spec).decode()], log_file))
            for player in players:
                _fact(player, "ready")
            for player in reversed(players):
                player.tell(b"go")
            return [_fact(player, "result") for player in players]
        finally:
            for player in players:
                player.stop()

    # --- whole servers --------------------------------------------------------------------------------------------------

    def _store(self, contestant: Contestant) -> Values:
        """Start a server, store messages, look at it."""
        start = start_whole(contestant.server)
        began_ms = SystemClock().monotonic_ms()
        server = start(self._folder / f"storage-{self._plays}", contestant.level)
        try:
            ready_ms = SystemClock().monotonic_ms() - began_ms
            _settle()
            idle, disk, log = server.memory_bytes(), server.disk_bytes(), _log_position(contestant, server)
            self._fill(contestant, server, self._stored_messages, self._body_bytes)
            _settle()
            disk, log = server.disk_bytes() - disk, _log_position(contestant, server) - log
            values = {
                "start": ready_ms, "idle": idle / 1e6, "full": server.memory_bytes() / 1e6,
                "disk": (log or disk) / self._stored_messages,
            }
            return values | ({"allocated": disk / self._stored_messages} if log else {})
        finally:
            server.stop()

    def _recover(self, contestant: Contestant) -> Values:
        """Make a large log, kill the server, start it again."""
        start = start_whole(contestant.server)
        folder = self._folder / f"recovery-{self._plays}"
        server = start(folder, contestant.level)
        try:
            self._fill(contestant, server, self._log_bytes // LARGE_BODY_BYTES, LARGE_BODY_BYTES)
            server.kill()
            began_ms = SystemClock().monotonic_ms()
            server = start(folder, contestant.level)
            return {"restart": SystemClock().monotonic_ms() - began_ms}
        finally:
            server.kill()

    def _fill(self, contestant: Contestant, server: Server, messages: int, body_bytes: int) -> None:
        """Exactly so many messages, acknowledged."""
        topic = "bench"
        spec = Spec("produce", server.address, topic, messages, 0, body_bytes, 0, server.address)
        if contestant.server == "zrmq":
            with Admin(server.address) as admin:
                admin.create_topic(topic, queue_count=QUEUE_COUNT, flush_mode=FLUSH_MODES[contestant.level])
        else:
            session = session_of(contestant.session, spec)
            session.prepare()
            session.close()
        self._run(contestant, [spec])


def _log_position(contestant: Contestant, server: Server) -> int:
    """Bytes that zrmq has appended to its log: its files are larger, prepared before they are needed. 0 for others."""
    if contestant.server != "zrmq":
        return 0
    with Admin(server.address) as admin:
        return int(admin.broker_state("bench")["appended_position"])


def _settle() -> None:
    threading.Event().wait(SETTLE_S)


def _fact(player: Child, name: str) -> Any:
    """What a player tells under this name, next."""
    while True:
        told = msgspec.json.decode(player.wait_line(_JSON_LINE, PLAYER_TIMEOUT_S)[0])
        if name in told:
            return told[name]
