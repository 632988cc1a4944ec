"""zrmq broken on purpose, one promise at a time: what the simulator's checkers have to notice."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

import msgspec
import pytest

from zrmq.client import link, producing, reading
from zrmq.client.accumulator import Accumulator
from zrmq.client.batch import Span
from zrmq.client.claiming import LeaseClaims, OffsetClaims
from zrmq.client.committing import Committer
from zrmq.client.consuming import ConsumerCore
from zrmq.client.cursor import Cursor
from zrmq.client.inbox import Inbox
from zrmq.client.lanes import Lanes
from zrmq.client.process_queue import ProcessQueue
from zrmq.client.producing import ProducerCore
from zrmq.errors import Code, RequestRefusedError, UnreachableError, ZrmqError
from zrmq.message import ConsumeFrom, FlushMode, MessageQueue
from zrmq.protocol.events import BrokerStarted, GroupSubscribed, LeaseGranted, OffsetsCommitted, TopicPut
from zrmq.protocol.requests import Committed, Hello, Leased, Offsets
from zrmq.serving.context import Context
from zrmq.serving.core import BrokerCore
from zrmq.serving.groups import GroupDesk
from zrmq.serving.leases import LeaseDesk
from zrmq.serving.offsets import OffsetDesk
from zrmq.serving.outbox import Outbox
from zrmq.serving.pulling import HeldPull, Pulling
from zrmq.serving.sending import Sending
from zrmq.store import checkpoint, maintenance, recovery, relocation, retention, segment, store
from zrmq.store import reading as reading_store
from zrmq.store.checkpoint import Checkpoint
from zrmq.store.commit_log import CommitLog, LogFlush
from zrmq.store.consume_queue import ConsumeQueue, Shelf
from zrmq.store.relocation import Relocation
from zrmq.store.segment import EntryReader, Found
from zrmq.store.store import Store
from zrmq.store.tables import Tables
from zrmq.testing.simulation import consumers
from zrmq.testing.simulation.plan import TopicPlan
from zrmq.testing.simulation.work import CallPlan, PullPlan, ReaderPlan, RetentionPlan, WorkPlan
from zrmq.transport.lane import Lane
from zrmq.transport.sessions import SessionTable

Patch = pytest.MonkeyPatch
Break = Callable[[Patch], None]


class Variant(NamedTuple):
    """One way to be wrong, and the checkers that may find it."""

    name: str
    break_it: Break
    kinds: set[str]
    focus: dict[str, Any] = {}  # noqa: RUF012 - of the plan: makes what is rare in the crowd of faults common


def acknowledge_before_flush(patch: Patch) -> None:
    patch.setattr(Outbox, "after_flush", lambda self, position, peer, reply: self.now(peer, reply))


def show_before_flush(patch: Patch) -> None:
    write = Store.write

    def hasty(self: Store) -> None:
        write(self)
        for queue, offset in self._awaiting.items():
            self._show(queue, offset)

    patch.setattr(Store, "write", hasty)


def keep_pulls_of_ended_sessions(patch: Patch) -> None:
    patch.setattr(Pulling, "drop", lambda self, session: None)


def grant_what_is_held(patch: Patch) -> None:
    patch.setattr(LeaseDesk, "_wait", lambda self, key, session, request, queue: self._grant(key, session, request, queue))


def do_not_log_leases(patch: Patch) -> None:
    append = Store.append_event

    def forget(self: Store, event: Any) -> int:
        if isinstance(event, LeaseGranted):
            self._views.apply_event(event)
            return self.appended_position
        return append(self, event)

    patch.setattr(Store, "append_event", forget)


def forget_leases_at_restart(patch: Patch) -> None:
    start = LeaseDesk.__init__

    def forgetful(self: LeaseDesk, context: Any, *others: Any) -> None:
        start(self, context, *others)
        for group, client_id in list(self._absent):
            self.release_all(group, client_id)

    patch.setattr(LeaseDesk, "__init__", forgetful)


def end_sessions_early(patch: Patch) -> None:
    start = SessionTable.__init__

    def hasty(self: SessionTable, now_ms: float, **options: Any) -> None:
        start(self, now_ms, **options)
        self.session_timeout_ms *= 0.2

    patch.setattr(SessionTable, "__init__", hasty)


def trust_leases_for_ever(patch: Patch) -> None:
    patch.setattr(reading, "lease_ends_ms", lambda link: inf)


def trust_leases_to_the_end(patch: Patch) -> None:
    """As long as the broker keeps them, if only its clock runs no faster than the member's."""
    for module in (link, reading):
        patch.setattr(module, "LEASE_MARGIN", 1.0)


def do_not_wait_for_what_is_in_flight(patch: Patch) -> None:
    drain = Inbox.drain

    def hasty(self: Inbox, queue: ProcessQueue) -> bool:
        drain(self, queue)
        return True

    patch.setattr(Inbox, "drain", hasty)


def commit_before_the_listener(patch: Patch) -> None:
    patch.setattr(ProcessQueue, "commit_offset", property(lambda self: self.position))


def begin_where_it_is_convenient(patch: Patch) -> None:
    patch.setattr(GroupDesk, "_start", lambda self, queue, request, told_ms: queue.next_offset)


def begin_late_at_other_brokers(patch: Patch) -> None:
    start = GroupDesk._start

    patch.setattr(GroupDesk, "_start", lambda self, queue, request, told_ms: start(self, queue, request, 0))


def ask_for_one_tag_only(patch: Patch) -> None:
    mask = reading.filter_mask
    patch.setattr(reading, "filter_mask", lambda expression: mask(expression.partition("||")[0]))


def recognise_no_duplicate(patch: Patch) -> None:
    patch.setattr(Tables, "find_duplicate", lambda self, *key: None)


def check_no_predecessor(patch: Patch) -> None:
    patch.setattr(Tables, "has_stored", lambda self, *key: True)


