"""Brokers, their topics and whether they live: the NameServer's whole state, in memory.

Pure: the caller hands in the time (monotonic milliseconds). `changes` counts whatever could alter an answer, so that the caller
can compare it with what it saw last and wake those who watch.

Of one broker name and id there is at most one registration, and its epoch never goes back while it lives. A broker that starts
again registers with a greater epoch and takes the place at once; a leftover of its former life, or a second broker that was
given the same name by mistake, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import msgspec

from zrmq.errors import Code, InvalidArgumentError, ZrmqError, refused
from zrmq.protocol.limits import QUEUES_PER_TOPIC_MAX, TOPICS_MAX, check_group, check_topic
from zrmq.protocol.requests import MASTER_ID, BrokerInfo, RegisterBroker, Route, TopicRoute
from zrmq.transport.address import parse_connect_address

SUSPECT_AFTER_MS = 3_000.0  # three heartbeats missed: producers avoid the broker while others serve the topic
GONE_AFTER_MS = 10_000.0  # a session timeout: the broker's own clients have given it up by then
TICK_MS = 250.0  # how often `expire` is called: how late a silence may be noticed

BROKERS_MAX = 1_000
TOPIC_ROUTES_MAX = 200_000  # topics of all brokers together; some 40 MB
BROKER_ID_MAX = 1_023
ANSWERS_KEPT_MAX = 1_024  # between two changes; clients of one program ask alike
ANSWER_TOPICS_KEPT_MAX = 64  # longer questions are rare, and their answers large
ALL_TOPICS = ("*",)

ROLES = frozenset({"MASTER", "SLAVE", "LEARNER"})


class _Registration(msgspec.Struct, eq=False):
    info: BrokerInfo
    topics: dict[str, TopicRoute]
    topics_version: int | None  # None: the table is from an earlier epoch, or there is none yet
    last_heard_ms: float


class RouteTable:
    """All registrations of one NameServer. Loop thread only."""

    def __init__(
        self, now_ms: float, *, suspect_after_ms: float = SUSPECT_AFTER_MS, gone_after_ms: float = GONE_AFTER_MS
    ) -> None:
        self.changes = 0
        self._suspect_after_ms = suspect_after_ms
        self._gone_after_ms = gone_after_ms
        self._expire_ms = now_ms
        self._registrations: dict[tuple[str, int], _Registration] = {}
        self._topic_route_count = 0
        self._answers: dict[tuple[str, ...], Route] = {}
        self._answers_of = 0  # the `changes` that the kept answers belong to

    def __len__(self) -> int:
        return len(self._registrations)

    # --- what brokers say ---------------------------------------------------------------------------------------------

    def register(self, request: RegisterBroker, now_ms: float) -> bool:
        """Take a registration or heartbeat; returns whether the table of topics is wanted.

        Raises `InvalidArgumentError` for fields that cannot be; `RequestRefusedError` with FORBIDDEN (a newer registration has
        the name and id) or TOO_MANY_REQUESTS (the NameServer's bounds are reached). A broker whose topics are refused lives on
        with the former ones; of more than there is room for, with those that fit.
        """
        check_broker(request.broker)
        info = msgspec.structs.replace(request.broker, suspect=False)
        key = (info.broker_name, info.broker_id)
        known = self._registrations.get(key)
        self._check_place(info, known)
        if known is not None:
            known.last_heard_ms = now_ms
        topics = None if request.topics is None else check_topics(info.broker_name, request.topics)
        if known is None:
            known = self._registrations[key] = _Registration(info, {}, None, now_ms)
            self.changes += 1
        elif known.info != info:
            if (known.info.epoch, known.info.store_id) != (info.epoch, info.store_id):
                known.topics_version = None
            known.info = info
            self.changes += 1
        if topics is not None:
            self._put_topics(known, topics, request.topics_version)
        return known.topics_version != request.topics_version

    def unregister(self, broker_name: str, broker_id: int, epoch: int, store_id: str = "") -> bool:
        """The broker leaves. False: it was not there, or one with other data has its place (`store_id` empty: not said). Raises
        `RequestRefusedError` (FORBIDDEN) when a later life of it has that."""
        known = self._registrations.get((broker_name, broker_id))
        if known is None or (store_id and store_id != known.info.store_id):
            return False
        if epoch < known.info.epoch:
            raise _stale(known.info, epoch)
        self._remove(known)
        return True

    def _check_place(self, info: BrokerInfo, known: _Registration | None) -> None:
        if known is None:
            if len(self._registrations) >= BROKERS_MAX:
                raise refused(
                    Code.TOO_MANY_REQUESTS,
                    f"The NameServer knows {BROKERS_MAX} brokers, its limit; stop some or use another NameServer.",
                    {"brokers_max": BROKERS_MAX},
                )
        elif info.store_id != known.info.store_id:
            if not known.info.suspect:
                raise refused(
                    Code.FORBIDDEN,
                    f"Broker {info.broker_name}/{info.broker_id} is registered at {known.info.address}, with other data than the"
                    f" one at {info.address}; stop one of them, or give it a broker_name of its own.",
                    {"broker_name": info.broker_name, "broker_id": info.broker_id, "address": known.info.address},
                )
        elif info.epoch < known.info.epoch:
            raise _stale(known.info, info.epoch)
        elif info.epoch == known.info.epoch and info.address != known.info.address:
            raise refused(
                Code.FORBIDDEN,
                f"Broker {info.broker_name}/{info.broker_id} is registered at {known.info.address}, not {info.address}; "
                "give each broker a name of its own.",
                {"broker_name": info.broker_name, "broker_id": info.broker_id, "address": known.info.address},
            )

    def _put_topics(self, known: _Registration, topics: dict[str, TopicRoute], version: int) -> None:
        room = TOPIC_ROUTES_MAX - self._topic_route_count + len(known.topics)
        fitting = topics
        if len(topics) > room:  # what has a route keeps it
            ordered = sorted(topics.values(), key=lambda route: route.topic not in known.topics)
            fitting = {route.topic: route for route in ordered[:room]}
        known.topics_version = version if fitting is topics else None
        if fitting != known.topics:
            self._topic_route_count += len(fitting) - len(known.topics)
            known.topics = fitting
            self.changes += 1
        if fitting is not topics:
            raise refused(
                Code.TOO_MANY_REQUESTS,
                f"The brokers have more than {TOPIC_ROUTES_MAX} topics together, the NameServer's limit, so that"
                f" {len(topics) - len(fitting)} of broker {known.info.broker_name} have no route; delete unused ones.",
                {"topic_routes_max": TOPIC_ROUTES_MAX},
            )

    def _remove(self, known: _Registration) -> None:
        del self._registrations[known.info.broker_name, known.info.broker_id]
        self._topic_route_count -= len(known.topics)
        self.changes += 1

    # --- time ---------------------------------------------------------------------------------------------------------

    def expire(self, now_ms: float) -> tuple[list[BrokerInfo], list[BrokerInfo]]:
        """Brokers that became suspect, and brokers that are gone now. Call it every `TICK_MS`.

        A call that comes much later means that this NameServer stood still. What the brokers sent meanwhile has not been read,
        so the time lost does not count as their silence.
        """
        lost_ms = now_ms - self._expire_ms - TICK_MS
        self._expire_ms = now_ms
        if lost_ms > TICK_MS:
            for known in self._registrations.values():
                known.last_heard_ms = min(known.last_heard_ms + lost_ms, now_ms)
        suspects, gone = [], []
        for known in list(self._registrations.values()):
            silent_ms = now_ms - known.last_heard_ms
            if silent_ms >= self._gone_after_ms:
                self._remove(known)
                gone.append(known.info)
            elif silent_ms >= self._suspect_after_ms and not known.info.suspect:
                known.info = msgspec.structs.replace(known.info, suspect=True)
                self.changes += 1
                suspects.append(known.info)
        return suspects, gone

    # --- what clients ask ---------------------------------------------------------------------------------------------

    def knows(self, topics: Iterable[str]) -> bool:
        """Whether some live master has each of the topics; `*` is known as soon as any broker is."""
        masters = [known.topics for key, known in self._registrations.items() if key[1] == MASTER_ID]
        return all(bool(masters) if topic == "*" else any(topic in table for table in masters) for topic in topics)

    def answer(self, topics: tuple[str, ...]) -> Route:
        """The route of the topics (`ALL_TOPICS`: of all), numbered 0. Kept until something changes: many clients ask alike."""
        if self._answers_of != self.changes or len(self._answers) >= ANSWERS_KEPT_MAX:
            self._answers.clear()
            self._answers_of = self.changes
        found = self._answers.get(topics)
        if found is None:
            found = self._make_answer(topics)
            if len(topics) <= ANSWER_TOPICS_KEPT_MAX:
                self._answers[topics] = found
        return found

    def _make_answer(self, topics: tuple[str, ...]) -> Route:
        registrations = [self._registrations[key] for key in sorted(self._registrations)]
        routes = []
        for known in registrations:
            if known.info.broker_id == MASTER_ID:
                wanted = known.topics if topics == ALL_TOPICS else dict.fromkeys(topics)
                routes += [known.topics[topic] for topic in wanted if topic in known.topics]
        routes.sort(key=lambda route: (route.topic, route.broker_name))
        brokers = [known.info for known in registrations]
        return Route(0, version_of(brokers, routes), brokers, routes)


def version_of(brokers: list[BrokerInfo], topics: list[TopicRoute]) -> int:
    """The digest of an answer's content: 63 bits, never 0, the same at every NameServer."""
    content = msgspec.msgpack.encode((brokers, topics))
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1 or 1


def check_broker(info: BrokerInfo) -> None:
    """Raise `InvalidArgumentError` unless this can be a broker."""
    for name in (info.broker_name, info.cluster):
        check_group(name)
    if not 0 <= info.broker_id <= BROKER_ID_MAX:
        raise InvalidArgumentError(f"The broker id is {info.broker_id}; use 0 to {BROKER_ID_MAX}.", broker_id=info.broker_id)
    if info.role not in ROLES:
        raise InvalidArgumentError(f"The role {info.role[:40]!r} does not exist; use one of {', '.join(sorted(ROLES))}.")
    if info.epoch < 0:
        raise InvalidArgumentError(f"The epoch is {info.epoch}; it counts starts from 0.", epoch=info.epoch)
    parse_connect_address(info.address)
    if info.ingest_address:
        parse_connect_address(info.ingest_address)


def check_topics(broker_name: str, topics: list[TopicRoute]) -> dict[str, TopicRoute]:
    """The table by topic. Raises `InvalidArgumentError` unless each entry can be, belongs to the broker, and is there once."""
    if len(topics) > TOPICS_MAX:
        raise InvalidArgumentError(
            f"The registration has {len(topics)} topics; the limit is {TOPICS_MAX}.", code=Code.PAYLOAD_TOO_LARGE
        )
    for route in topics:
        check_topic(route.topic)
        if route.broker_name != broker_name:
            raise InvalidArgumentError(
                f"Broker {broker_name} registers a topic of broker {route.broker_name[:40]!r}; register only its own."
            )
        if not 1 <= route.queue_count <= QUEUES_PER_TOPIC_MAX or not 0 <= route.permission <= 7:
            raise InvalidArgumentError(
                f"Topic {route.topic!r} has {route.queue_count} queues and permission {route.permission}; "
                f"use 1 to {QUEUES_PER_TOPIC_MAX} and 0 to 7.",
                topic=route.topic,
            )
    table = {route.topic: route for route in topics}
    if len(table) != len(topics):
        raise InvalidArgumentError("The registration has a topic twice; name each once.")
    return table


def _stale(known: BrokerInfo, epoch: int) -> ZrmqError:
    return refused(
        Code.FORBIDDEN,
        f"Broker {known.broker_name}/{known.broker_id} is registered with epoch {known.epoch} from {known.address}, later than "
        f"epoch {epoch}; stop the older one, or give it a name of its own.",
        {"broker_name": known.broker_name, "broker_id": known.broker_id, "epoch": known.epoch, "address": known.address},
    )
