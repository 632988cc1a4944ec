"""Batches being filled, the memory they may take, and the handles that point into them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.interrupts import Interrupt
from zrmq.client import accumulator as accumulator_module
from zrmq.client import batch as batch_module
from zrmq.client.accumulator import FILLER_FROM, RECORD_OVERHEAD_BYTES, Accumulator, AccumulatorConfig
from zrmq.client.batch import NO_EXTRAS, Batch, Extras, OneWay, Run, SendHandle, Span, Stored, Target
from zrmq.errors import (
    BufferFullError,
    ClosedError,
    DiskFullError,
    InvalidArgumentError,
    RequestTimeoutError,
    UnreachableError,
    ZrmqError,
)
from zrmq.message import FlushMode, Message, MessageQueue, message_id
from zrmq.protocol import limits
from zrmq.protocol.batch import decode_messages, open_batch, peek_batch
from zrmq.testing.clock import ManualClock

PRODUCER_ID = 0xABCD
STORED = Stored("broker-a", 3, 100, 1_700_000_000_500, FlushMode.SYNC)
QUEUE = MessageQueue("meters", "broker-a", 1)


class Setup:
    """An accumulator with a clock to turn, that counts how often it woke the loop."""

    def __init__(
        self, *, buffer_bytes: int = 1 << 20, block_when_full: bool = False, records_max: int = 4, bytes_max: int = 4096,
        linger_ms: float = 0.0, compress: bool = False, may_wait: Callable[[], bool] = lambda: True,
    ) -> None:
        self.clock = ManualClock()
        self.wakes = 0
        config = AccumulatorConfig(PRODUCER_ID, buffer_bytes, block_when_full, records_max, bytes_max, linger_ms, compress)
        self.accumulator = Accumulator(
            config, self.clock, new_lock=threading.Lock, new_owned_lock=threading.RLock,  # type: ignore[arg-type]
            wake=self._wake, may_wait=may_wait,
        )

    def _wake(self) -> None:
        self.wakes += 1

    def append(
        self, body: bytes = b"x", target: Target = "meters", extras: Extras | None = None, timeout_ms: int = 3000
    ) -> SendHandle:
        return self.accumulator.append(target, body, len(body) + RECORD_OVERHEAD_BYTES, extras, timeout_ms)

    def quick(self, body: bytes = b"x", target: Target = "meters") -> SendHandle:
        """As `send_async` does for a body alone."""
        fill = self.accumulator.body_fillers.get(target)
        if fill is None:
            return self.append(body, target)
        try:
            return fill(body)
        except (StopIteration, ValueError) as end:
            return self.accumulator.filled(end) or self.append(body, target)

    def take(self) -> list[Batch]:
        """Everything, open or sealed."""
        return self.accumulator.take_open(lambda _: True)


def messages_of(batch: Batch) -> Sequence[Message]:
    frame = batch.encoded()
    return decode_messages(open_batch(frame), frame, topic=batch.topic, broker_name="b")


def bodies_of(batch: Batch) -> list[bytes]:
    return [message.body for message in messages_of(batch)]


# --- batches --------------------------------------------------------------------------------------------------------------


def test_records_of_one_topic_share_a_batch() -> None:
    setup = Setup()
    handles = [setup.append(body) for body in (b"a", b"b", b"c")]
    (batch,) = setup.take()
    assert bodies_of(batch) == [b"a", b"b", b"c"]
    assert [(handle.batch, handle.index) for handle in handles] == [(batch, 0), (batch, 1), (batch, 2)]


def test_targets_have_batches_of_their_own() -> None:
    setup = Setup()
    targets: list[Target] = ["meters", QUEUE, OneWay("meters"), "alarms", "meters"]
    for target in targets:
        setup.append(target.encode() if isinstance(target, str) else b"-", target)
    assert [(batch.target, batch.topic) for batch in setup.take()] == [
        ("meters", "meters"), (QUEUE, "meters"), (OneWay("meters"), "meters"), ("alarms", "alarms")
    ]


def test_a_batch_is_sealed_and_encoded_by_the_caller_when_it_has_enough_records() -> None:
    setup = Setup(records_max=2)
    for body in (b"a", b"b", b"c"):
        setup.append(body)
    (full,) = setup.accumulator.take_sealed()
    assert full.records is None
    assert bodies_of(full) == [b"a", b"b"]
    assert [bodies_of(batch) for batch in setup.take()] == [[b"c"]]


def test_a_batch_is_sealed_when_another_record_of_that_size_would_not_fit() -> None:
    setup = Setup(bytes_max=1000, records_max=100)
    for _ in range(4):
        setup.append(bytes(300))
    assert [len(bodies_of(batch)) for batch in setup.accumulator.take_sealed()] == [2, 2]


def test_records_that_are_added_together_go_out_together() -> None:
    setup = Setup(records_max=4)

    extras = [Extras("t") if number % 2 else NO_EXTRAS for number in range(6)]
    runs = [Run("meters", [b"%d" % number for number in range(6)], [100] * 6, extras), Run(QUEUE, [b"6"], [100], None)]
    spans: list[Span] = []
    setup.accumulator.append_all(runs, 3000, spans)
    assert [(span.batch.target, span.first, span.count) for span in spans] == [("meters", 0, 4), ("meters", 0, 2), (QUEUE, 0, 1)]
    assert spans[0].batch.records is None, "encoded by the caller"
    assert [bodies_of(batch) for batch in setup.take()] == [[b"0", b"1", b"2", b"3"], [b"4", b"5"], [b"6"]]
    assert setup.wakes == 2, "the loop is told of a full batch at once, of what is left at the end"


def test_records_that_are_added_together_stay_together_until_a_batch_is_full() -> None:
    setup = Setup(records_max=4)
    owned: list[bool] = []

    class Watched(list[bytes]):
        def __getitem__(self, index: Any) -> Any:
            owned.append(setup.accumulator._lock._is_owned())
            return super().__getitem__(index)

    runs = [Run(target, Watched([b"x"]), [100], None) for target in ("meters", QUEUE, "meters", QUEUE)]
    setup.accumulator.append_all(runs, 3000, [])
    assert owned == [True] * 4
    assert setup.wakes == 1


def test_of_records_that_are_added_together_those_before_the_full_buffer_are_handed_over() -> None:
    setup = Setup(buffer_bytes=500, records_max=100)
    spans: list[Span] = []
    with pytest.raises(BufferFullError):
        setup.accumulator.append_all([Run("meters", [b"x"] * 7, [100] * 7, None)], 3000, spans)
    assert [index for span in spans for index in range(span.first, span.first + span.count)] == [0, 1, 2, 3, 4]
    assert setup.wakes == 1


def test_more_records_than_the_buffer_holds_are_added_together_as_room_comes() -> None:
    setup = Setup(buffer_bytes=500, records_max=100, block_when_full=True)
    spans: list[Span] = []
    run = Run("meters", [b"%d" % number for number in range(12)], [100] * 12, None)
    thread = threading.Thread(target=setup.accumulator.append_all, args=([run], 30_000, spans))
    thread.start()
    taken: list[bytes] = []
    while thread.is_alive():
        wait_until(lambda: setup.accumulator.is_pressed or not thread.is_alive())
        for batch in setup.take():
            taken += bodies_of(batch)
            setup.accumulator.finish(batch, STORED)
    thread.join(30)
    taken += [body for batch in setup.take() for body in bodies_of(batch)]
    assert taken == run.bodies
    assert sum(span.count for span in spans) == 12
    assert setup.wakes >= 2, "the loop is told before anybody waits for it"


@given(
    st.lists(st.tuples(st.sampled_from(["meters", QUEUE]), st.lists(st.integers(1, 60), max_size=12), st.booleans()), max_size=6),
    st.integers(1, 8),
)
def test_runs_are_cut_into_batches_of_what_fits(drawn: list[tuple[Target, list[int], bool]], records_max: int) -> None:
    setup = Setup(records_max=records_max, bytes_max=100)
    runs, numbers = [], count()
    for target, sizes_bytes, has_extras in drawn:
        bodies = [b"%d" % next(numbers) for _ in sizes_bytes]
        extras = [Extras(body.decode()) for body in bodies] if has_extras else None
        runs.append(Run(target, bodies, sizes_bytes, extras))
    spans: list[Span] = []
    setup.accumulator.append_all(runs, 3000, spans)
    batches = setup.take()
    assert [body for run in runs for body in run.bodies] == [
        bodies_of(span.batch)[index] for span in spans for index in range(span.first, span.first + span.count)
    ]
    tags = {message.body: message.tag for batch in batches for message in messages_of(batch)}
    assert tags == {body: body.decode() if run.extras else None for run in runs for body in run.bodies}
    for batch in batches:
        assert batch.message_count <= records_max
        assert batch.size_bytes <= 100
        assert batch.room_bytes == 0
    assert setup.accumulator.buffered_bytes == sum(size for run in runs for size in run.sizes_bytes)


class Room:
    """The lock of a world where waiting for room takes 600 ms and then everything that went out has an outcome."""

    def __init__(self, setup: Setup, outcome: Stored | ZrmqError) -> None:
        self._setup = setup
        self._outcome = outcome
        self._is_taken = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._is_taken:
            self._setup.clock.advance(600)
            for batch in self._setup.take():
                self._setup.accumulator.finish(batch, self._outcome)
        self._is_taken = True
        return True

    def release(self) -> None:
        """Nobody is woken here."""


def test_each_room_is_waited_for_as_long_as_the_message_may_take() -> None:
    setup = Setup(buffer_bytes=500, records_max=5, block_when_full=True)
    setup.accumulator._new_lock = lambda: Room(setup, STORED)  # type: ignore[assignment,return-value]
    spans: list[Span] = []
    setup.accumulator.append_all([Run("meters", [b"x"] * 30, [100] * 30, None)], 1_000, spans)
    assert sum(span.count for span in spans) == 30, "it took 3,000 ms, and no room took more than 600"


def test_nothing_is_added_once_something_has_failed() -> None:
    setup = Setup(buffer_bytes=500, records_max=5, block_when_full=True)
    setup.accumulator._new_lock = lambda: Room(setup, UnreachableError("gone"))  # type: ignore[assignment,return-value]
    spans: list[Span] = []
    setup.accumulator.append_all([Run("meters", [b"x"] * 30, [100] * 30, None)], 1_000, spans)
    assert sum(span.count for span in spans) == 5
    assert setup.accumulator.buffered_bytes == 0


def test_records_that_go_in_one_by_one_are_looked_at_once_each() -> None:
    looked_at: list[int] = []

    class Watched(list[int]):
        def __getitem__(self, index: Any) -> Any:
            looked_at.append(len(found) if isinstance(found := super().__getitem__(index), list) else 0)
            return found

    setup = Setup(buffer_bytes=100_000, records_max=1_000, bytes_max=64_000)  # too small to grant a batch all it can take
    setup.accumulator.append_all([Run("meters", [b"x"] * 600, Watched([100] * 600), None)], 1_000, [])
    assert sum(looked_at) <= 1_200


def test_a_filler_ends_when_another_record_of_that_size_would_not_fit() -> None:
    setup = Setup(bytes_max=1000, records_max=100)
    for _ in range(6):
        setup.quick(bytes(100))
    (batch,) = setup.accumulator.take_sealed()
    assert (len(bodies_of(batch)), batch.size_bytes) == (6, 6 * 164)


def test_a_larger_record_starts_a_new_batch() -> None:
    setup = Setup(bytes_max=1000, records_max=100)
    setup.append(b"a")
    setup.append(bytes(900))
    assert [len(bodies_of(batch)) for batch in setup.take()] == [1, 1]


def test_the_largest_record_fits_a_batch_of_its_own() -> None:
    setup = Setup(buffer_bytes=1)
    setup.append(b"a")
    setup.accumulator.finish(setup.take()[0], STORED)
    setup.append(bytes(limits.BODY_BYTES_MAX))
    (batch,) = setup.take()
    assert len(batch.encoded()) <= limits.BATCH_BYTES_MAX


def test_records_with_another_timeout_get_a_batch_of_their_own() -> None:
    setup = Setup()
    setup.append(timeout_ms=100)
    setup.append(timeout_ms=200)
    now_ms = setup.clock.monotonic_ms()
    assert [batch.deadline_ms - now_ms for batch in setup.take()] == [100, 200]


def test_the_deadline_counts_from_the_sealing() -> None:
    setup = Setup()
    setup.append(timeout_ms=100)
    setup.clock.advance(50)
    (batch,) = setup.take()
    assert batch.deadline_ms == setup.clock.monotonic_ms() + 100
    assert batch.opened_ms == setup.clock.monotonic_ms() - 50


def test_sequences_are_reserved_so_that_ids_are_known_at_once_and_never_overlap() -> None:
    setup = Setup(records_max=3)
    handles = [setup.append(target=target) for target in ("a", "b", "a", "a", "a", "b")]
    ids = [handle.message_id for handle in handles]
    assert len(set(ids)) == len(ids)
    assert ids[0] == message_id(PRODUCER_ID, 1)
    for batch in setup.take():
        header = peek_batch(batch.encoded())
        assert (header.producer_id, header.first_sequence) == (PRODUCER_ID, batch.first_sequence)
        assert header.last_sequence == batch.last_sequence
    setup_ids = [message_id(PRODUCER_ID, handle.batch.first_sequence + handle.index) for handle in handles]
    assert setup_ids == ids


def test_born_times_are_the_callers() -> None:
    setup = Setup()
    born_ms = setup.clock.time_ms()
    setup.append()
    setup.clock.advance(7)
    header = peek_batch(setup.take()[0].encoded())
    assert (header.first_born_ms, header.born_span_ms) == (born_ms, 7)


def test_a_batch_that_grows_is_filled_without_the_lock() -> None:
    setup = Setup(records_max=8)
    first = [setup.append() for _ in range(FILLER_FROM)]
    assert setup.accumulator._lock.acquire(), "nobody else has it"
    rest = [setup.accumulator.body_fillers["meters"](b"y") for _ in range(8 - FILLER_FROM - 1)]
    setup.accumulator._lock.release()
    last = setup.quick(b"z")
    (batch,) = setup.accumulator.take_sealed()
    assert batch.records is None, "encoded by the caller"
    assert [handle.index for handle in (*first, *rest, last)] == list(range(8))
    assert {handle.batch for handle in (*first, *rest, last)} == {batch}
    assert bodies_of(batch) == [b"x"] * 4 + [b"y"] * 3 + [b"z"]
    assert setup.accumulator.body_fillers == {}


@pytest.mark.parametrize("late", [Extras("t"), "timeout", "take", "refuse"])
def test_whoever_wants_the_batch_otherwise_stops_its_filler(late: object) -> None:
    setup = Setup(records_max=100)
    before = [setup.quick() for _ in range(10)]
    fill = setup.accumulator.body_fillers["meters"]
    if late == "take":
        setup.take()
    elif late == "refuse":
        setup.accumulator.refuse(lambda: ClosedError("closed"))
    else:
        setup.append(extras=late if isinstance(late, Extras) else None, timeout_ms=50 if late == "timeout" else 3000)
    with pytest.raises(StopIteration) as ended:
        fill(b"late")
    assert ended.value.value is None, "it was not taken"
    assert before[0].batch.message_count == (11 if isinstance(late, Extras) else 10)


def test_what_happens_while_a_thread_is_inside_a_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a record (here by a call from within, as a finalizer makes) come another record of the
    same topic and the loop: both do without the batch, and it goes out once the record is in."""
    setup = Setup(records_max=100)
    before = [setup.quick(b"%d" % number) for number in range(10)]
    inside: list[object] = []

    def make_handle(batch: Batch, index: int) -> SendHandle:
        monkeypatch.undo()
        wakes = setup.wakes
        inside.append(setup.quick(b"from within"))
        inside.append(setup.take())
        assert setup.wakes > wakes, "the loop comes again"
        return SendHandle(batch, index)

    monkeypatch.setattr(accumulator_module, "SendHandle", make_handle)
    interrupted = setup.quick(b"10")
    within, taken = inside
    assert isinstance(within, SendHandle)
    assert taken == [], "nothing overtakes the batch that is not ready"
    assert [bodies_of(batch) for batch in setup.take()] == [[b"%d" % number for number in range(11)], [b"from within"]]
    assert interrupted.batch is before[0].batch is not within.batch
    assert setup.accumulator.buffered_bytes == sum(batch.size_bytes for batch in (interrupted.batch, within.batch))


