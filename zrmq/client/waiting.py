"""Calls that are answered when the route shows something: a first route, a topic, a topic that has to be created first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from zrmq.errors import ClosedError, Code, RequestTimeoutError, TopicNotFoundError, UnreachableError, ZrmqError
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import AnyReply, PutTopic
from zrmq.transport.interface import Loop, Timer

if TYPE_CHECKING:
    from zrmq.client.instance import ClientInstance, RouteView

SETTLE_MS = 1_000  # for brokers that are to create a topic while another one shows it

OnDone = Callable[[ZrmqError | None], None]


def no_broker(instance: ClientInstance) -> UnreachableError:
    """What whoever needs a broker is told while the route shows none."""
    return UnreachableError(
        "The NameServer knows no broker; start one (zrmq up, zrmq broker) and let it register there.",
        nameservers=instance.nameservers,
    )


def no_nameserver(instance: ClientInstance, timeout_ms: int) -> UnreachableError:
    """What whoever needs a route is told when there was never an answer."""
    names = ", ".join(instance.nameservers)
    return UnreachableError(
        f"No NameServer answered within {timeout_ms} ms at {names}; start one (zrmq up), or give the right addresses.",
        nameservers=instance.nameservers, timeout_ms=timeout_ms,
    )


class RouteWait:
    """Ends well when a route is known and shows the topic, if one is given. `on_done` is called once, later than the making.

    The instance calls `advance` after each answer of a NameServer. Loop thread only.
    """

    def __init__(self, instance: ClientInstance, loop: Loop, topic: str | None, on_done: OnDone, timeout_ms: int) -> None:
        self._instance = instance
        self._topic = topic
        self._on_done = on_done
        self._timeout_ms = timeout_ms
        self.is_over = False
        self._timers = [loop.call_later(0.0, self.advance), loop.call_later(timeout_ms, self._expire)]

    def advance(self) -> None:
        """Look whether it is so by now."""
        route = self._instance.route
        if not self.is_over and route is not None and self._is_shown_by(route):
            self.end(None)

    def end(self, error: ZrmqError | None) -> None:
        """It is over, for better or worse. Only the first call has an effect."""
        if self.is_over:
            return
        self.is_over = True
        for timer in self._timers:
            timer.cancel()
        self._on_done(error)

    def _expire(self) -> None:
        self.end(self._reason())

    def _is_shown_by(self, route: RouteView) -> bool:
        return self._topic is None or bool(route.queues(self._topic))

    def _reason(self) -> ZrmqError:
        """Why it took too long."""
        if self._instance.trouble is not None:
            return self._instance.trouble
        if self._topic is None or not self._instance.covers(self._topic):
            return RequestTimeoutError(
                f"The NameServer did not answer within {self._timeout_ms} ms; it is slow or stands still. Try again.",
                timeout_ms=self._timeout_ms,
            )
        return TopicNotFoundError(
            f"Topic {self._topic!r} does not exist; create it with 'zrmq topic create {self._topic}'.", topic=self._topic
        )


class BrokerWait(RouteWait):
    """Ends well when the route shows a broker: one that has just been started listens some moments before it is there."""

    def _is_shown_by(self, route: RouteView) -> bool:
        return bool(route.brokers)

    def _reason(self) -> ZrmqError:
        is_answered = self._instance.route is not None and self._instance.trouble is None
        return no_broker(self._instance) if is_answered else super()._reason()


class Settling:
    """The brokers that are to create a topic and have neither refused nor show it: the number of its queues is about to change.

    Over when there are none, or `SETTLE_MS` after the first broker shows it. Loop thread only.
    """

    def __init__(self, loop: Loop, topic: str, on_over: Callable[[str], None]) -> None:
        self.awaited: set[str] = set()
        self._loop = loop
        self._topic = topic
        self._on_over = on_over
        self._timer: Timer | None = None

    def advance(self, route: RouteView) -> None:
        """Look who shows it by now, and who is gone."""
        shown = {queue.broker_name for queue in route.queues(self._topic)}
        self.awaited &= route.brokers.keys() - shown
        if not self.awaited:
            self.end()
        elif shown and self._timer is None:
            self._timer = self._loop.call_later(SETTLE_MS, self.end)

    def refuse(self, broker_name: str) -> None:
        """This one will not create it, as far as one knows."""
        self.awaited.discard(broker_name)
        if not self.awaited:
            self.end()

    def end(self) -> None:
        """Wait for nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._on_over(self._topic)


class TopicCreation(RouteWait):
    """Asks each live master to create the topic, unless the route shows it; ends well when the route does.

    One broker that creates it is enough, unless it is to be `everywhere`: then it must have settled too. The others go on trying
    as long as there is time, so that the topic is everywhere.
    """

    def __init__(
        self, instance: ClientInstance, loop: Loop, topic: str, on_done: OnDone, timeout_ms: int, everywhere: bool
    ) -> None:
        super().__init__(instance, loop, topic, on_done, timeout_ms)
        self._config = TopicConfig(topic)
        self._everywhere = everywhere
        self._now_ms = loop.clock.monotonic_ms
        self._deadline_ms = self._now_ms() + timeout_ms
        self._asked: set[str] = set()
        self._refusals: dict[str, ZrmqError] = {}

    def advance(self) -> None:
        """Look whether the topic is there; if it is not, ask the brokers that were not asked yet."""
        super().advance()
        route = self._instance.route
        topic = self._config.topic
        if self.is_over or route is None or not self._instance.covers(topic) or route.queues(topic):
            return
        for name in sorted(route.brokers.keys() - self._asked):
            link = self._instance.link(name)
            if link is not None:
                self._asked.add(name)
                self._instance.settling(topic).awaited.add(name)
                link.request(
                    PutTopic, self._config, True, True,
                    timeout_ms=max(1, round(self._deadline_ms - self._now_ms())), on_reply=partial(self._handle_reply, name),
                )

    def _handle_reply(self, name: str, reply: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        if isinstance(reply, ClosedError):  # the broker left the route; it is asked again when it is back
            self._asked.discard(name)
        elif isinstance(reply, ZrmqError):
            self._refusals[name] = reply
            if self._refusals.keys() == self._asked:
                self.end(self._refusal())
            self._instance.settling(self._config.topic).refuse(name)

    def _is_shown_by(self, route: RouteView) -> bool:
        return super()._is_shown_by(route) and not (self._everywhere and self._instance.is_settling(self._config.topic))

    def _refusal(self) -> ZrmqError:
        others = [error for error in self._refusals.values() if error.code != Code.TOPIC_NOT_FOUND]
        if others:
            return others[0]
        topic = self._config.topic
        return TopicNotFoundError(
            f"Topic {topic!r} does not exist and no broker creates topics by use; create it with 'zrmq topic create {topic}'.",
            topic=topic, brokers=sorted(self._refusals),
        )

    def _reason(self) -> ZrmqError:
        route = self._instance.route
        if route is None or self._instance.trouble is not None or not self._instance.covers(self._config.topic):
            return super()._reason()
        if not route.brokers:
            return no_broker(self._instance)
        topic = self._config.topic
        brokers = sorted(self._instance.settling(topic).awaited if route.queues(topic) else route.brokers)
        return RequestTimeoutError(
            f"Topic {topic!r} could not be created within {self._timeout_ms} ms at {', '.join(brokers)}; check that they can be "
            "reached.",
            topic=topic, brokers=brokers, timeout_ms=self._timeout_ms,
        )
