"""RabbitMQ: streams with rstream, quorum and classic queues with pika; batches of publishes, confirms counted as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from benchmarks.contestants import Level
from benchmarks.servers import Server, await_answer, free_port, missing_of, program, run_program
from benchmarks.session import GROUP, IDLE_S_MAX, KEY, PIPELINE, SITE, TAG, UNACKNOWLEDGED_MAX, AsyncSession, Countdown
from zrmq.cli.bench_players import Spec

HOME = "/usr/lib/rabbitmq/bin"  # Debian's; its rabbitmq-server in the path changes the user first
USER = "guest"
COMMIT_MESSAGES = 10_000  # a stream's consumer stores its offset so often
PREFETCH = 4 * PIPELINE
PUBLISH_BURST = 100  # pika writes only when its loop runs

_CONFIG = """
listeners.tcp.1 = 127.0.0.1:{port}
stream.listeners.tcp.1 = 127.0.0.1:{stream_port}
stream.advertised_host = 127.0.0.1
stream.advertised_port = {stream_port}
log.console = true
log.console.level = warning
log.file = false
"""


def _program() -> str | None:
    """The real start script; the one in the path changes the user first."""
    return program("rabbitmq-server", HOME) and str(Path(HOME) / "rabbitmq-server")


def missing() -> str | None:
    """What is not installed."""
    return missing_of("pika", "rstream", **{"rabbitmq-server": _program(), "epmd": program("epmd")})


def start(folder: Path, level: Level) -> Server:
    """One server for all kinds of queues, with the stream plugin, and the Erlang port mapper it needs.

    The address is host:port:port, the last one of the stream protocol. What a queue's confirm means is the queue's matter: a
    stream writes and does not flush, a quorum queue flushes its log, a classic queue keeps transient messages in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, stream_port, epmd_port, cluster_port = (free_port() for _ in range(4))
    (folder / "rabbitmq.conf").write_text(_CONFIG.format(port=port, stream_port=stream_port))
    (folder / "plugins").write_text("[rabbitmq_stream].\n")
    environment = {
        "RABBITMQ_NODENAME": "bench@localhost", "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf", "HOME": str(folder),
        "RABBITMQ_MNESIA_BASE": f"{folder}/data", "RABBITMQ_LOG_BASE": f"{folder}/logs", "ERL_EPMD_PORT": str(epmd_port),
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins", "RABBITMQ_DIST_PORT": str(cluster_port),
        "RUNNING_UNDER_SYSTEMD": "true",  # become the Erlang machine instead of waiting for it
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
    }
    settings = [f"{name}={value}" for name, value in environment.items()]
    children = [run_program("epmd", ["env", *settings, program("epmd") or "epmd"], folder)]
    try:
        await_answer(children[0], epmd_port, b"\0\1n", epmd_port.to_bytes(4, "big"))
        children.append(run_program("rabbitmq-server", ["env", *settings, _program() or ""], folder))
        await_answer(children[1], port, b"AMQP\0\0\x09\x01", b"\x01\0\0")
        await_answer(children[1], stream_port, b"", b"")
    except BaseException:
        Server(children, "", folder).kill()
        raise
    return Server(children, f"127.0.0.1:{port}:{stream_port}", folder / "data")


class CallbackSession(AsyncSession):
    """One to whose callbacks messages come: `_on_stamped` where their age counts, which it puts into `_took_ms`."""

    _on_message: Callable[..., Any]
    _on_stamped: Callable[..., Any]

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._took_ms: list[float] = []

    def read(self, count: int) -> int:
        return self.run(self._read(count, self._on_message))

    def receive_timed(self, count: int) -> list[float]:
        before = len(self._took_ms)
        self.run(self._read(count, self._on_stamped))
        return self._took_ms[before : before + count]

    async def _read(self, count: int, on_message: Callable[..., Any]) -> int:
        """Return when so many more have come; how many did."""
        raise NotImplementedError