class Interrupting(list[Any]):
    """A list whose next append, or other addition, is interrupted before it has done anything."""

    def __iadd__(self, more: Any) -> Self:
        raise KeyboardInterrupt

    def append(self, item: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("is_filled", [True, False])
def test_an_interrupted_record_leaves_the_others_with_their_own_extras(is_filled: bool) -> None:
    setup = Setup(records_max=100)

    def send(number: int) -> SendHandle:
        return setup.append(b"%d" % number, extras=Extras(f"tag{number}"), timeout_ms=3000 if is_filled else 50)

    handles = [send(number) for number in range(FILLER_FROM - 1)]
    batch = handles[0].batch
    bodies, batch.bodies = batch.bodies, Interrupting(batch.bodies)  # the filler that starts next takes it for the real one
    if is_filled:
        setup.accumulator._start_filler(batch)
    with pytest.raises(KeyboardInterrupt):
        send(99)
    batch.bodies = bodies
    handles += [send(number) for number in range(FILLER_FROM - 1, 9)]
    (taken,) = setup.take()
    frame = taken.encoded()
    messages = decode_messages(open_batch(frame), frame, topic="meters", broker_name="b")
    assert [(message.body, message.tag) for message in messages] == [(b"%d" % number, f"tag{number}") for number in range(9)]


@pytest.mark.parametrize("extras", [None, Extras("t")])
def test_an_error_from_within_a_filler_is_not_taken_for_a_busy_one(
    monkeypatch: pytest.MonkeyPatch, extras: Extras | None
) -> None:
    setup = Setup(records_max=100)
    for _ in range(10):
        setup.append(extras=extras)

    def make_handle(batch: Batch, index: int) -> SendHandle:
        monkeypatch.undo()
        raise ValueError("of a signal handler")

    monkeypatch.setattr(accumulator_module, "SendHandle", make_handle)
    with pytest.raises(ValueError, match="of a signal handler"):
        setup.append(b"once", extras=extras)
    assert [body for batch in setup.take() for body in bodies_of(batch)].count(b"once") == 1


def test_after_the_first_extras_bodies_alone_go_where_the_others_go() -> None:
    setup = Setup(records_max=100)
    for _ in range(10):
        setup.quick()
    setup.append(extras=Extras("t"))
    assert setup.accumulator.body_fillers == {}
    assert setup.quick().batch is setup.append().batch


def test_a_batch_that_ended_while_it_was_encoded_keeps_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    setup.append(bytes(100))
    (batch,) = setup.take()
    encode = batch_module.encode_batch

    def encode_late(*given: Any, **named: Any) -> bytes:
        setup.accumulator.finish(batch, STORED)
        return encode(*given, **named)

    monkeypatch.setattr(batch_module, "encode_batch", encode_late)
    assert len(batch.encoded()) > 100
    assert batch.frame == b""


def test_a_thread_inside_a_filler_while_the_producer_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(records_max=100)
    for _ in range(10):
        setup.quick()

    def close() -> None:
        setup.accumulator.refuse(lambda: ClosedError("closed"))
        for left in setup.accumulator.unfinished():
            left.forget()
            setup.accumulator.finish(left, ClosedError("closed"))

    def make_handle(batch: Batch, index: int) -> SendHandle:
        monkeypatch.undo()
        closing = threading.Thread(target=close)
        closing.start()
        closing.join(30)
        return SendHandle(batch, index)

    monkeypatch.setattr(accumulator_module, "SendHandle", make_handle)
    with pytest.raises(ClosedError):
        setup.quick().result()


def test_unwanted_open_batches_stay_open() -> None:
    setup = Setup()
    setup.append(target="a")
    setup.append(target="b")
    assert [batch.target for batch in setup.accumulator.take_open(lambda batch: batch.target == "b")] == ["b"]
    setup.append(b"y", target="a")
    assert [bodies_of(batch) for batch in setup.take()] == [[b"x", b"y"]]


def test_what_was_sealed_comes_before_what_was_open() -> None:
    setup = Setup(records_max=2)
    for body in (b"a", b"b", b"c"):
        setup.append(body)
    assert [bodies_of(batch) for batch in setup.take()] == [[b"a", b"b"], [b"c"]]
    assert setup.take() == []


def test_a_server_with_lower_limits_is_heeded() -> None:
    setup = Setup(records_max=4)
    setup.accumulator.tighten(batch_records_max=2, batch_bytes_max=1 << 20)
    for _ in range(4):
        setup.append()
    assert [len(bodies_of(batch)) for batch in setup.accumulator.take_sealed()] == [2, 2]


def test_open_batches_grow_no_further_when_a_server_has_lower_limits() -> None:
    setup = Setup(records_max=100)
    for _ in range(10):
        setup.quick()
    setup.accumulator.tighten(batch_records_max=100, batch_bytes_max=1 << 20)
    setup.quick()
    setup.accumulator.tighten(batch_records_max=12, batch_bytes_max=1 << 20)
    for _ in range(20):
        setup.quick()
    assert [len(bodies_of(batch)) for batch in setup.take()] == [11, 12, 8]


def test_compression_is_the_callers_work() -> None:
    setup = Setup(records_max=1, bytes_max=1 << 16, compress=True)
    setup.append(bytes(10_000))
    (batch,) = setup.accumulator.take_sealed()
    assert batch.records is None
    assert len(batch.encoded()) < 1_000
    assert bodies_of(batch) == [bytes(10_000)]


TEXT = st.text("abcö", min_size=1, max_size=4)
EXTRAS = st.none() | st.builds(
    Extras, st.none() | TEXT, st.lists(TEXT, max_size=2), st.none() | st.dictionaries(TEXT, TEXT, max_size=2), st.none() | TEXT
)


@given(st.lists(st.tuples(st.binary(max_size=20), EXTRAS, st.sampled_from(["quick", "append", "hurry", "take"])), max_size=60))
def test_what_goes_in_comes_out(steps: list[tuple[bytes, Extras | None, str]]) -> None:
    setup = Setup(records_max=11, bytes_max=900)
    handles, records, taken = [], [], []
    for body, extras, way in steps:
        if way == "take":
            taken += setup.take()
        elif way == "quick":
            records.append((body, None))
            handles.append(setup.quick(body))
        else:
            records.append((body, extras))
            handles.append(setup.append(body, extras=extras, timeout_ms=50 if way == "hurry" else 3000))
    messages = []
    for batch in [*taken, *setup.take()]:
        assert batch.record_count <= 11
        assert batch.size_bytes <= 900
        frame = batch.encoded()
        messages += decode_messages(open_batch(frame), frame, topic="meters", broker_name="b")
    none = Extras(None, (), None, None)
    assert [message.message_id for message in messages] == [handle.message_id for handle in handles]
    for message, (body, given_extras) in zip(messages, records, strict=True):
        extras = given_extras or none
        assert message.body == body
        assert (message.tag, list(message.keys), message.message_group) == (extras.tag, list(extras.keys), extras.message_group)
        assert message.properties == (extras.properties or {})


# --- exceptions of signal handlers ----------------------------------------------------------------------------------------


class Interrupted:
    """A caller that sends numbered records in every way, and a loop that takes what it was woken for."""

    def __init__(self) -> None:
        self.setup = Setup(records_max=6, buffer_bytes=2_000, bytes_max=450)
        self.handles: list[tuple[bytes, SendHandle]] = []
        self.bodies: dict[Batch, list[bytes]] = {}
        self._wakes_seen = 0
        self._is_ticking = False

    def send(self, number: int) -> None:
        body, setup = b"%d" % number, self.setup
        if number % 9 == 8:
            spans: list[Span] = []
            setup.accumulator.append_all([Run("meters", [body], [70], None), Run(QUEUE, [body], [70], None)], 3000, spans)
            self.handles += [(body, SendHandle(span.batch, span.first)) for span in spans]
        elif number % 7 == 6:
            self.handles.append((body, setup.append(body, extras=Extras("t"))))
        elif number % 4 == 3:
            self.handles.append((body, setup.append(body, QUEUE)))
        else:
            self.handles.append((body, setup.quick(body)))

    def turn(self, is_wanted: Callable[[Batch], bool]) -> None:
        """What the loop does when it was woken, and from then on until nothing is left."""
        if self.setup.wakes > self._wakes_seen or self._is_ticking:
            self._wakes_seen = self.setup.wakes
            for batch in [*self.setup.accumulator.take_sealed(), *self.setup.accumulator.take_open(is_wanted)]:
                self.bodies[batch] = bodies_of(batch)
                self.setup.accumulator.finish(batch, STORED)
            self._is_ticking = self.setup.accumulator.buffered_bytes > 0

    def check(self) -> None:
        """Every record with a handle was taken, once and in order; those without one at most once; and nothing is left."""
        assert not self.setup.accumulator._lock._is_owned()
        self.turn(lambda _: True)
        assert self.setup.accumulator.unfinished() == []
        assert self.setup.accumulator.buffered_bytes == 0
        assert all(self.bodies[handle.batch][handle.index] == body for body, handle in self.handles)
        for target in ("meters", QUEUE):
            numbers = [int(body) for batch, bodies in self.bodies.items() if batch.target == target for body in bodies]
            assert numbers == sorted(set(numbers))
        sequences = [batch.first_sequence + index for batch in self.bodies for index in range(batch.record_count)]
        assert len(set(sequences)) == len(sequences)
        assert all(batch.record_count <= 6 for batch in self.bodies)


def test_an_exception_anywhere_harms_no_other_record() -> None:
    """Ctrl-C at every place where Python may run a handler, while batches are opened, filled, sealed and refused room."""
    places = 0
    while True:
        case, interrupt = Interrupted(), Interrupt(places, accumulator_module, batch_module)
        for number in range(20):
            with interrupt.may_come(), suppress(BufferFullError):
                case.send(number)
            if number % 7 == 4:
                case.turn(lambda batch: batch.target == "meters")
            elif number % 7 == 1:
                case.turn(lambda _: True)
        case.check()
        if not interrupt.came:
            break
        places += 1
    assert places > 250


def test_a_send_in_the_middle_of_a_send_is_told_so_and_harms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler or finalizer that runs while its own thread holds the lock would wait for itself."""
    setup = Setup(records_max=100)
    filled = [setup.quick(target="other") for _ in range(10)]
    refused: list[Exception] = []

    def make_span(batch: Batch, first: int, count: int) -> Span:
        monkeypatch.undo()
        for call in (
            setup.append, lambda: setup.accumulator.append_all([Run("meters", [b"x"], [65], None)], 3000, []),
            setup.accumulator.unfinished, lambda: setup.accumulator.refuse(lambda: ClosedError("closed")),
            lambda: filled[0].add_done_callback(print),
        ):
            with pytest.raises(InvalidArgumentError, match="signal handler") as caught:
                call()
            refused.append(caught.value)
        filled.append(setup.quick(b"needs no lock", "other"))
        return Span(batch, first, count)

    monkeypatch.setattr(accumulator_module, "Span", make_span)
    handle = setup.append(b"outer")
    assert len(refused) == 5
    assert {batch.target: bodies_of(batch) for batch in setup.take()} == {
        "meters": [b"outer"], "other": [*[b"x"] * 10, b"needs no lock"]
    }
    assert (handle.index, filled[-1].index) == (0, 10)


def test_waiting_in_the_middle_of_a_send_for_that_send_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that flushes or closes while its thread is inside a filler: each would wait for the other."""
    setup = Setup(records_max=100, may_wait=lambda: True)
    handles = [setup.quick() for _ in range(10)]
    other = setup.append(target="other")

    def make_handle(batch: Batch, index: int) -> SendHandle:
        monkeypatch.undo()
        for call in (handles[0].result, lambda: setup.accumulator.refuse(lambda: ClosedError("closed"))):
            with pytest.raises(InvalidArgumentError, match="signal handler"):
                call()
        with pytest.raises(RequestTimeoutError):
            other.result(0)
        return SendHandle(batch, index)

    monkeypatch.setattr(accumulator_module, "SendHandle", make_handle)
    handles.append(setup.quick())
    setup.accumulator.refuse(lambda: ClosedError("closed"))
    assert sum(batch.record_count for batch in setup.take()) == 12


def test_a_batch_that_is_filled_up_in_the_middle_of_a_send_is_sealed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(records_max=10)
    for _ in range(9):
        setup.quick(target="other")
    last: list[SendHandle] = []

    def make_span(batch: Batch, first: int, count: int) -> Span:
        monkeypatch.undo()
        last.append(setup.quick(b"last", "other"))
        return Span(batch, first, count)

    monkeypatch.setattr(accumulator_module, "Span", make_span)
    setup.append()
    setup.quick(b"next", "other")
    batches = [bodies_of(batch) for batch in setup.take() if batch.target == "other"]
    assert batches == [[*[b"x"] * 9, b"last"], [b"next"]]
    assert last[0].index == 9


def test_an_exception_while_the_loop_is_told_is_made_good() -> None:
    setup = Setup()
    wake = setup.accumulator.wake

    def raise_once() -> None:
        setup.accumulator.wake = wake
        raise KeyboardInterrupt

    setup.accumulator.wake = raise_once
    with pytest.raises(KeyboardInterrupt):
        setup.append(b"in")
    assert setup.wakes > 0
    assert [bodies_of(batch) for batch in setup.take()] == [[b"in"]]


def test_an_exception_while_a_thread_waits_for_room_leaves_the_lock_alone() -> None:
    setup = Setup(buffer_bytes=100, block_when_full=True)
    setup.append()

    class Waiting:
        """A lock whose waiter is interrupted while somebody else has the accumulator's lock."""

        def __init__(self) -> None:
            self.is_taken = False

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            if self.is_taken:
                other.start()
                assert is_held.wait(30)
                raise KeyboardInterrupt
            self.is_taken = True
            return True

        def release(self) -> None:
            self.is_taken = False

    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with setup.accumulator._lock:
            is_held.set()
            is_over.wait(30)

    other = threading.Thread(target=hold)
    setup.accumulator._new_lock = Waiting  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        setup.append()
    is_over.set()
    other.join(30)
    setup.accumulator.finish(setup.take()[0], STORED)
    assert setup.accumulator.buffered_bytes == 0


# --- waking the loop ------------------------------------------------------------------------------------------------------


def test_the_loop_is_woken_once_per_batch_and_not_per_message() -> None:
    setup = Setup(records_max=10)
    for _ in range(9):
        setup.append()
    assert setup.wakes == 1
    setup.append()
    assert setup.wakes == 2  # it is full


def test_somebody_who_waits_ends_the_lingering() -> None:
    setup = Setup(linger_ms=1000)
    handle = setup.append()
    assert not setup.accumulator.is_pressed
    with pytest.raises(RequestTimeoutError):
        handle.result(timeout_ms=0)
    assert setup.accumulator.is_pressed
    assert setup.wakes == 2


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_a_full_buffer_raises_when_it_may_not_block() -> None:
    setup = Setup(buffer_bytes=200)
    setup.append()
    setup.append()
    setup.append()
    with pytest.raises(BufferFullError) as caught:
        setup.append(bytes(64))
    assert caught.value.facts == {"buffered_bytes": 195, "buffer_bytes": 200}
    setup.accumulator.finish(setup.take()[0], STORED)
    setup.append(bytes(64))
    assert setup.accumulator.buffered_bytes == 128


def test_room_that_open_batches_do_not_use_is_there_for_others() -> None:
    setup = Setup(buffer_bytes=6_000, bytes_max=1_000, records_max=100)
    for target in ("a", "b", "c"):
        for _ in range(FILLER_FROM):
            setup.quick(b"", target)
    assert setup.accumulator.buffered_bytes == 3_000, "each may have a whole batch"
    with pytest.raises(BufferFullError):
        for _ in range(1_000):
            setup.quick(b"", "d")
    count = sum(batch.message_count for batch in setup.accumulator.unfinished())
    assert count == 6_000 // RECORD_OVERHEAD_BYTES


def test_empty_bodies_count_too() -> None:
    setup = Setup(buffer_bytes=10 * RECORD_OVERHEAD_BYTES)
    for _ in range(10):
        setup.append(b"")
    with pytest.raises(BufferFullError):
        setup.append(b"")


def test_a_record_larger_than_the_buffer_goes_alone() -> None:
    setup = Setup(buffer_bytes=100)
    setup.append(bytes(1000))
    with pytest.raises(BufferFullError):
        setup.append(b"x")


def test_a_full_buffer_blocks_until_there_is_room() -> None:
    setup = Setup(buffer_bytes=100, block_when_full=True)
    setup.append()
    done = threading.Event()

    def blocked() -> None:
        setup.append(b"late", timeout_ms=60_000)
        done.set()

    thread = threading.Thread(target=blocked)
    thread.start()
    wait_until(lambda: setup.accumulator.is_pressed)
    assert not done.is_set()
    setup.accumulator.finish(setup.take()[0], STORED)
    assert done.wait(30)
    thread.join()
    assert [bodies_of(batch) for batch in setup.take()] == [[b"late"]]


def test_blocking_ends_at_the_timeout() -> None:
    setup = Setup(buffer_bytes=100, block_when_full=True)
    setup.append()
    with pytest.raises(BufferFullError, match="buffer_bytes"):
        setup.append(timeout_ms=0)


def test_a_callback_never_blocks_on_a_full_buffer() -> None:
    setup = Setup(buffer_bytes=100, block_when_full=True, may_wait=lambda: False)
    setup.append()
    with pytest.raises(BufferFullError):
        setup.append(timeout_ms=60_000)


@pytest.mark.parametrize("block_when_full", [True, False])
def test_room_that_a_batch_in_use_was_granted_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, block_when_full: bool
) -> None:
    """Most of a full buffer is granted to a batch with a thread that is, at that moment, inside its filler."""
    setup = Setup(buffer_bytes=4_000, bytes_max=1_000, records_max=100, block_when_full=block_when_full)
    done: list[SendHandle | BufferFullError] = []

    def send() -> None:
        try:
            done.append(setup.append(bytes(200), "other", timeout_ms=60_000))
        except BufferFullError as error:
            done.append(error)

    thread = threading.Thread(target=send)

    for _ in range(FILLER_FROM):
        setup.quick(b"", "roomy")
    for number in range(3):
        setup.append(bytes(900), f"large{number}")

    def make_handle(batch: Batch, index: int) -> SendHandle:
        monkeypatch.undo()
        thread.start()
        wait_until(lambda: bool(done) or setup.accumulator.is_pressed)
        return SendHandle(batch, index)

    monkeypatch.setattr(accumulator_module, "SendHandle", make_handle)
    setup.quick(b"", "roomy")
    setup.accumulator.take_sealed()  # what the loop does, and nothing is finished
    thread.join(30)
    assert [type(each) for each in done] == [SendHandle]


