"""Send: one batch checked, deduplicated, stamped and appended; the answer waits for the flush.

What is stored already gets its receipt whatever would be said of a new batch, or its producer would take it for one that is not.
"""

from __future__ import annotations

from zrmq.errors import Code, InvalidArgumentError, OutOfOrderError, RequestRefusedError, StoppingError
from zrmq.message import FlushMode
from zrmq.protocol.batch import BatchHeader, open_batch
from zrmq.protocol.events import PERMISSION_WRITE
from zrmq.protocol.requests import Send, Sent
from zrmq.serving.context import Context
from zrmq.store.tables import Queue
from zrmq.transport.sessions import Session


class Sending:
    """Handles `Send`, with a session (answered) and on the ingest port (not answered)."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store
        self._outbox = context.outbox
        self.is_stopping = False
        self.batches_in = 0
        self.records_in = 0
        self.bytes_in = 0
        self.batches_duplicate = 0
        self.batches_refused_one_way = 0

    def send(self, session: Session, request: Send, frames: list[bytes]) -> None:
        """The produce path, whole: check, recognize, append, promise."""
        queue, header = self._check(request, frames)
        store = self._store
        sent = self._find_duplicate(request, queue, header)
        if sent is None:
            placed = store.append_batch(queue, header, frames[1])
            self._count(header)
            sent = Sent(request.number, placed.base_offset, placed.store_timestamp_ms, queue.topic.config.flush_mode)
        if sent.durability is FlushMode.SYNC:
            self._outbox.after_flush(store.appended_position, session.peer, sent)
        else:
            self._outbox.after_write(store.appended_position, session.peer, sent)

    def ingest(self, request: Send, frames: list[bytes]) -> None:
        """A one-way batch: stored if it can be; the caller counts what is refused."""
        queue, header = self._check(request, frames)
        if self._find_duplicate(request, queue, header) is None:
            self._store.append_batch(queue, header, frames[1])
            self._count(header)

    def _check(self, request: Send, frames: list[bytes]) -> tuple[Queue, BatchHeader]:
        if len(frames) != 2:
            raise InvalidArgumentError(f"A send carries one batch as its payload and got {len(frames) - 1} frames.")
        return self._context.queue(request.topic, request.queue_id), open_batch(frames[1])

    def _find_duplicate(self, request: Send, queue: Queue, header: BatchHeader) -> Sent | None:
        """The original receipt of a batch that is stored already. Raises for one that is not and that may not be appended:
        `StoppingError`, FORBIDDEN, or `OutOfOrderError` when its predecessor is missing.

        The original may be stored and not yet flushed: the caller holds this receipt like any other.
        """
        tables, topic = self._store.tables, queue.topic
        original = tables.find_duplicate(header.producer_id, topic.topic_id, queue.queue_id, header.first_sequence)
        if original is not None:
            self.batches_duplicate += 1
            base_offset, store_timestamp_ms, _ = original
            return Sent(request.number, base_offset, store_timestamp_ms, topic.config.flush_mode, True)
        if self.is_stopping:
            raise stopping_error(self._context.config.broker_name)
        if not topic.config.permission & PERMISSION_WRITE:
            raise RequestRefusedError(
                f"Topic {request.topic!r} takes no messages at broker {self._context.config.broker_name}; use another broker.",
                code=Code.FORBIDDEN, topic=request.topic,
            )
        if request.follows and not tables.has_stored(header.producer_id, topic.topic_id, queue.queue_id, request.follows):
            raise OutOfOrderError(
                f"The batch follows sequence {request.follows}, which queue {queue.queue_id} of {topic.config.topic!r} does not"
                " have; send that one first.",
                follows=request.follows,
            )
        return None

    def _count(self, header: BatchHeader) -> None:
        self.batches_in += 1
        self.records_in += header.record_count
        self.bytes_in += header.length


def stopping_error(broker_name: str) -> StoppingError:
    """What a broker says that takes nothing new."""
    return StoppingError(f"Broker {broker_name} is shutting down; use another one, or this one when it is back.")