def go_back_to_a_broker_that_may_have_it(patch: Patch) -> None:
    usable = ProducerCore._usable
    patch.setattr(ProducerCore, "_usable", lambda self, topic, avoid, now_ms: usable(self, topic, frozenset(), now_ms))


class Anything(int):
    """A checksum that is always right."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def check_no_crc_in_recovery(patch: Patch) -> None:
    patch.setattr(segment, "crc32", lambda *data: Anything(crc32(*data)))


def save_views_before_the_log(patch: Patch) -> None:
    start = Checkpoint.__init__

    def hasty(self: Checkpoint, *parts: Any) -> None:
        start(self, *parts)
        self.position = 0

    patch.setattr(Checkpoint, "__init__", hasty)


def save_no_windows(patch: Patch) -> None:
    patch.setattr(checkpoint, "_window_rows", lambda tables, saved_position: [])


def save_offsets_once_only(patch: Patch) -> None:
    rows = checkpoint._offset_rows
    patch.setattr(checkpoint, "_offset_rows", lambda tables, changed: rows(tables, changed)[:1])


def flush_no_folder(patch: Patch) -> None:
    begin = CommitLog.begin_flush

    def lazy(self: CommitLog, *parts: Any) -> LogFlush:
        self._is_folder_unsynced = False
        return begin(self, *parts)

    patch.setattr(CommitLog, "begin_flush", lazy)


def flush_the_newest_segment_only(patch: Patch) -> None:
    start = LogFlush.__init__

    def lazy(self: LogFlush, *parts: Any) -> None:
        start(self, *parts)
        self._files = self._files[-1:]

    patch.setattr(LogFlush, "__init__", lazy)


def flush_nothing(patch: Patch) -> None:
    patch.setattr(LogFlush, "work", lambda self: None)


def lose_commits_in_replay(patch: Patch) -> None:
    fold = recovery.Replay._fold_event
    decode = recovery.decode_event

    def forgetful(self: Any, found: Any) -> None:
        payload = memoryview(found.block)[found.at + 40 : found.at + found.header.length]
        if not isinstance(decode(payload), OffsetsCommitted):
            fold(self, found)

    patch.setattr(recovery.Replay, "_fold_event", forgetful)


def delete_what_was_not_said_again(patch: Patch) -> None:
    patch.setattr(Relocation, "reaches", lambda self, position: True)


def say_no_offsets_again(patch: Patch) -> None:
    statements = relocation._group_statements

    def forgetful(group: Any) -> Any:
        return (event for event in statements(group) if not (isinstance(event, OffsetsCommitted) and event.offsets))

    patch.setattr(relocation, "_group_statements", forgetful)


def delete_before_it_expires(patch: Patch) -> None:
    patch.setattr(retention, "_is_share_expired", lambda *parts: True)


def delete_what_is_not_saved(patch: Patch) -> None:
    count = maintenance.expired_count

    def hasty(segments: Any, topics: Any, *, saved_position: int, **bounds: Any) -> int:
        return count(segments, topics, saved_position=1 << 62, **bounds)

    patch.setattr(maintenance, "expired_count", hasty)


def trim_too_much(patch: Patch) -> None:
    begin = ConsumeQueue._begin_with
    patch.setattr(ConsumeQueue, "_begin_with", lambda self, first: begin(self, min(first + 1, self.end)))


def never_trim(patch: Patch) -> None:
    patch.setattr(ConsumeQueue, "trim", lambda self, log_start: None)


def skip_what_follows_the_deleted(patch: Patch) -> None:
    tell = LeaseDesk._tell

    def hasty(self: LeaseDesk, session: Any, request: Any, queue: Any, lease: Any) -> None:
        before, queue.min_offset = queue.min_offset, min(queue.min_offset + 2 * bool(queue.min_offset), queue.next_offset)
        tell(self, session, request, queue, lease)
        queue.min_offset = before

    patch.setattr(LeaseDesk, "_tell", hasty)


def seek_one_too_far(patch: Patch) -> None:
    begin = reading.Reader.begin_anew
    patch.setattr(reading.Reader, "begin_anew", lambda self, old, offset: begin(self, old, offset + 1))


def stay_one_too_far(patch: Patch) -> None:
    waits = Pulling._is_waiting

    def hasty(self: Pulling, held: HeldPull) -> bool:
        before = held.bytes_left
        is_waiting = waits(self, held)
        held.offset += is_waiting and held.bytes_left < before
        return is_waiting

    patch.setattr(Pulling, "_is_waiting", hasty)


def do_not_tell_that_a_seek_goes_back(patch: Patch) -> None:
    begin = reading.Reader.begin_anew

    def forgetful(self: Any, old: Any, offset: int) -> Any:
        anew = begin(self, old, offset)
        anew.goes_back = False
        return anew

    patch.setattr(reading.Reader, "begin_anew", forgetful)


def always_reset(patch: Patch) -> None:
    patch.setattr(OffsetDesk, "_target", lambda self, session, instance, queue, asked, reset: asked.offset // 2)


def finish_what_is_being_given(patch: Patch) -> None:
    patch.setattr(Cursor, "settle", Cursor.finish_given)


def go_on_where_it_was_after_a_seek_back(patch: Patch) -> None:
    begin_anew = reading.Reader.begin_anew
    patch.setattr(reading.Reader, "begin_anew", lambda self, old, offset: (
        begin_anew(self, old, max(offset, old.process_queue.position))
    ))


def settle_what_a_poll_took(patch: Patch) -> None:
    take_rest = Cursor.take_rest

    def hasty(self: Cursor, messages_max: int) -> Any:
        taken = take_rest(self, messages_max)
        self.index += max(len(taken) - 1, 0)
        return taken

    patch.setattr(Cursor, "take_rest", hasty)


def say_that_a_commit_is_done_before_its_flush(patch: Patch) -> None:
    def hasty(self: Context, session: Any, reply: Any) -> None:
        if isinstance(reply, Committed):
            self.outbox.now(session.peer, reply)
        else:
            self.outbox.after_flush(self.store.appended_position, session.peer, reply)

    patch.setattr(Context, "reply_when_safe", hasty)


def say_at_once_that_a_commit_is_done(patch: Patch) -> None:
    commit = Committer.commit

    def hasty(self: Committer, readings: Any, on_done: Any, timeout_ms: int) -> None:
        commit(self, readings, lambda error: None, timeout_ms)
        on_done(None)

    patch.setattr(Committer, "commit", hasty)


def save_no_changes_of_topics(patch: Patch) -> None:
    apply = Store.append_event

    def forgetful(self: Store, event: Any) -> int:
        if isinstance(event, TopicPut) and event.topic_id in self.tables.topics_by_id and self.boot:
            return self.appended_position
        return apply(self, event)

    patch.setattr(Store, "append_event", forgetful)


def forget_the_longer_session_timeout(patch: Patch) -> None:
    start = LeaseDesk.__init__

    def forgetful(self: LeaseDesk, context: Any, *others: Any) -> None:
        start(self, context, *others)
        self._grace_ends_ms = context.clock.monotonic_ms() + context.config.session_timeout_ms
        self._absent = dict.fromkeys(self._absent, self._grace_ends_ms)

    patch.setattr(LeaseDesk, "__init__", forgetful)


def rebuild_views_of_messages_only(patch: Patch) -> None:
    fold = recovery.Replay._fold_event

    def forgetful(self: Any, found: Any) -> None:
        if not self._is_anew or isinstance(recovery._decode(found), TopicPut | BrokerStarted):
            fold(self, found)

    start = recovery.Replay.__init__

    def note(self: Any, commit_log: Any, views: Any, topics: Any, flushed: int) -> None:
        start(self, commit_log, views, topics, flushed)
        self._is_anew = not flushed

    patch.setattr(recovery.Replay, "__init__", note)
    patch.setattr(recovery.Replay, "_fold_event", forgetful)


def take_no_notice_of_missing_queue_files(patch: Patch) -> None:
    patch.setattr(ConsumeQueue, "has_files", lambda self: True)


def make_short_queue_files_do(patch: Patch) -> None:
    """A queue whose file is gone begins with what is in memory."""

    def forgetful(self: ConsumeQueue) -> bool:
        if self.first < self.filed and not self.shelf.has(self.folder, self.first, self.filed):
            self.first = self.filed
            self._begin_with(self.first)
        return True

    patch.setattr(ConsumeQueue, "has_files", forgetful)


def believe_the_page_cache_of_the_last_run(patch: Patch) -> None:
    patch.setattr(CommitLog, "rewrite", lambda self, position, end: None)


def move_the_saved_position_in_recovery(patch: Patch) -> None:
    """Once more over the same log is not the same: the power goes, and what was replayed is not replayed again."""
    recover = store.recover

    def hasty(commit_log: CommitLog, views: Any, database: Any) -> Any:
        report = recover(commit_log, views, database)
        update = "update meta set value = ? where name = 'applied_position'"
        database._transact(lambda connection: connection.execute(update, (report.end_position,)))
        return report

    patch.setattr(store, "recover", hasty)


def skip_damage_silently(patch: Patch) -> None:
    patch.setattr(recovery.Replay, "_report", lambda self, found: None)


def serve_what_is_there(patch: Patch) -> None:
    patch.setattr(reading_store, "batch_checks_out", lambda data, at, queue, entry: True)


def tell_nobody_of_damage_that_is_read(patch: Patch) -> None:
    patch.setattr(Store, "_damage_found", lambda self, stretch: None)


def end_the_log_at_the_first_damage(patch: Patch) -> None:
    def hasty(self: Any, position: int) -> int:
        for found in self._log.scan(position):
            if not found.is_whole:
                return int(found.position)
            self._fold(found)
        return int(self._log.segments[-1].end)

    patch.setattr(recovery.Replay, "run", hasty)


def skip_the_rest_of_a_damaged_segment(patch: Patch) -> None:
    def hasty(self: EntryReader, position: int) -> Found:
        return Found(position, self._end, None, b"", 0, False)

    patch.setattr(EntryReader, "gap", hasty)


def hear_whom_a_new_connection_replaced(patch: Patch) -> None:
    """A client is known by every connection it ever had."""
    dispatch = BrokerCore._dispatch
    clients: dict[tuple[BrokerCore, bytes], str] = {}

    def credulous(self: BrokerCore, peer: bytes, request: Any, frames: list[bytes]) -> None:
        if type(request) is not Hello:
            known = self.sessions.by_client(clients.get((self, peer), ""))
            peer = known.peer if known is not None else peer
        dispatch(self, peer, request, frames)
        session = self.sessions.by_peer(peer)
        if session is not None:
            clients[self, peer] = session.client_id

    patch.setattr(BrokerCore, "_dispatch", credulous)


def believe_an_entry_wherever_it_stands(patch: Patch) -> None:
    peek = segment.peek_header

    def credulous(block: bytes, at: int) -> Any:
        header = peek(block, at)
        return header if header is None else header._replace(position=Anything(header.position))

    patch.setattr(segment, "peek_header", credulous)


def count_starts_by_what_is_left(patch: Patch) -> None:
    patch.setattr(Store, "_next_boot", lambda self: self.tables.boot + 1)


def do_not_commit_assigned_queues_at_close(patch: Patch) -> None:
    close = ConsumerCore.close

    def hasty(self: Any, on_closed: Callable[[], None], timeout_ms: int) -> None:
        if not self._config.is_assigned:
            close(self, on_closed, timeout_ms)
            return
        self._stop()
        on_closed()

    patch.setattr(ConsumerCore, "close", hasty)


def go_on_behind_what_was_got(patch: Patch) -> None:
    lose = OffsetClaims.lose
    patch.setattr(OffsetClaims, "lose", lambda self, reading, offset, error: lose(self, reading, offset + 1, error))


def forget_where_a_reader_left_off(patch: Patch) -> None:
    patch.setattr(OffsetClaims, "lose", lambda self, reading, offset, error: None)


def forget_where_a_reader_let_go(patch: Patch) -> None:
    let_go = OffsetClaims.let_go

    def forgetful(self: OffsetClaims, *parts: Any) -> None:
        let_go(self, *parts)
        self.left_off.clear()

    patch.setattr(OffsetClaims, "let_go", forgetful)


def ask_no_group_where_it_stands(patch: Patch) -> None:
    start = OffsetClaims.__init__

    def hasty(self: OffsetClaims, listener: Any, **told: Any) -> None:
        start(self, listener, **told)
        self._has_group = self._has_group and not listener._config.is_assigned

    patch.setattr(OffsetClaims, "__init__", hasty)


def read_a_topic_made_anew_from_where_it_is_told(patch: Patch) -> None:
    find = OffsetClaims._find

    def hasty(self: OffsetClaims, *parts: Any) -> None:
        self._emptied.clear()
        find(self, *parts)

    patch.setattr(OffsetClaims, "_find", hasty)


def go_on_in_a_topic_made_anew(patch: Patch) -> None:
    """Where it was in the former one."""
    claim = OffsetClaims.claim

    def hasty(self: OffsetClaims, queues: Any) -> None:
        self.left_off = {queue: left._replace(topic_id=0) for queue, left in self.left_off.items()}
        claim(self, queues)

    patch.setattr(OffsetClaims, "claim", hasty)


def overtake_by_a_lane(patch: Patch) -> None:
    patch.setattr(Accumulator, "is_idle", lambda self, topic: True)


def send_again_what_a_lane_lost(patch: Patch) -> None:
    send = Lanes.send

    def hasty(self: Lanes, *parts: Any) -> Any:
        try:
            return send(self, *parts)
        except ZrmqError:
            return None  # as if no lane had been free

    patch.setattr(Lanes, "send", hasty)


def hand_over_what_a_lane_sent_as_unsent(patch: Patch) -> None:
    adopt = ProducerCore.adopt

    def hasty(self: ProducerCore, batch: Any, queue: MessageQueue, error: ZrmqError) -> None:
        adopt(self, batch, queue, UnreachableError("It was never sent."))
        batch.may_be_stored, batch.sent_ms = False, 0.0

    patch.setattr(ProducerCore, "adopt", hasty)


def take_any_answer_of_a_lane(patch: Patch) -> None:
    decode = Lane._decode

    def hasty(self: Lane, frames: list[bytes]) -> Any:
        reply = decode(self, frames)
        return None if reply is None else msgspec.structs.replace(reply, number=self._number)

    patch.setattr(Lane, "_decode", hasty)


def call_unsent_what_a_lane_heard_nothing_of(patch: Patch) -> None:
    error = Lane._timeout_error
    patch.setattr(Lane, "_timeout_error", lambda self, kind, timeout_ms, was_sent: error(self, kind, timeout_ms, False))


def forget_the_rest_of_a_list(patch: Patch) -> None:
    """That did not go into the first batch."""
    append_all = Accumulator.append_all

    def hasty(self: Accumulator, runs: Any, timeout_ms: int, spans: list[Span]) -> None:
        append_all(self, runs, timeout_ms, spans)
        spans[:] = [Span(spans[0].batch, spans[0].first, sum(span.count for span in spans))]

    patch.setattr(Accumulator, "append_all", hasty)


def begin_where_a_queue_begins(patch: Patch) -> None:
    patch.setattr(LeaseDesk, "_tell", lambda self, session, request, queue, lease: (
        self._context.reply_when_safe(session, Leased(request.number, lease.lease_epoch, queue.min_offset))
    ))


def forget_where_an_instance_stands(patch: Patch) -> None:
    committed = OffsetClaims._committed

    def forgetful(self: OffsetClaims, wanted: Any, link: Any, reply: Any, frames: Any) -> None:
        self._consume_from = ConsumeFrom.EARLIEST
        told = msgspec.structs.replace(reply, offsets=[]) if isinstance(reply, Offsets) else reply
        committed(self, wanted, link, told, frames)

    patch.setattr(OffsetClaims, "_committed", forgetful)


def subscribe_anew_when_nobody_is_there(patch: Patch) -> None:
    subscribe = GroupDesk._subscribe

    def forgetful(self: GroupDesk, group: str, instance_name: str, topic_name: str, request: Any, told_ms: int) -> int:
        topic = self._context.store.tables.topics.get(topic_name)
        if group in self._live or topic is None:
            return subscribe(self, group, instance_name, topic_name, request, told_ms)
        starts = [(queue.queue_id, self._start(queue, request, told_ms)) for queue in topic.queues]
        since_ms = told_ms or self._context.clock.time_ms()
        self._context.place(GroupSubscribed(group, topic_name, since_ms, starts, instance_name))
        return since_ms

    patch.setattr(GroupDesk, "_subscribe", forgetful)


def let_several_work_on_a_queue_in_order(patch: Patch) -> None:
    patch.setattr(Inbox, "_in_order", property(lambda self: False, lambda self, value: None), raising=False)


def go_on_behind_what_failed(patch: Patch) -> None:
    run = consumers.run_unit
    patch.setattr(consumers, "run_unit", lambda *parts, in_order: run(*parts, in_order=False))


def send_to_another_queue(patch: Patch) -> None:
    take = ProducerCore._take

    def hasty(self: ProducerCore, batches: Any) -> None:
        for batch in batches:
            if isinstance(batch.target, MessageQueue):
                self._line(MessageQueue(batch.target.topic, batch.target.broker_name, 0)).add(batch)
            else:
                take(self, [batch])

    patch.setattr(ProducerCore, "_take", hasty)


def say_of_what_was_sent_that_it_was_not(patch: Patch) -> None:
    patch.setattr(ProducerCore, "_overdue_error", ProducerCore._unreachable_error)
    patch.setattr(producing, "unknown_error", lambda topic, timeout_ms, refusal: refusal)


def refuse_without_a_reason(patch: Patch) -> None:
    send = Sending.send
    rng = Random(1)

    def whimsical(self: Sending, session: Any, request: Any, frames: Any) -> None:
        if rng.random() < 0.05:
            raise RequestRefusedError("Not today.", code=Code.UNAUTHORIZED)
        send(self, session, request, frames)

    patch.setattr(Sending, "send", whimsical)


def take_a_full_disk_for_full_for_ever(patch: Patch) -> None:
    seen = Store._disk_seen
    patch.setattr(Store, "_disk_seen", lambda self, free_bytes: None if self._is_disk_full else seen(self, free_bytes))


def leave_offsets_out(patch: Patch) -> None:
    append = Store.append_batch

    def generous(self: Store, queue: Any, *parts: Any) -> Any:
        queue.next_offset += 1
        return append(self, queue, *parts)

    patch.setattr(Store, "append_batch", generous)


def give_what_comes_along(patch: Patch) -> None:
    """Other messages of a batch that has some which the filter lets through."""
    patch.setattr(ProcessQueue, "wanted_tags", property(lambda self: None, lambda self, value: None), raising=False)


def fail_at_a_farewell(patch: Patch) -> None:
    def failing(self: GroupDesk, *parts: Any) -> None:
        raise KeyError("nobody")

    patch.setattr(GroupDesk, "drop", failing)


def wake_nobody_who_waits(patch: Patch) -> None:
    """A pull that waits finds what was stored when its time is over."""
    patch.setattr(Pulling, "wake", lambda self, queues: None)


def begin_at_the_end_of_assigned_queues(patch: Patch) -> None:
    find = OffsetClaims._find

    def hasty(self: OffsetClaims, *parts: Any) -> None:
        self._consume_from = ConsumeFrom.LATEST
        find(self, *parts)

    patch.setattr(OffsetClaims, "_find", hasty)


def begin_before_the_end_of_assigned_queues(patch: Patch) -> None:
    begin = OffsetClaims._begin
    patch.setattr(OffsetClaims, "_begin", lambda self, offsets, *parts, **told: begin(
        self, {queue: max(offset - 1, 0) for queue, offset in offsets.items()}, *parts, **told
    ))


def resume_what_is_claimed_again(patch: Patch) -> None:
    claimed = ConsumerCore.on_claimed

    def forgetful(self: ConsumerCore, queue: Any, *parts: Any, **told: Any) -> bool:
        self._paused.discard(queue)
        return claimed(self, queue, *parts, **told)

    patch.setattr(ConsumerCore, "on_claimed", forgetful)


def resume_what_another_member_had(patch: Patch) -> None:
    def forgetful(self: ConsumerCore, wanted: frozenset[Any]) -> None:
        self._wanted = wanted
        self._paused &= wanted

    patch.setattr(ConsumerCore, "_want", forgetful)


def give_what_was_begun_of_a_paused_queue(patch: Patch) -> None:
    patch.setattr(Cursor, "is_void", lambda self: False)


def let_go_of_what_is_assigned_again(patch: Patch) -> None:
    patch.setattr(OffsetClaims, "let_go", lambda self, reading, offset: None)


def begin_behind_what_a_broker_has_lost(patch: Patch) -> None:
    found = OffsetClaims._found

    def forgetful(self: OffsetClaims, *parts: Any) -> None:
        self._latest.clear()
        found(self, *parts)

    patch.setattr(OffsetClaims, "_found", forgetful)


def go_on_where_another_lease_left(patch: Patch) -> None:
    acquired = LeaseClaims._acquired

    def trusting(self: LeaseClaims, queue: MessageQueue, link: Any, reply: Any, frames: list[bytes]) -> None:
        if isinstance(reply, Leased) and queue in self._doubtful:
            self._doubtful[queue] = self._doubtful[queue]._replace(lease_epoch=reply.lease_epoch)
        acquired(self, queue, link, reply, frames)

    patch.setattr(LeaseClaims, "_acquired", trusting)


def forget_that_a_reader_sought_back(patch: Patch) -> None:
    patch.setattr(OffsetClaims, "_begin_at", lambda self, queue, link, offset, topic_id, flushed_offset: (
        self._listener.on_claimed(queue, link, offset, 0, topic_id, flushed_offset=flushed_offset)
    ))


def go_on_behind_what_was_lost(patch: Patch) -> None:
    patch.setattr(reading.Reading, "safe_offset", lambda self, offset: offset)


def go_on_where_it_was_whatever_the_broker_lost(patch: Patch) -> None:
    patch.setattr(reading.Reading, "is_safe", True)


def call_flushed_what_is_visible(patch: Patch) -> None:
    show = Store._show

    def hasty(self: Store, queue: Any, offset: int) -> None:
        show(self, queue, offset)
        queue.flushed_offset = offset

    patch.setattr(Store, "_show", hasty)


def acknowledge_as_the_topic_was_once(patch: Patch) -> None:
    """A topic that was ever acknowledged before its flush stays so, and says the contrary."""
    after_flush, send = Outbox.after_flush, Sending.send
    once: set[int] = set()

    def stubborn(self: Sending, session: Any, request: Any, frames: Any) -> None:
        topic = self._context.topic(request.topic)
        if topic.config.flush_mode is FlushMode.ASYNC:
            once.add(id(topic))
        patch.setattr(Outbox, "after_flush", Outbox.after_write if id(topic) in once else after_flush)
        send(self, session, request, frames)
        patch.setattr(Outbox, "after_flush", after_flush)

    patch.setattr(Sending, "send", stubborn)


def take_a_topic_by_its_name(patch: Patch) -> None:
    """As brokers and clients did that knew of no topic ids."""
    queue = Context.queue
    patch.setattr(Context, "queue", lambda self, name, queue_id, topic_id=0: queue(self, name, queue_id))


def _inherit(patch: Patch, what: str) -> None:
    """A topic that is made anew takes over something of what groups had of the former one of its name."""
    put, deleted = Tables._topic_put, Tables._topic_deleted

    def keep(self: Any, event: Any) -> None:
        topic = self.topics_by_id.get(event.topic_id)
        if topic is not None:
            had = {name: dict(getattr(group, what)) for name, group in self.groups.items()}
            self.former = {**getattr(self, "former", {}), topic.config.topic: (event.topic_id, had)}
        deleted(self, event)

    def take_over(self: Any, event: Any) -> None:
        put(self, event)
        former_id, had = getattr(self, "former", {}).pop(event.config.topic, (0, {}))
        for name, places in had.items():
            getattr(self.groups[name], what).update(
                {(*key[:-2], event.topic_id, key[-1]): place for key, place in places.items() if key[-2] == former_id}
            )

    patch.setattr(Tables, "_topic_deleted", keep)
    patch.setattr(Tables, "_topic_put", take_over)


def inherit_offsets(patch: Patch) -> None:
    _inherit(patch, "offsets")


def inherit_leases(patch: Patch) -> None:
    _inherit(patch, "leases")


def keep_queue_files_by_name(patch: Patch) -> None:
    patch.setattr(Shelf, "folder_of_topic", lambda self, topic: self.folder / topic.config.topic)


ROTTEN = {"faults": {"bit_rot": 300.0, "broker_kill": 1_500.0}}
MISDIRECTED = {"faults": {"misdirected_write": 300.0, "broker_kill": 1_500.0}, "segment_bytes": 4_096}
KEEPING = {"work": WorkPlan(retention=RetentionPlan(store_ms=60_000)), "segment_bytes": 4_096, "checkpoint_ms": 200}
DELETING = {
    "work": WorkPlan(retention=RetentionPlan(store_ms=500, segment_bytes=4_096)), "segment_bytes": 4_096, "checkpoint_ms": 200,
}
REMAKING = {"work": WorkPlan(remake_topics_every_ms=700.0), "checkpoint_ms": 200}
ITERATION = PullPlan(iterates=True, auto_commit=True, seek_every_ms=0.0, pause_every_ms=0.0, message_ms=100.0)
ITERATING = {"work": WorkPlan(pulls=dict.fromkeys(("group-0", "group-1", "group-2"), ITERATION))}
FLUSHING = {"work": WorkPlan(change_flush_every_ms=300.0), "faults": {"broker_power_cut": 1_000.0}}
PULLING = {"work": WorkPlan(pulls={
    group: PullPlan(iterates=iterates, auto_commit=auto_commit, seek_every_ms=300.0, pause_every_ms=1_000.0, message_ms=1.0)
    for group, iterates, auto_commit in (("group-0", False, False), ("group-1", True, True), ("group-2", False, True))
})}



def reading_plan(*, has_group: bool, consume_from: ConsumeFrom, **pulls: Any) -> ReaderPlan:
    """A reader that does everything often."""
    often = {"iterates": False, "auto_commit": True, "seek_every_ms": 0.0, "pause_every_ms": 0.0, "message_ms": 10.0}
    return ReaderPlan(
        has_group=has_group, topics=(0, 1, 2), share=1.0, consume_from=consume_from, consume_after_ms=0,
        pulls=PullPlan(**{**often, **pulls}), assign_every_ms=500.0, end_every_ms=3_000.0, starts_ms=0.0,
    )


def readers(**pulls: Any) -> WorkPlan:
    """One of each kind."""
    return WorkPlan(readers=tuple(
        reading_plan(has_group=has_group, consume_from=consume_from, **pulls)
        for has_group in (True, False) for consume_from in (ConsumeFrom.LATEST, ConsumeFrom.EARLIEST)
    ))


RENEWING = {"work": msgspec.structs.replace(readers(), remake_topics_every_ms=700.0)}
LEASES_OF_FORMER_TOPICS = {
    "work": WorkPlan(remake_topics_every_ms=1_000.0), "faults": {"slow_network": 1_500.0, "half_open": 1_500.0, "pause": 2_000.0},
}
CALLING = {"work": WorkPlan(calls=CallPlan(threads=2, send_every_ms=20.0, is_alone=True))}
AWAY = {"faults": {"broker_kill": 2_000.0, "broker_restart": 2_000.0}}

VARIANTS = [
    Variant("acknowledge before flush", acknowledge_before_flush, {"flush", "lost"}),
    Variant("show before flush", show_before_flush, {"visible", "phantom"}),
    Variant("keep pulls of ended sessions", keep_pulls_of_ended_sessions, {"memory"}),
    Variant("go on where another lease left", go_on_where_another_lease_left, {"commit", "missed"}, LEASES_OF_FORMER_TOPICS),
    Variant("grant what is held", grant_what_is_held, {"lease", "owner"}),
    Variant("do not log leases", do_not_log_leases, {"views", "owner", "lease"}),
    Variant("forget leases at restart", forget_leases_at_restart, {"owner"}),
    Variant("end sessions early", end_sessions_early, {"owner"}),
    Variant("trust leases for ever", trust_leases_for_ever, {"owner"}),
    Variant("trust leases to the end", trust_leases_to_the_end, {"owner"}, {
        "work": WorkPlan(clock_drift=0.1), "faults": {"cut": 700.0, "pause": 2_000.0}, "session_timeout_ms": 2_000,
    }),
    Variant("do not wait for what is in flight", do_not_wait_for_what_is_in_flight, {"drain"}),
    Variant("commit before the listener", commit_before_the_listener, {"commit"}),
    Variant("begin where it is convenient", begin_where_it_is_convenient, {"start"}),
    Variant("begin late at other brokers", begin_late_at_other_brokers, {"start"}),
    Variant("ask for one tag only", ask_for_one_tag_only, {"commit", "missed"}),
    Variant("recognise no duplicate", recognise_no_duplicate, {"double"}),
    Variant("check no predecessor", check_no_predecessor, {"order"}, {
        "faults": {"slow_network": 500.0, "full_disk": 500.0}, "batch_records_max": 1, "burst_max": 10,
    }),
    Variant("go back to a broker that may have it", go_back_to_a_broker_that_may_have_it, {"double"}, {
        "faults": {"slow_network": 1_000.0, "pause": 1_000.0, "broker_kill": 3_000.0}, "send_timeout_ms": 15_000,
    }),
    Variant("check no crc in recovery", check_no_crc_in_recovery, {"log", "views", "raised", "survival"}, {
        "faults": {"broker_torn_write": 700.0},
    }),
    Variant("save views before the log", save_views_before_the_log, {"views", "raised", "survival", "log"}, {
        "faults": {"slow_disk": 500.0, "broker_power_cut": 700.0}, "checkpoint_ms": 100, "flush_ms": (1.0, 40.0),
    }),
    Variant("save no windows", save_no_windows, {"views"}),
    Variant("save offsets once only", save_offsets_once_only, {"views"}),
    Variant("flush no folder", flush_no_folder, {"survival", "raised", "lost", "log"}),
    Variant("flush the newest segment only", flush_the_newest_segment_only, {"survival", "lost", "raised", "log"}),
    Variant("flush nothing", flush_nothing, {"survival", "lost", "log"}),
    Variant("lose commits in replay", lose_commits_in_replay, {"views", "commit"}),
    Variant("delete what was not said again", delete_what_was_not_said_again, {"relocation"}, DELETING),
    Variant("say no offsets again", say_no_offsets_again, {"relocation", "views"}, DELETING),
    Variant("delete before it expires", delete_before_it_expires, {"retention"}, KEEPING),
    Variant("delete what is not saved", delete_what_is_not_saved, {"retention"}, DELETING | {"checkpoint_ms": 30_000}),
    Variant("trim too much", trim_too_much, {"views", "commit"}, DELETING),
    Variant("never trim", never_trim, {"health", "views", "commit"}, DELETING),
    Variant("stay one too far", stay_one_too_far, {"commit", "missed"}),
    Variant("skip what follows the deleted", skip_what_follows_the_deleted, {"commit", "missed", "health"}, DELETING),
    Variant("seek one too far", seek_one_too_far, {"commit", "missed"}, PULLING),
    Variant("do not tell that a seek goes back", do_not_tell_that_a_seek_goes_back, {"commit"}, PULLING),
    Variant("always reset", always_reset, {"commit"}, PULLING),
    Variant("finish what is being given", finish_what_is_being_given, {"commit"}, ITERATING),
    Variant("go on where it was after a seek back", go_on_where_it_was_after_a_seek_back, {"missed"}, PULLING),
    Variant("settle what a poll took", settle_what_a_poll_took, {"commit"}, PULLING),
    Variant("say that a commit is done before its flush", say_that_a_commit_is_done_before_its_flush, {"commit", "again"}, {
        "faults": {"broker_power_cut": 700.0, "consumer_crash": 700.0}, "flush_ms": (1.0, 40.0),
    }),
    Variant("say at once that a commit is done", say_at_once_that_a_commit_is_done, {"commit"}, PULLING),
    Variant("do not commit assigned queues at close", do_not_commit_assigned_queues_at_close, {"commit"}, {"work": readers()}),
    Variant("go on behind what was got", go_on_behind_what_was_got, {"missed", "commit"}, {"work": readers()} | AWAY),
    Variant("forget where a reader left off", forget_where_a_reader_left_off, {"missed"}, {"work": readers()} | AWAY),
    Variant("forget where a reader let go", forget_where_a_reader_let_go, {"missed"}, {
        "work": WorkPlan(readers=(reading_plan(has_group=False, consume_from=ConsumeFrom.LATEST),)),
    }),
    Variant("ask no group where it stands", ask_no_group_where_it_stands, {"again", "commit", "missed"}, {"work": readers()}),
    Variant("begin at the end of assigned queues", begin_at_the_end_of_assigned_queues, {"start"}, {"work": readers()}),
    Variant("begin before the end of assigned queues", begin_before_the_end_of_assigned_queues, {"start"}, {"work": readers()}),
    Variant("let go of what is assigned again", let_go_of_what_is_assigned_again, {"health"}, {
        "work": readers(message_ms=100.0),
    }),
    Variant("begin where a queue begins", begin_where_a_queue_begins, {"again"}),
    Variant("forget where an instance stands", forget_where_an_instance_stands, {"again"}),
    Variant("subscribe anew when nobody is there", subscribe_anew_when_nobody_is_there, {"start"}),
    Variant("let several work on a queue in order", let_several_work_on_a_queue_in_order, {"order"}),
    Variant("go on behind what failed", go_on_behind_what_failed, {"order"}),
    Variant("send to another queue", send_to_another_queue, {"bound"}),
    Variant("say of what was sent that it was not", say_of_what_was_sent_that_it_was_not, {"answer"}, {
        "faults": {"cut": 1_000.0, "broker_kill": 2_000.0}, "send_timeout_ms": 1_500,
    }),
    Variant("refuse without a reason", refuse_without_a_reason, {"answer"}),
    Variant("take a full disk for full for ever", take_a_full_disk_for_full_for_ever, {"health"}, {
        "faults": {"full_disk": 1_000.0},
    }),
    Variant("leave offsets out", leave_offsets_out, {"dense"}),
    Variant("give what comes along", give_what_comes_along, {"filter"}),
    Variant("fail at a farewell", fail_at_a_farewell, {"fault"}),
    Variant("wake nobody who waits", wake_nobody_who_waits, {"health"}),
    Variant("resume what is claimed again", resume_what_is_claimed_again, {"paused"}, {
        "work": readers(pause_every_ms=200.0),
    } | AWAY),
    Variant("resume what another member had", resume_what_another_member_had, {"paused"}, {
        "work": WorkPlan(pulls={"group-0": msgspec.structs.replace(ITERATION, pause_every_ms=200.0)}),
        "faults": {"consumer_leave": 500.0, "consumer_join": 500.0},
    }),
    Variant("give what was begun of a paused queue", give_what_was_begun_of_a_paused_queue, {"paused"}, {
        "work": WorkPlan(pulls={"group-0": msgspec.structs.replace(ITERATION, pause_every_ms=200.0, message_ms=10.0)}),
    }),
    Variant("save no changes of topics", save_no_changes_of_topics, {"topics"}, {
        "work": WorkPlan(change_topics_every_ms=500.0),
    }),
    Variant(
        "go on where it was whatever the broker lost", go_on_where_it_was_whatever_the_broker_lost, {"commit", "missed"}, FLUSHING
    ),
    Variant("call flushed what is visible", call_flushed_what_is_visible, {"commit", "missed"}, FLUSHING),
    Variant("acknowledge as the topic was once", acknowledge_as_the_topic_was_once, {"flush", "lost"}, FLUSHING),
    Variant("go on behind what was lost", go_on_behind_what_was_lost, {"missed", "commit"}, {
        "work": readers(), "faults": {"broker_power_cut": 1_000.0},
        "topics": tuple(TopicPlan(f"topic-{number}", 2, FlushMode.ASYNC) for number in range(3)),
    }),
    Variant("take a topic by its name", take_a_topic_by_its_name, {"former", "phantom", "commit", "missed"}, REMAKING),
    Variant("read a topic made anew from where it is told", read_a_topic_made_anew_from_where_it_is_told, {"missed"}, RENEWING),
    Variant("go on in a topic made anew", go_on_in_a_topic_made_anew, {"missed", "phantom"}, RENEWING | {
        "faults": {"broker_restart": 1_500.0},
    }),
    Variant("inherit offsets", inherit_offsets, {"again", "commit", "missed"}, REMAKING),
    Variant("inherit leases", inherit_leases, {"again", "phantom", "commit", "missed", "lease"}, REMAKING),
    Variant("keep queue files by name", keep_queue_files_by_name, {"views"}, REMAKING | {
        "checkpoint_ms": 3_000, "batch_records_max": 1, "burst_max": 30,
    }),
    Variant("forget the longer session timeout", forget_the_longer_session_timeout, {"owner", "drain"}, {
        "work": WorkPlan(session_timeouts_ms=(1_000,)), "session_timeout_ms": 10_000,
        "faults": {"broker_kill": 3_000.0, "cut": 1_000.0, "pause": 2_000.0},
    }),
    Variant("rebuild views of messages only", rebuild_views_of_messages_only, {"views"}, {"faults": {"lost_views": 700.0}}),
    Variant("take no notice of missing queue files", take_no_notice_of_missing_queue_files, {"views"}, {
        "faults": {"lost_views": 500.0}, "checkpoint_ms": 200,
    }),
    Variant("make short queue files do", make_short_queue_files_do, {"views"}, {
        "faults": {"lost_views": 500.0}, "checkpoint_ms": 200,
    }),
    Variant("believe the page cache of the last run", believe_the_page_cache_of_the_last_run, {"survival", "lost", "log"}, {
        "faults": {"failing_disk": 500.0, "recovery_power_cut": 700.0}, "flush_ms": (1.0, 40.0),
    }),
    Variant("move the saved position in recovery", move_the_saved_position_in_recovery, {"views"}, {
        "faults": {"recovery_power_cut": 700.0},
    }),
    Variant("skip damage silently", skip_damage_silently, {"damage"}, ROTTEN),
    Variant("serve what is there", serve_what_is_there, {"content", "raised", "views", "damage", "log", "commit"}, ROTTEN),
    Variant("tell nobody of damage that is read", tell_nobody_of_damage_that_is_read, {"damage"}, ROTTEN),
    Variant("end the log at the first damage", end_the_log_at_the_first_damage, {"survival", "log", "views", "raised"}, ROTTEN),
    Variant("skip the rest of a damaged segment", skip_the_rest_of_a_damaged_segment, {"survival", "log", "views"}, ROTTEN),
    Variant("hear whom a new connection replaced", hear_whom_a_new_connection_replaced, {"commit", "health"}, PULLING | {
        "faults": {"late_delivery": 300.0},
    }),
    Variant("believe an entry wherever it stands", believe_an_entry_wherever_it_stands, {"views", "log", "damage"}, MISDIRECTED),
    Variant("count starts by what is left", count_starts_by_what_is_left, {"lease"}, ROTTEN),
    Variant("overtake by a lane", overtake_by_a_lane, {"order"}, CALLING),
    Variant("send again what a lane lost", send_again_what_a_lane_lost, {"double", "order", "answer"}, CALLING | {
        "faults": {"broker_kill": 1_000.0, "break_connections": 300.0, "slow_disk": 1_000.0}, "flush_ms": (1.0, 40.0),
    }),
    Variant("hand over what a lane sent as unsent", hand_over_what_a_lane_sent_as_unsent, {"double"}, CALLING | {
        "faults": {"broker_kill": 700.0, "cut": 1_000.0}, "flush_ms": (1.0, 40.0),
    }),
    Variant("take any answer of a lane", take_any_answer_of_a_lane, {"lost", "double"}, CALLING | {
        "faults": {"slow_disk": 700.0, "slow_network": 700.0},
    }),
    Variant("call unsent what a lane heard nothing of", call_unsent_what_a_lane_heard_nothing_of, {"answer"}, CALLING | {
        "faults": {"slow_disk": 700.0, "cut": 1_000.0, "broker_kill": 1_000.0}, "send_timeout_ms": 1_500,
    }),
    Variant("forget the rest of a list", forget_the_rest_of_a_list, {"lost", "flush"}, CALLING | {
        "batch_records_max": 4,
    }),
]