SIZES = st.integers(0, 30) | st.integers(0, 300)


@given(st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), max_size=120), st.sampled_from([1_000, 6_000, 16_000]))
def test_memory_is_bounded_and_comes_back(steps: list[tuple[int, bool, bool]], buffer_bytes: int) -> None:
    setup = Setup(buffer_bytes=buffer_bytes, bytes_max=1_000, records_max=100)
    live: list[Batch] = []
    unfinished_bytes = 0
    for size, is_finished, is_other in steps:
        size_bytes = size + RECORD_OVERHEAD_BYTES
        try:
            setup.quick(bytes(size), "alarms" if is_other else "meters")
            unfinished_bytes += size_bytes
        except BufferFullError:
            assert unfinished_bytes + size_bytes > buffer_bytes, "what is granted and not used is no reason to refuse"
        assert unfinished_bytes <= setup.accumulator.buffered_bytes <= buffer_bytes
        sealed = setup.accumulator.take_sealed()
        for batch in sealed:
            assert batch.size_bytes == sum(len(body) + RECORD_OVERHEAD_BYTES for body in bodies_of(batch)) <= 1_000
        live += sealed
        if is_finished and live:
            unfinished_bytes -= live[0].size_bytes
            setup.accumulator.finish(live.pop(0), STORED)
    for batch in [*live, *setup.take()]:
        setup.accumulator.finish(batch, STORED)
    assert setup.accumulator.buffered_bytes == 0
    assert setup.accumulator.unfinished() == []


