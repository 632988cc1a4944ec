"""Who competes, and what an acknowledgement of theirs means. Pure."""

from __future__ import annotations

from enum import Enum

import msgspec


class Level(str, Enum):
    """Where a message is when it is acknowledged. Only figures of one level are compared."""

    LIMIT = "nowhere (the bare limit)"
    MEMORY = "memory of the server"
    CACHE = "page cache"
    FLUSHED = "flushed"


class Contestant(msgspec.Struct, frozen=True):
    """One column of the comparison: a way to use a server, at one level."""

    name: str
    peer: str  # as in --peers
    level: Level
    server: str  # whose start it needs; contestants of one server and level share it
    session: str = ""  # module:class of the client's side
    share: float = 1.0  # of the messages of a round; who is slow sends fewer, a rate needs no more
    rows: tuple[str, ...] = ()  # it plays in these only; empty: in all


SLOW_ROWS = ("send", "latency")  # for who has no batches and no pipelining

CONTESTANTS = (
    Contestant("bare ZeroMQ", "bare", Level.LIMIT, "", rows=("produce", "tagged", "consume", "both", "send", "latency")),
    Contestant("zrmq", "zrmq", Level.CACHE, "zrmq"),
    Contestant("zrmq", "zrmq", Level.FLUSHED, "zrmq"),
    Contestant("zrmq send_batch", "zrmq", Level.CACHE, "zrmq", rows=("produce",)),
    Contestant("zrmq send_batch", "zrmq", Level.FLUSHED, "zrmq", rows=("produce",)),
    Contestant("Redis streams", "redis", Level.CACHE, "redis", "redis_streams:RedisSession", 0.3),
    Contestant("Redis streams", "redis", Level.FLUSHED, "redis", "redis_streams:RedisSession", 0.3),
    Contestant("NATS JetStream", "nats", Level.CACHE, "nats", "nats_jetstream:NatsSession", 0.08),
    Contestant("NATS JetStream", "nats", Level.FLUSHED, "nats", "nats_jetstream:NatsSession", 0.02),
    Contestant("RabbitMQ stream", "rabbitmq", Level.CACHE, "rabbitmq", "rabbitmq_queues:StreamSession", 0.4),
    Contestant("RabbitMQ quorum queue", "rabbitmq", Level.FLUSHED, "rabbitmq", "rabbitmq_queues:QuorumSession", 0.04),
    Contestant("RabbitMQ classic queue", "rabbitmq", Level.MEMORY, "rabbitmq", "rabbitmq_queues:ClassicSession", 0.04),
    Contestant("Mosquitto, QoS 1", "mosquitto", Level.MEMORY, "mosquitto", "mosquitto_qos1:MosquittoSession", 0.04),
    Contestant("beanstalkd", "beanstalkd", Level.CACHE, "beanstalkd", "beanstalkd_tubes:BeanstalkdSession", rows=SLOW_ROWS),
    Contestant("beanstalkd", "beanstalkd", Level.FLUSHED, "beanstalkd", "beanstalkd_tubes:BeanstalkdSession", rows=SLOW_ROWS),
)
PEERS = tuple(dict.fromkeys(contestant.peer for contestant in CONTESTANTS))


def playing(row: str, peers: tuple[str, ...]) -> list[Contestant]:
    """Who plays in a row, of these peers; of all when none are named."""
    return [
        contestant for contestant in CONTESTANTS
        if (not peers or contestant.peer in peers) and (not contestant.rows or row in contestant.rows)
    ]
