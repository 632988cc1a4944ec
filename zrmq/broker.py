"""The broker, as a program runs it: in a thread of its own, or until a signal ends it.

    with zrmq.Broker("./data", nameservers=nameserver.address, broker_port=0) as broker:
        print(broker.address)
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

from zrmq.client.registration import Registration
from zrmq.config import BrokerConfig, take, tcp_address
from zrmq.errors import ClosedError, StoreFailedError
from zrmq.files import DiskFiles, Files
from zrmq.logs import get_logger
from zrmq.protocol.requests import MASTER_ID, BrokerInfo
from zrmq.serving.context import ServingConfig
from zrmq.serving.core import TICK_MS, BrokerCore
from zrmq.store.config import StoreConfig
from zrmq.store.flusher import ALWAYS_INLINE_MS, INLINE_BELOW_MS, NEVER_INLINE_MS, Flusher
from zrmq.store.store import Store
from zrmq.transport.host import Host
from zrmq.transport.interface import Endpoint, Loop

log = get_logger("broker")

Config = BrokerConfig[StoreConfig]

UPKEEP_MS = 500.0  # how often it is looked whether a checkpoint or maintenance is due
LOOK_MS = 5.0  # between two looks whether a client has read what it got, while it has pulls waiting for that
LAST_WORDS_MS = 100.0  # between refusing new work and closing: what is under way is answered, and the answers leave


class BrokerRole:
    """A broker as a `Host` or the simulator runs it: a store, a core, their sockets and timers. No decisions of its own."""

    def __init__(
        self, config: Config, *, address: str | None = None, ingest_address: str | None = None, files: Files | None = None,
        rng: random.Random | None = None, has_threads: bool = True,
    ) -> None:
        """The addresses take the place of the config's host and ports. A simulation hands in files, luck, and has no threads."""
        self._config = config
        self._where = address or tcp_address(config.host, config.broker_port)
        self._ingest_where = ingest_address or tcp_address(config.host, config.ingest_port)
        self._files = files or DiskFiles()
        self._rng = rng or random.Random()
        self._has_threads = has_threads
        self._router: Endpoint | None = None
        self._is_flush_due = False
        self._is_looking = False
        self._is_closed = False

    @property
    def address(self) -> str:
        """Where it listens for requests, with the port that was picked for port 0. Raises `ClosedError` before it is open."""
        if self._router is None:
            raise ClosedError("The broker is not running; start it first.")
        return self._router.address

    def open(self, loop: Loop) -> None:
        """Listen, open the store, register. Raises `FolderLockedError`, `FolderUnusableError`, `AddressInUseError`.

        What cannot listen leaves the folder untouched, to be given to a broker of another name. Nothing that comes in is handled
        before this has returned.
        """
        self._loop = loop
        with ExitStack() as undoing:
            self._router = loop.listen(self._where, lambda peer, frames: self.core.handle(peer, frames))
            undoing.callback(self._stop_listening, self._router)
            self._ingest = loop.listen_pull(self._ingest_where, lambda peer, frames: self.core.ingest(peer, frames))
            undoing.callback(self._ingest.close)
            self._open_store()
            undoing.callback(self.store.close)
            self._open_core(self._router)
            undoing.pop_all()

    def _stop_listening(self, router: Endpoint) -> None:
        self._router = None
        router.close()

    def _open_store(self) -> None:
        config = self._config
        luck = copy(self._rng)  # which goes on as if a folder had not been made: what a seed once found it still finds
        self.store = Store.open(
            Path(config.data).absolute(), files=self._files, clock=self._loop.clock, config=config.store,
            broker_name=config.broker_name, cluster=config.cluster, new_store_id=f"{luck.getrandbits(64):016x}",
        )

    def _open_core(self, router: Endpoint) -> None:
        config, loop = self._config, self._loop
        serving = ServingConfig(
            config.broker_name, config.cluster, config.auto_create_topics, config.default_queue_count, config.session_timeout_ms,
            heartbeat_ms=min(1_000, config.session_timeout_ms // 4),
        )
        self.core = BrokerCore(self.store, loop.clock, serving, router.send, router.has_room, self._topics_changed)
        self.store.flush()  # what the core had to say before anybody is told anything
        self._flusher = self._make_flusher(INLINE_BELOW_MS)
        self._upkeep = self._make_flusher(NEVER_INLINE_MS)
        self._registration = Registration(loop, config.nameservers, self._info(), self._topics, self._rng)
        loop.before_sleep(self._end_turn)
        self._tick()
        self._keep_up()
        log.info("broker_started", broker_name=config.broker_name, address=self.address, data=config.data, boot=self.store.boot)

    def _make_flusher(self, inline_below_ms: float) -> Flusher:
        inline_below_ms = inline_below_ms if self._has_threads else ALWAYS_INLINE_MS
        return Flusher(self._loop.call_soon_threadsafe, self._loop.clock, inline_below_ms)

    def stop(self, on_stopped: Callable[[], None]) -> None:
        """Leave the NameServers, answer what was taken, save everything, let go of files and sockets."""
        if self._router is None:
            on_stopped()
            return
        self._loop.call_later(LAST_WORDS_MS, lambda: self._close(on_stopped))  # first: it comes, whatever the others raise
        self.core.stop()
        self._registration.close()

    def abandon(self) -> None:
        """Let go of the folder, as a crash would: what was written stays, and nobody was told that anything else is stored."""
        self._is_closed = True
        if self.store.failure is None:
            self.store.failure = StoreFailedError("The broker has ended by a fault; its log says which.")
        _do_all(self._upkeep.close, self._flusher.close, self.store.close)

    # --- a turn -------------------------------------------------------------------------------------------------------

    def _end_turn(self) -> None:
        """What the turn appended is written and flushed together; then the answers go that are true now."""
        if self._is_closed:
            return
        try:
            self.store.write()
            if (self.store.needs_flush or self._is_flush_due) and not self._flusher.is_busy:
                self._flush()
        except StoreFailedError:
            log.debug("turn_not_written")  # the store has logged why, and the core tells everybody who waits
        self.core.after_commit()
        if self.core.pulling.awaits_readers and not self._is_looking:
            self._is_looking = True
            self._loop.call_later(LOOK_MS, self._look)

    def _look(self) -> None:
        """Makes a turn, at whose end those who have read meanwhile are answered."""
        self._is_looking = False

    def _flush(self) -> None:
        self._is_flush_due = False
        job = self.store.begin_flush()
        if job is not None:
            self._flusher.start(job, self.core.after_commit)

    def _tick(self) -> None:
        if not self._is_closed:
            self._loop.call_later(TICK_MS, self._tick)
            self.core.tick()
            self._is_flush_due = True  # what topics with async flush wrote since the last tick
            if self.store.is_upkeep_urgent:
                self._do_upkeep()

    def _keep_up(self) -> None:
        if not self._is_closed:
            self._loop.call_later(UPKEEP_MS, self._keep_up)
            self._do_upkeep()

    def _do_upkeep(self) -> None:
        if not self._upkeep.is_busy:
            job = self.store.begin_checkpoint() or self.store.begin_maintenance()
            if job is not None:
                self._upkeep.start(job, self.core.after_commit)

    # --- what the NameServers are told --------------------------------------------------------------------------------

    def _info(self) -> BrokerInfo:
        config = self._config
        return BrokerInfo(
            config.cluster, config.broker_name, MASTER_ID, "MASTER", self.store.boot,
            self._advertised(self.address), self._advertised(self._ingest.address), store_id=self.store.store_id,
        )

    def _advertised(self, address: str) -> str:
        host = self._config.advertise_host
        return tcp_address(host, int(address.rpartition(":")[2])) if host and address.startswith("tcp://") else address

    def _topics(self) -> tuple[int, Callable[[], list[Any]]]:
        return self.core.topics.version, self.core.topics.routes

    def _topics_changed(self) -> None:
        self._registration.topics_changed()

    def _close(self, on_stopped: Callable[[], None]) -> None:
        assert self._router is not None
        self._is_closed = True
        _do_all(
            self._upkeep.close, self._flusher.close, self.core.after_commit, self._ingest.close, self._router.close,
            self.store.close, partial(log.info, "broker_stopped", broker_name=self._config.broker_name), on_stopped,
        )


def _do_all(*steps: Callable[[], None]) -> None:
    """Each, whatever those before it raise, or a server would not end and its folder stay locked. Raises all that was raised."""
    errors = []
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)
    if errors:
        raise ExceptionGroup("The broker could not be closed as it should", errors)


class Broker(Host):
    """One broker. `data` is its folder, made if it is missing; `options` are those of `zrmq broker --help`.

    Any thread may use it; it is started once. Raises `ConfigError` for options that cannot be; starting recovers the log and
    raises `FolderLockedError`, `FolderUnusableError`, `DiskFullError`, `AddressInUseError`, `InvalidArgumentError`,
    `ResourceLimitError`.
    """

    def __init__(self, data: str | Path | None = None, *, config: Config | None = None, **options: Any) -> None:
        self._role = BrokerRole(take(Config, config, {"data": data, **options}))
        super().__init__(self._role, name="zrmq-broker")

    @property
    def address(self) -> str:
        """What clients connect to; `ClosedError` before the start."""
        return self._role.address