class StreamSession(CallbackSession):
    """One stream. The consumer stores its offset every 10,000 messages, and at the end."""

    def __init__(self, spec: Spec) -> None:
        host, _, stream_port = spec.address.split(":")
        super().__init__(_with_address(spec, f"{host}:{stream_port}"))
        self._producer: Any = None
        self._consumer: Any = None
        self._confirmed = Countdown()
        self._arrived = Countdown()
        self._published = self._read_before = 0
        self._credentials = {"host": self.host, "port": self.port, "username": USER, "password": USER}

    def prepare(self) -> None:
        self.run(self._prepare())

    async def _prepare(self) -> None:
        await (await self._connected_producer()).create_stream(self.topic)

    def discard(self) -> None:
        self.run(self._discard())

    async def _discard(self) -> None:
        await (await self._connected_producer()).delete_stream(self.topic)

    def close(self) -> None:
        self.run(self._close())

    async def _close(self) -> None:
        for end in (self._producer, self._consumer):
            if end is not None:
                await end.close()

    async def _connected_producer(self) -> Any:
        if self._producer is None:
            from rstream import Producer

            self._producer = Producer(**self._credentials)
            await self._producer.start()
        return self._producer

    def publish(self, count: int, *, tagged: bool) -> None:
        self.run(self._publish(count, tagged))

    async def _publish(self, count: int, tagged: bool) -> None:
        producer = await self._connected_producer()
        for first in range(0, count, PIPELINE):
            number = min(PIPELINE, count - first)
            batch = [self._tagged() for _ in range(number)] if tagged else [self.body] * number
            await self._confirmed.wait(self._published - UNACKNOWLEDGED_MAX)
            await producer.send_batch(self.topic, batch, on_publish_confirm=self._confirm)
            self._published += number
        await self._confirmed.wait(self._published)

    def _tagged(self) -> Any:
        from rstream import AMQPMessage

        return AMQPMessage(body=self.body, application_properties={"tag": TAG, "key": KEY, "site": SITE})

    def _confirm(self, status: Any) -> None:
        if not status.is_confirmed:
            raise RuntimeError(f"RabbitMQ refused a message: {status}")
        self._confirmed.add()

    async def send_one(self, body: bytes) -> None:
        await (await self._connected_producer()).send_wait(self.topic, body)

    async def post(self, body: bytes) -> None:
        """In order: the server takes a publishing id below the last one for a repetition."""
        await (await self._connected_producer()).send_batch(self.topic, [body], on_publish_confirm=self._confirm)
        self._published += 1

    async def settle(self) -> None:
        await self._confirmed.wait(self._published)

    async def _read(self, count: int, on_message: Any) -> int:
        if self._consumer is None:
            from rstream import Consumer, ConsumerOffsetSpecification, OffsetType

            self._consumer = Consumer(**self._credentials)
            first = ConsumerOffsetSpecification(OffsetType.FIRST, None)
            await self._consumer.start()
            await self._consumer.subscribe(
                self.topic, on_message, offset_specification=first, subscriber_name=GROUP, initial_credit=10
            )
        await self._arrived.wait(self._read_before + count)
        await self._consumer.store_offset(self.topic, GROUP, self._arrived.count - 1)
        came, self._read_before = self._arrived.count - self._read_before, self._arrived.count
        return came

    def _on_message(self, body: bytes, context: Any) -> Any:
        self._arrived.add()
        return None if self._arrived.count % COMMIT_MESSAGES else self._store(context)

    async def _store(self, context: Any) -> None:
        await context.consumer.store_offset(context.stream, GROUP, context.offset)

    def _on_stamped(self, body: bytes, context: Any) -> Any:
        self._took_ms.append(self.age_ms(body))
        return self._on_message(body, context)


class Confirms:
    """Which publishes are confirmed, of delivery tags 1, 2, ...: single ones in any order, or all up to one. Pure."""

    def __init__(self) -> None:
        self._all_to = 0
        self._beyond: set[int] = set()

    @property
    def count(self) -> int:
        return self._all_to + len(self._beyond)

    def add(self, tag: int, *, multiple: bool) -> int:
        """Take one frame; how many publishes it confirms that were not before."""
        before = self.count
        if multiple and tag > self._all_to:
            self._all_to = tag
            self._beyond = {other for other in self._beyond if other > tag}
        elif tag > self._all_to:
            self._beyond.add(tag)
        while self._all_to + 1 in self._beyond:
            self._all_to += 1
            self._beyond.remove(self._all_to)
        return self.count - before


