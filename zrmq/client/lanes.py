"""Sending one message in the calling thread: a lane per broker, used by whoever finds it free.

A thread that waits for its receipt anyway need not hand its message to another thread and back. It may only do so while nothing
of the topic is on its way through the I/O thread, or it would overtake; the door sees to that. Lanes have a producer id of their
own, shared by all lanes of a producer, since its sequences and the accumulator's would cross.

A lane does the good case only. A message that is refused by a broker in trouble, or not answered for as long as a failover takes,
goes on through the I/O thread as the very bytes that were sent: with the same id, so that its queue recognises it, and with all
the rules of `producing.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Protocol

from zrmq.client.accumulator import Accumulator
from zrmq.client.batch import Batch, Extras, Lock, OwnedLock, SendHandle, columns_of, interrupted_error
from zrmq.client.producing import BROKERS_TROUBLE, FAILOVER_AFTER_MS, ProducerCore, unknown_error
from zrmq.errors import InvalidFrameError, RequestTimeoutError, UnreachableError, ZrmqError
from zrmq.logs import get_logger
from zrmq.message import MessageQueue, SendReceipt, message_id
from zrmq.protocol.batch import encode_batch
from zrmq.protocol.requests import AnyReply, Request, Send, Sent
from zrmq.transport.interface import Frames

GRACE_MS = 500.0  # for what a lane's request takes beyond its timeout

log = get_logger("producer")


class Lane(Protocol):
    """A `zrmq.transport.lane.Lane`."""

    was_resent: bool

    def request(
        self, kind: type[Request], *fields: object, payload: Frames = (), timeout_ms: int
    ) -> tuple[AnyReply, list[bytes]]: ...

    def close(self) -> None: ...


class _Slot:
    """The lane to one broker. Who holds the lock may use it, but not while a message of it is being handed over to the I/O
    thread: its queue would forget it once enough others have passed, and store it again."""

    def __init__(self, lock: Lock, address: str, lane: Lane) -> None:
        self.lock = lock
        self.address = address
        self.lane = lane
        self.is_handing_over = False


class Lanes:
    """All lanes of one producer. Any thread, but for the constructor."""

    def __init__(
        self,
        core: ProducerCore,
        accumulator: Accumulator,
        producer_id: int,
        *,
        open_lane: Callable[[str], Lane],
        post: Callable[[Callable[[], None]], None],
        new_lock: Callable[[], Lock],
        new_owned_lock: Callable[[], OwnedLock],
    ) -> None:
        """`open_lane` makes a lane to an address; `post` has something called on the loop's thread."""
        self._core = core
        self._accumulator = accumulator
        self._producer_id = producer_id
        self._open_lane = open_lane
        self._post = post
        self._new_lock = new_lock
        self._now_ms = accumulator.clock.monotonic_ms
        self._sequences = count(1)
        self._turns = count()
        self._slots: dict[str, _Slot] = {}
        self._slots_lock = new_owned_lock()
        self._is_closed = False

    def send(
        self, target: str | MessageQueue, body: bytes, size_bytes: int, extras: Extras | None, timeout_ms: int
    ) -> SendReceipt | None:
        """Send one checked message and wait for its receipt. None: no lane is free for it, so nothing was done.

        Raises what the message failed with.
        """
        taken = self._take(target)
        if taken is None:
            return None
        queue, slot = taken
        batch = None
        try:  # at once: an exception in between (Ctrl-C, say) leaves the lane taken for ever
            sequence = next(self._sequences)
            frame = self._encoded(body, extras, sequence)
            started_ms = self._now_ms()
            sent = self._request(slot.lane, queue, frame, timeout_ms, queue is target)
            if not isinstance(sent, Sent):
                deadline_ms = started_ms + timeout_ms
                if timeout_ms <= FAILOVER_AFTER_MS:
                    deadline_ms += FAILOVER_AFTER_MS  # nobody waits for it, but it has to go before what follows
                batch = self._accumulator.encoded_batch(target, self._producer_id, sequence, frame, size_bytes, deadline_ms)
                batch.may_be_stored = slot.lane.was_resent
                slot.is_handing_over = True
                self._post(partial(self._hand_over, slot, batch, queue, sent))
        except BaseException:
            slot.is_handing_over = False
            raise
        finally:
            slot.lock.release()
        if isinstance(sent, Sent):
            ended_ms = self._now_ms()
            self._core.faults.record(queue.broker_name, ended_ms - started_ms, ended_ms)
            return SendReceipt(
                queue.topic, queue.broker_name, queue.queue_id, sent.base_offset, message_id(self._producer_id, sequence),
                sent.store_timestamp_ms, sent.durability, sent.duplicate,
            )
        assert batch is not None
        if timeout_ms <= FAILOVER_AFTER_MS and isinstance(sent, RequestTimeoutError):
            raise sent  # its time is over; it goes once more by the way of those that follow it, or they might overtake it
        return SendHandle(batch, 0).result()

    def _hand_over(self, slot: _Slot, batch: Batch, queue: MessageQueue, error: ZrmqError) -> None:
        """In the loop's thread. From here on the topic is not idle, and nobody asks for a lane."""
        try:
            self._core.adopt(batch, queue, error)
        finally:
            slot.is_handing_over = False

    def _encoded(self, body: bytes, extras: Extras | None, sequence: int) -> bytes:
        now_ms = self._accumulator.clock.time_ms()
        return encode_batch(
            columns_of([body], None if extras is None else [extras]), producer_id=self._producer_id, first_sequence=sequence,
            first_born_ms=now_ms, last_born_ms=now_ms, compress=self._accumulator.config.compress,
        )

    @staticmethod
    def _request(lane: Lane, queue: MessageQueue, frame: bytes, timeout_ms: int, is_bound: bool) -> Sent | ZrmqError:
        """Ask. Returns an error that the I/O thread is to know of, raises any other."""
        lane_timeout_ms = min(timeout_ms, int(FAILOVER_AFTER_MS))
        try:
            reply, _ = lane.request(Send, queue.topic, queue.queue_id, 0, payload=(frame,), timeout_ms=lane_timeout_ms)
        except (RequestTimeoutError, UnreachableError) as error:
            if timeout_ms <= FAILOVER_AFTER_MS and not (is_bound and isinstance(error, RequestTimeoutError)):
                raise
            return error
        except ZrmqError as error:
            if error.code in BROKERS_TROUBLE:
                return error
            if lane.was_resent:
                raise unknown_error(queue.topic, timeout_ms, error) from error
            raise
        if not isinstance(reply, Sent):
            name = type(reply).__name__
            raise InvalidFrameError(f"Broker {queue.broker_name} answered a send with {name}; upgrade it.")
        return reply

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _take(self, target: str | MessageQueue) -> tuple[MessageQueue, _Slot] | None:
        """The next queue in turn whose broker has a lane free, with its lock taken."""
        queues = [target] if isinstance(target, MessageQueue) else self._core.usable_queues(target)
        turn = next(self._turns)
        for step in range(len(queues)):
            queue = queues[(turn + step) % len(queues)]
            slot = self._slot(queue.broker_name)
            if slot is not None and slot.lock.acquire(False):
                is_free = self._slots.get(queue.broker_name) is slot and not slot.is_handing_over
                if is_free and self._accumulator.is_idle(queue.topic):  # once more: a hand-over makes it busy before it ends
                    return queue, slot
                slot.lock.release()  # replaced or closed meanwhile, or not to be passed
        return None

    def _slot(self, broker_name: str) -> _Slot | None:
        """The broker's slot if its session is open; the I/O thread is better at waiting for one."""
        route = self._core.route
        if route is None or broker_name not in self._core.reachable or self._is_closed:
            return None
        broker = route.brokers.get(broker_name)
        slot = self._slots.get(broker_name)
        if broker is None or (slot is not None and slot.address == broker.address):
            return slot
        return self._make_slot(broker_name, broker.address)

    def _make_slot(self, broker_name: str, address: str) -> _Slot | None:
        if self._slots_lock._is_owned():
            return None  # a signal handler interrupted this very thread here
        with self._slots_lock:
            old = self._slots.get(broker_name)
            if self._is_closed or (old is not None and old.address == address):
                return old
            if old is not None and not self._drop(broker_name):  # the broker moved
                return None
            present = () if self._core.route is None else self._core.route.brokers
            for name in self._slots.keys() - present:
                self._drop(name)
            try:
                slot = self._slots[broker_name] = _Slot(self._new_lock(), address, self._open_lane(address))
            except UnreachableError as error:
                log.warning("lane_not_opened", broker_name=broker_name, reason=error.message)
                return None
            return slot

    def _drop(self, broker_name: str) -> bool:
        """Close the lane of a broker that is there no more. False: it is in use."""
        slot = self._slots[broker_name]
        if slot.is_handing_over or not slot.lock.acquire(False):
            return False
        del self._slots[broker_name]
        slot.lane.close()
        slot.lock.release()
        return True

    def close(self) -> None:
        """Close every lane; one in use first gets its answer, or waits for that as long as a failover takes."""
        if self._slots_lock._is_owned():
            raise interrupted_error()
        with self._slots_lock:
            self._is_closed = True
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            if slot.lock.acquire(timeout=(FAILOVER_AFTER_MS + GRACE_MS) / 1000):  # else Ctrl-C left it taken, or its user hangs
                slot.lane.close()