def test_a_finished_batch_keeps_no_bytes() -> None:
    setup = Setup()
    setup.append(bytes(100), extras=Extras("t", (), None, None))
    (batch,) = setup.take()
    batch.encoded()
    setup.accumulator.finish(batch, STORED)
    assert (batch.bodies, batch.extras, batch.records, batch.frame, batch.message_count) == ([], None, None, b"", 1)


# --- handles --------------------------------------------------------------------------------------------------------------


def test_a_receipt_is_made_from_the_batch_and_the_index() -> None:
    setup = Setup()
    handles = [setup.append() for _ in range(3)]
    assert not handles[2].done()
    setup.accumulator.finish(setup.take()[0], STORED)
    assert handles[2].done()
    receipt = handles[2].result()
    assert (receipt.topic, receipt.broker_name, receipt.queue_id, receipt.queue_offset) == ("meters", "broker-a", 3, 102)
    assert (receipt.message_id, receipt.store_timestamp_ms) == (handles[2].message_id, STORED.store_timestamp_ms)
    assert (receipt.durability, receipt.duplicate) == (FlushMode.SYNC, False)


def test_each_handle_raises_an_error_of_its_own() -> None:
    setup = Setup()
    handles = [setup.append() for _ in range(2)]
    setup.accumulator.finish(setup.take()[0], DiskFullError("The disk of broker-a is full.", topic="meters"))
    raised: list[ZrmqError] = []
    for handle in handles:
        with pytest.raises(DiskFullError, match="is full") as caught:
            handle.result()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert raised[0].facts == {"topic": "meters"}
    assert raised[0].code is DiskFullError.code


