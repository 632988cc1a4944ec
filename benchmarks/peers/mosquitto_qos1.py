"""Mosquitto at QoS 1: many publishes in flight. It acknowledges from memory; its file is written from time to time only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contestants import Level
from benchmarks.servers import Server, await_answer, free_port, missing_of, program, run_program
from benchmarks.session import GROUP, KEY, SITE, TAG, UNACKNOWLEDGED_MAX, Session
from zrmq.cli.bench_players import Spec

PUBLISH_BURST = 100  # paho reads acknowledgements only when its loop runs
AWAIT_S_MAX = 120.0  # for the slowest play

_HELLO = bytes.fromhex("101000044d5154540402003c000470726f62")  # MQTT 3.1.1, clean session, client id "prob"


def missing() -> str | None:
    """What is not installed."""
    return missing_of("paho", mosquitto=program("mosquitto"))


def start(folder: Path, level: Level) -> Server:
    """Without limits on what waits for a client; persistence as Debian configures it."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {folder}/\nuser root\n"
        f"max_queued_messages 0\nmax_inflight_messages 0\nset_tcp_nodelay true\nlog_type error\n"
    )
    child = run_program("mosquitto", [program("mosquitto") or "", "-c", str(config)], folder)
    try:
        await_answer(child, port, _HELLO, b"\x20")
    except BaseException:
        child.kill()
        raise
    return Server([child], f"127.0.0.1:{port}", folder)


class MosquittoSession(Session):
    """A topic; its reader is a persistent session, so that messages wait for it. paho's loop runs in the caller's thread."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._writer: Any = None
        self._reader: Any = None
        self._published = self._acknowledged = self._taken = 0
        self._arrived = 0
        self._on_arrival: Callable[[bytes], None] = lambda body: None

    def prepare(self) -> None:
        client, subscribed = self._connected_reader(), list[object]()
        client.on_subscribe = lambda *facts: subscribed.append(facts)
        client.subscribe(self.topic, qos=1)
        self._await(client, lambda: bool(subscribed))
        self.close()  # the subscription stays, and messages wait

    def close(self) -> None:
        for client in (self._writer, self._reader):
            if client is not None:
                client.disconnect()
                while client.loop(0.01) == 0:
                    continue
        self._writer = self._reader = None

    def publish(self, count: int, *, tagged: bool) -> None:
        client, properties = self._connected_writer(), self._properties() if tagged else None
        for number in range(count):
            if number % PUBLISH_BURST == 0:
                client.loop(0.0)  # takes acknowledgements
                self._await(client, lambda: self._published - self._acknowledged < UNACKNOWLEDGED_MAX)
            client.publish(self.topic, self.body, qos=1, properties=properties)
            self._published += 1
        self._await(client, lambda: self._acknowledged == self._published)

    def send(self, body: bytes) -> None:
        client = self._connected_writer()
        client.publish(self.topic, body, qos=1)
        self._published += 1
        self._await(client, lambda: self._acknowledged == self._published)

    def read(self, count: int) -> int:
        client, before = self._connected_reader(), self._taken
        self._await(client, lambda: self._arrived >= before + count)
        self._taken = self._arrived
        return self._taken - before

    def receive_timed(self, count: int) -> list[float]:
        took_ms: list[float] = []
        self._on_arrival = lambda body: took_ms.append(self.age_ms(body))
        self._await(self._connected_reader(), lambda: len(took_ms) >= count)
        return took_ms[:count]

    def _await(self, client: Any, is_done: Callable[[], bool]) -> None:
        """Let paho work until it is. Raises `TimeoutError` when that takes too long, `ConnectionError` when it is cut off."""
        deadline_ms = self.clock.monotonic_ms() + AWAIT_S_MAX * 1000
        while not is_done():
            if (code := client.loop(1.0)) != 0:
                raise ConnectionError(f"Mosquitto's client ended with code {code}.")
            if self.clock.monotonic_ms() > deadline_ms:
                raise TimeoutError(f"Mosquitto did not do it within {AWAIT_S_MAX:.0f} s.")

    def _connected_writer(self) -> Any:
        if self._writer is None:
            self._writer = self._client("")
            self._writer.on_publish = self._on_publish
            self._writer.connect(self.host, self.port)
            self._await(self._writer, self._writer.is_connected)
        return self._writer

    def _on_publish(self, *_: object) -> None:
        self._acknowledged += 1

    def _on_message(self, client: Any, data: Any, message: Any) -> None:
        self._arrived += 1
        self._on_arrival(message.payload)

    def _connected_reader(self) -> Any:
        if self._reader is None:
            self._reader = self._client(f"{GROUP}-{self.topic}")
            self._reader.on_message = self._on_message
            self._reader.connect(self.host, self.port, **self._kept())
            self._await(self._reader, self._reader.is_connected)
        return self._reader

    def _client(self, client_id: str) -> Any:
        from paho.mqtt.client import Client, MQTTProtocolVersion
        from paho.mqtt.enums import CallbackAPIVersion

        client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        client.max_inflight_messages_set(UNACKNOWLEDGED_MAX)
        return client

    def _kept(self) -> dict[str, Any]:
        """Arguments of a connection whose session outlives it."""
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        properties.ReceiveMaximum = UNACKNOWLEDGED_MAX
        return {"clean_start": False, "properties": properties}

    def _properties(self) -> Any:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.PUBLISH)
        properties.UserProperty = [("tag", TAG), ("key", KEY), ("site", SITE)]
        return properties