class QueueSession(CallbackSession):
    """A queue over AMQP 0.9.1 with publisher confirms; the consumer acknowledges up to a thousand at once."""

    arguments: ClassVar[dict[str, str]]
    delivery_mode: ClassVar[int]  # 2: persistent

    def __init__(self, spec: Spec) -> None:
        super().__init__(_with_address(spec, spec.address.rpartition(":")[0]))
        self._confirms, self._confirmed = Confirms(), Countdown()
        self._arrived = Countdown()
        self._waiting: dict[int, asyncio.Future[None]] = {}  # of `send_one`, by delivery tag
        self._published = self._read_before = self._acknowledged = 0
        self._is_reading = False
        self.run(self._connect())

    async def _connect(self) -> None:
        import pika
        from pika.adapters.asyncio_connection import AsyncioConnection

        mode = self.delivery_mode
        self._properties = pika.BasicProperties(delivery_mode=mode)
        self._tagged = pika.BasicProperties(delivery_mode=mode, headers={"tag": TAG, "key": KEY, "site": SITE})
        loop = asyncio.get_running_loop()
        opened = loop.create_future()
        self._connection: Any = AsyncioConnection(
            pika.ConnectionParameters(self.host, self.port, heartbeat=0), on_open_callback=opened.set_result,
            on_open_error_callback=lambda _, error: opened.set_exception(RuntimeError(str(error))), custom_ioloop=loop,
        )
        await opened
        self._channel: Any = await self._asked(self._connection.channel, "on_open_callback")
        await self._asked(self._channel.confirm_delivery, "callback", self._on_confirm)
        await self._asked(self._channel.basic_qos, "callback", prefetch_count=PREFETCH)

    async def _asked(self, request: Any, callback: str, *arguments: Any, **options: Any) -> Any:
        """The answer to a request of pika."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        request(*arguments, **options, **{callback: answered.set_result})
        return await asyncio.wait_for(answered, IDLE_S_MAX)

    def prepare(self) -> None:
        self.run(self._asked(self._channel.queue_declare, "callback", self.topic, durable=True, arguments=self.arguments))

    def discard(self) -> None:
        self.run(self._asked(self._channel.queue_delete, "callback", self.topic))

    def close(self) -> None:
        self.run(self._close())

    async def _close(self) -> None:
        closed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._connection.add_on_close_callback(lambda *_: closed.set_result(None))
        self._connection.close()
        await asyncio.wait_for(closed, IDLE_S_MAX)

    def publish(self, count: int, *, tagged: bool) -> None:
        self.run(self._publish(count, self._tagged if tagged else self._properties))

    async def _publish(self, count: int, properties: Any) -> None:
        publish, topic, body = self._channel.basic_publish, self.topic, self.body
        for number in range(count):
            if number % PUBLISH_BURST == 0:
                await asyncio.sleep(0)  # let the socket be written and read
                await self._confirmed.wait(self._published - UNACKNOWLEDGED_MAX)
            publish("", topic, body, properties)
            self._published += 1
        await self._confirmed.wait(self._published)

    async def post(self, body: bytes) -> None:
        self._channel.basic_publish("", self.topic, body, self._properties)
        self._published += 1

    async def settle(self) -> None:
        await self._confirmed.wait(self._published)

    async def send_one(self, body: bytes) -> None:
        await self.post(body)
        waiting = self._waiting[self._published] = asyncio.get_running_loop().create_future()
        await waiting

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        if method.NAME != "Basic.Ack":
            raise RuntimeError(f"RabbitMQ refused a message: {frame}")
        self._confirmed.add(self._confirms.add(method.delivery_tag, multiple=method.multiple))
        if self._waiting:
            tags = [tag for tag in self._waiting if tag <= method.delivery_tag] if method.multiple else [method.delivery_tag]
            for tag in tags:
                self._waiting.pop(tag).set_result(None)

    async def _read(self, count: int, on_message: Any) -> int:
        if not self._is_reading:
            self._is_reading = True
            self._channel.basic_consume(self.topic, on_message)
        await self._arrived.wait(self._read_before + count)
        self._acknowledge()
        came, self._read_before = self._arrived.count - self._read_before, self._arrived.count
        return came

    def _on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._arrived.add()
        if self._arrived.count - self._acknowledged >= PIPELINE:
            self._acknowledge()

    def _on_stamped(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._took_ms.append(self.age_ms(body))
        self._arrived.add()
        self._acknowledge()

    def _acknowledge(self) -> None:
        """All that came; delivery tags count from 1."""
        if self._arrived.count > self._acknowledged:
            self._acknowledged = self._arrived.count
            self._channel.basic_ack(self._acknowledged, multiple=True)


class QuorumSession(QueueSession):
    """A quorum queue of one replica: each message is flushed before its confirm."""

    arguments: ClassVar[dict[str, str]] = {"x-queue-type": "quorum"}
    delivery_mode = 2


class ClassicSession(QueueSession):
    """A classic queue and transient messages."""

    arguments: ClassVar[dict[str, str]] = {}
    delivery_mode = 1


def _with_address(spec: Spec, address: str) -> Spec:
    return msgspec.structs.replace(spec, address=address)