def test_a_result_can_be_waited_for_in_other_threads() -> None:
    setup = Setup()
    handle = setup.append()
    offsets: list[int] = []
    threads = [threading.Thread(target=lambda: offsets.append(handle.result(60_000).queue_offset)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(handle.batch.waiters) == 3)
    setup.accumulator.finish(setup.take()[0], STORED)
    for thread in threads:
        thread.join(30)
    assert offsets == [100, 100, 100]


@pytest.mark.parametrize("timeout_ms", ["x", float("nan"), b"1", -1, True, float("inf")])
def test_what_cannot_be_waited_is_refused(timeout_ms: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="wait for 0 or more"):
        Setup().append().result(timeout_ms)


@pytest.mark.parametrize("callback", [5, None, "print"])
def test_what_cannot_be_called_is_no_callback(callback: Any) -> None:
    setup = Setup()
    handle = setup.append()
    with pytest.raises(InvalidArgumentError, match="cannot be called; give a function of one handle"):
        handle.add_done_callback(callback)
    setup.accumulator.finish(setup.take()[0], STORED)
    assert handle.result().queue_offset == 100


def test_waiting_too_short_is_not_the_end() -> None:
    setup = Setup()
    handle = setup.append()
    with pytest.raises(RequestTimeoutError, match="still on its way"):
        handle.result(timeout_ms=1)
    setup.accumulator.finish(setup.take()[0], STORED)
    assert handle.result(timeout_ms=1).queue_offset == 100


def test_waiting_in_a_callback_is_refused() -> None:
    setup = Setup(may_wait=lambda: False)
    handle = setup.append()
    with pytest.raises(InvalidArgumentError, match="callback"):
        handle.result()
    setup.accumulator.finish(setup.take()[0], STORED)
    assert handle.result().queue_offset == 100  # nothing to wait for


def test_callbacks_run_once_when_the_batch_is_done() -> None:
    setup = Setup()
    handles = [setup.append() for _ in range(2)]
    called: list[tuple[SendHandle, bool]] = []
    for handle in handles:
        handle.add_done_callback(lambda done: called.append((done, done.done())))
    assert called == []
    setup.accumulator.finish(setup.take()[0], STORED)
    assert called == [(handles[0], True), (handles[1], True)]


def test_a_late_callback_runs_at_once() -> None:
    setup = Setup()
    handle = setup.append()
    setup.accumulator.finish(setup.take()[0], ClosedError("closed"))
    called: list[SendHandle] = []
    handle.add_done_callback(called.append)
    assert called == [handle]


def test_a_callback_that_raises_is_logged_and_harms_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup()
    handle = setup.append()
    called: list[SendHandle] = []
    handle.add_done_callback(lambda done: 1 // 0)  # type: ignore[arg-type]
    handle.add_done_callback(called.append)
    setup.accumulator.finish(setup.take()[0], STORED)
    assert called == [handle]
    assert "done_callback_failed" in capsys.readouterr().err


def test_a_callback_may_send() -> None:
    setup = Setup()
    handle = setup.append()

    def send_on(done: SendHandle) -> None:
        setup.append(b"next")

    handle.add_done_callback(send_on)
    setup.accumulator.finish(setup.take()[0], STORED)
    assert [bodies_of(batch) for batch in setup.take()] == [[b"next"]]


# --- what is on its way ---------------------------------------------------------------------------------------------------


def test_a_topic_is_idle_when_nothing_of_it_is_left() -> None:
    setup = Setup()
    assert setup.accumulator.is_idle("meters")
    setup.append(target=QUEUE)
    assert not setup.accumulator.is_idle("meters")
    assert setup.accumulator.is_idle("alarms")
    setup.accumulator.finish(setup.take()[0], STORED)
    assert setup.accumulator.is_idle("meters")


def test_refusing_lets_out_what_is_here_and_nothing_new_in() -> None:
    setup = Setup()
    handle = setup.append(b"last")
    setup.accumulator.refuse(lambda: ClosedError("The producer is closed."))
    with pytest.raises(ClosedError):
        setup.append()
    assert [bodies_of(batch) for batch in setup.accumulator.take_sealed()] == [[b"last"]]
    assert not handle.done()


def test_refusing_ends_the_wait_for_room() -> None:
    setup = Setup(buffer_bytes=100, block_when_full=True)
    setup.append()
    raised: list[BaseException] = []

    def blocked() -> None:
        try:
            setup.append(timeout_ms=60_000)
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=blocked)
    thread.start()
    wait_until(lambda: setup.accumulator.is_pressed)
    setup.accumulator.refuse(lambda: ClosedError("The producer is closed."))
    thread.join(30)
    assert len(raised) == 1


def test_a_child_process_gets_the_error_even_if_the_lock_was_taken() -> None:
    setup = Setup()
    setup.append()
    setup.accumulator._lock.acquire()
    setup.accumulator.abandon_in_child(lambda: ClosedError("forked"))
    with pytest.raises(ClosedError, match="forked"):
        setup.append()


def test_many_threads_fill_batches_that_hold_every_record_once_and_each_threads_in_order() -> None:
    setup = Setup(records_max=50, buffer_bytes=1 << 24)
    count, thread_count = 2_000, 4
    taken: list[Batch] = []

    def fill(name: int) -> None:
        for number in range(count):
            setup.quick(b"%d %d" % (name, number), QUEUE)

    threads = [threading.Thread(target=fill, args=(name,)) for name in range(thread_count)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken += setup.accumulator.take_sealed()
        taken += setup.accumulator.take_open(lambda batch: len(batch.bodies) > 20)
    taken += setup.take()
    records = [tuple(map(int, body.split())) for batch in taken for body in bodies_of(batch)]
    assert len(records) == count * thread_count
    for name in range(thread_count):
        assert [number for who, number in records if who == name] == list(range(count))


def wait_until(condition: Callable[[], bool]) -> None:
    """Another thread gets there; the test's own time limit is the bound."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)
