"""Consumer groups: who is a member, what they subscribe to, and where a group begins."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from zrmq.errors import (
    Code,
    ConsumerGroupNotFoundError,
    InvalidArgumentError,
    RequestRefusedError,
    SubscriptionMismatchError,
)
from zrmq.logs import get_logger
from zrmq.message import ConsumeFrom, MessageModel
from zrmq.protocol import limits
from zrmq.protocol.events import GroupSubscribed
from zrmq.protocol.requests import (
    DescribeGroups,
    Done,
    GroupChanged,
    GroupInfo,
    Groups,
    Joined,
    JoinGroup,
    LeaseInfo,
    LeaveGroup,
    MemberInfo,
    QuerySubscriptions,
    SubscribedSince,
    Subscription,
)
from zrmq.protocol.tags import canonical_expression
from zrmq.serving.context import Context
from zrmq.store.tables import Queue, Tables
from zrmq.transport.sessions import Session

log = get_logger("serving")


class Membership(msgspec.Struct, eq=False):
    """The live part of a consumer group at this broker: what ends with the sessions."""

    group: str
    message_model: MessageModel
    subscriptions: dict[str, str]  # topic -> canonical expression
    members: dict[str, Session]  # client id -> current session
    version: int

    @property
    def member_ids(self) -> list[str]:
        return sorted(self.members)


class GroupDesk:
    """Handles joining and leaving. Everybody in a group is told of every change at once.

    Invariant: all members of a group have one model and one set of subscriptions, so a message's fate does not depend on who gets
    its queue.
    """

    def __init__(self, context: Context, release_leases: Callable[[str, str, bool], None]) -> None:
        self._context = context
        self._release_leases = release_leases
        self._live: dict[str, Membership] = {}
        self._place_count = _count_places(context.store.tables)
        self._version = context.store.boot << 32  # so that a version means one thing over restarts

    def membership(self, session: Session) -> Membership | None:
        """The session's group with its live members, None when it has not joined."""
        live = self._live.get(session.group)
        return live if live is not None and session.client_id in live.members else None

    def model(self, group: str) -> MessageModel | None:
        """The model of the group's live members, None when there are none."""
        live = self._live.get(group)
        return live.message_model if live is not None else None

    def version_for(self, session: Session) -> int:
        """Version of the session's group, 0 when it has not joined."""
        live = self.membership(session)
        return live.version if live is not None else 0

    def join(self, session: Session, request: JoinGroup, frames: list[bytes]) -> None:
        """Make the session's client a member, or renew its membership; refused unless it wants what the others want."""
        if session.role != "consumer" or not session.group:
            raise InvalidArgumentError("Only a session with role 'consumer' and a group joins one; say so in HELLO.")
        subscriptions = _read_subscriptions(request.subscriptions)
        instance_name = _instance_name(session, request.message_model)
        live = self._live.get(session.group)
        if live is None or set(live.members) <= {session.client_id}:
            self.check_room(session.group)
        else:
            _check_alike(session, request.message_model, subscriptions, live)
            if request.message_model is MessageModel.BROADCASTING:
                _check_instance_name(session, live)
        self._check_places(session.group, instance_name, subscriptions)
        since = [
            self._subscribe(session.group, instance_name, topic, request, told_ms)
            for topic, told_ms in zip(subscriptions, request.since_ms + [0] * len(subscriptions), strict=False)
        ]
        live = self._renew(session, request.message_model, subscriptions)
        self._enter(session, live)
        self._context.reply_when_safe(session, Joined(request.number, live.version, live.member_ids, since))

    def query_subscriptions(self, session: Session, request: QuerySubscriptions, frames: list[bytes]) -> None:
        """Tell since when the group, or this instance of it, has been subscribed."""
        if len(request.topics) > limits.SUBSCRIPTIONS_MAX:
            raise InvalidArgumentError(f"A question names at most {limits.SUBSCRIPTIONS_MAX} topics; ask several.")
        instance_name = _instance_name(session, request.message_model)
        group = self._context.store.tables.groups.get(session.group)
        known = [group.subscribed(topic, instance_name) if group else None for topic in request.topics]
        since = [subscribed.since_ms if subscribed else 0 for subscribed in known]
        self._context.reply_when_safe(session, SubscribedSince(request.number, since))

    def leave(self, session: Session, request: LeaveGroup, frames: list[bytes]) -> None:
        """End the membership, and the leases with it."""
        self.drop(session)
        self._context.reply_when_safe(session, Done(request.number))

    def drop(self, session: Session, is_silent: bool = False) -> None:
        """The session ended, by silence or otherwise: its membership and leases end with it."""
        if session.group:
            self._release_leases(session.group, session.client_id, is_silent)
        live = self.membership(session)
        if live is None or live.members[session.client_id] is not session:
            return
        del live.members[session.client_id]
        if live.members:
            self._announce(live)
        else:
            del self._live[session.group]
        log.info("member_left", group=session.group, client_id=session.client_id, members=len(live.members))

    def move(self, session: Session, old: Session) -> None:
        """A client came back on a new connection: it stays a member."""
        live = self.membership(old)
        if live is None or live.members[old.client_id] is not old:
            return
        if session.group == old.group and session.instance_name == old.instance_name:
            live.members[session.client_id] = session
        else:
            self.drop(old)

    def describe(self, session: Session, request: DescribeGroups, frames: list[bytes]) -> None:
        """Tell who is there, what they hold and how far they are: the groups named, each once, or all."""
        known = self._context.store.tables.groups
        names = dict.fromkeys(request.groups) or sorted(known.keys() | self._live.keys())
        for name in names:
            if name not in known and name not in self._live:
                raise ConsumerGroupNotFoundError(
                    f"Group {name!r} is unknown to broker {self._context.config.broker_name}; 'zrmq group list' shows all.",
                    group=name,
                )
        now_ms = self._context.clock.monotonic_ms()
        self._context.outbox.now(session.peer, Groups(request.number, [self._describe(name, now_ms) for name in names]))

    # --- joining ------------------------------------------------------------------------------------------------------

    def _check_places(self, group_name: str, instance_name: str, subscriptions: dict[str, str]) -> None:
        """Before the first subscription is noted: all of them or none."""
        tables = self._context.store.tables
        group = tables.groups.get(group_name)
        known = group.subscriptions.get(instance_name, {}) if group else {}
        topics = [tables.topics.get(name) for name in subscriptions if name not in known]
        self.check_room(group_name, sum(1 + len(topic.queues) if topic else 1 for topic in topics))

    def check_room(self, group: str, places: int = 0) -> None:
        """Raise unless the group is known or may be, and the broker can remember so many more places for it."""
        known = self._context.store.tables.groups
        if group not in known and len(known) >= limits.GROUPS_MAX:
            raise RequestRefusedError(
                f"Broker {self._context.config.broker_name} has {limits.GROUPS_MAX} groups, its limit; use one that exists.",
                code=Code.TOO_MANY_REQUESTS,
            )
        if places and self._place_count + places > limits.PLACES_MAX:
            raise RequestRefusedError(
                f"Broker {self._context.config.broker_name} remembers {self._place_count} subscriptions and offsets; its"
                f" limit is {limits.PLACES_MAX}. Delete topics nobody needs, and give broadcasting instances names that stay.",
                code=Code.TOO_MANY_REQUESTS, limit_count=limits.PLACES_MAX,
            )

    def note_places(self, places: int) -> None:
        """So many more are remembered."""
        self._place_count += places

    def recount_places(self) -> None:
        """A topic was deleted, with the groups' places in it."""
        self._place_count = _count_places(self._context.store.tables)

    def _renew(self, session: Session, model: MessageModel, subscriptions: dict[str, str]) -> Membership:
        """The group is what this member says: it is the only one, or says what the others say."""
        live = self._live.get(session.group)
        if live is None:
            live = Membership(session.group, model, subscriptions, {}, self._next_version())
            self._live[session.group] = live
        live.message_model, live.subscriptions = model, subscriptions
        return live

    def _enter(self, session: Session, live: Membership) -> None:
        before = live.members.get(session.client_id)
        live.members[session.client_id] = session
        if before is None:
            self._announce(live, besides=session.client_id)
            log.info("member_joined", group=session.group, client_id=session.client_id, members=len(live.members))

    def _announce(self, live: Membership, besides: str = "") -> None:
        live.version = self._next_version()
        notice = GroupChanged(0, live.group, live.version, live.member_ids)
        for client_id, member in live.members.items():
            if client_id != besides:
                self._context.outbox.now(member.peer, notice)

    def _next_version(self) -> int:
        self._version += 1
        return self._version

    def _subscribe(self, group: str, instance_name: str, topic_name: str, request: JoinGroup, told_ms: int) -> int:
        """Fix where the group, or a broadcasting instance, begins on the topic, at its first subscription; return when that was.

        `told_ms`: when another broker heard of it, 0 if none has."""
        store = self._context.store
        known = store.tables.groups.get(group)
        subscribed = known.subscribed(topic_name, instance_name) if known is not None else None
        if subscribed is not None:
            return subscribed.since_ms
        topic = store.tables.topics.get(topic_name)
        starts = [(queue.queue_id, self._start(queue, request, told_ms)) for queue in topic.queues] if topic else []
        since_ms = told_ms or self._context.clock.time_ms()
        self._context.place(GroupSubscribed(group, topic_name, since_ms, starts, instance_name))
        self.note_places(1 + len(starts))
        log.info(
            "group_subscribed", group=group, instance_name=instance_name, topic=topic_name, since_ms=since_ms,
            consume_from=request.consume_from.value,
        )
        return since_ms

    def _start(self, queue: Queue, request: JoinGroup, told_ms: int) -> int:
        if request.consume_from is ConsumeFrom.EARLIEST:
            return queue.min_offset
        if request.consume_from is ConsumeFrom.TIMESTAMP:
            return self._context.store.offset_at(queue, request.consume_timestamp_ms)
        if told_ms:
            return self._context.store.offset_at(queue, told_ms)
        return queue.next_offset

    # --- describing ---------------------------------------------------------------------------------------------------

    def _describe(self, name: str, now_ms: float) -> GroupInfo:
        live = self._live.get(name)
        members = [] if live is None else [
            MemberInfo(client_id, member.instance_name, round(now_ms - member.last_seen_ms))
            for client_id, member in sorted(live.members.items())
        ]
        return GroupInfo(
            name, live.message_model if live else None, self._subscriptions(name, live), members, self._leases(name),
            self._offsets(name),
        )

    def _subscriptions(self, name: str, live: Membership | None) -> list[Subscription]:
        if live is not None:
            return [Subscription(topic, expression) for topic, expression in sorted(live.subscriptions.items())]
        return [Subscription(topic) for topic in sorted(self._context.store.tables.groups[name].topics)]

    def _leases(self, name: str) -> list[LeaseInfo]:
        tables = self._context.store.tables
        group = tables.groups.get(name)
        return [] if group is None else [
            LeaseInfo(tables.topics_by_id[topic_id].config.topic, queue_id, lease.client_id, lease.lease_epoch)
            for (topic_id, queue_id), lease in sorted(group.leases.items())
            if topic_id in tables.topics_by_id
        ]

    def _offsets(self, name: str) -> list[tuple[str, str, int, int, int]]:
        """Where the group, or each broadcasting instance, stands: in all queues of the topics that this one subscribed to, and in
        others where it has committed. Each is one of the places that are bounded; all instances times all topics are not."""
        tables = self._context.store.tables
        group = tables.groups.get(name)
        if group is None:
            return []
        places = {
            (instance, topic, queue.queue_id): subscribed.starts.get(queue.queue_id, 0)
            for instance, each in group.subscriptions.items()
            for topic, subscribed in each.items()
            if topic in tables.topics
            for queue in tables.topics[topic].queues
        }
        for (instance, topic_id, queue_id), offset in group.offsets.items():
            committed = tables.topics_by_id.get(topic_id)
            if committed is not None and queue_id < len(committed.queues):
                places[instance, committed.config.topic, queue_id] = offset
        return [
            (instance, topic, queue_id, offset, tables.topics[topic].queues[queue_id].next_offset)
            for (instance, topic, queue_id), offset in sorted(places.items())
        ]


def _count_places(tables: Tables) -> int:
    """What the groups make a broker remember, whether anybody will ask for it again or not."""
    groups = tables.groups.values()
    subscribed = [found for group in groups for each in group.subscriptions.values() for found in each.values()]
    return sum(len(group.offsets) for group in groups) + sum(1 + len(each.starts) for each in subscribed)


def _read_subscriptions(asked: list[Subscription]) -> dict[str, str]:
    if not 1 <= len(asked) <= limits.SUBSCRIPTIONS_MAX:
        raise InvalidArgumentError(f"A group reads 1 to {limits.SUBSCRIPTIONS_MAX} topics, not {len(asked)}; use several.")
    subscriptions: dict[str, str] = {}
    for subscription in asked:
        limits.check_topic(subscription.topic)
        if subscription.topic in subscriptions:
            raise InvalidArgumentError(f"The topic {subscription.topic!r} is subscribed twice; join the tags with '||'.")
        subscriptions[subscription.topic] = canonical_expression(subscription.expression)
    return subscriptions


def _instance_name(session: Session, model: MessageModel) -> str:
    """The name under which the member's subscriptions and offsets are kept: its own when broadcasting, none when clustering."""
    if model is MessageModel.CLUSTERING:
        return ""
    if not session.instance_name:
        raise InvalidArgumentError(
            f"Members of group {session.group!r} broadcast, so each needs a name for its offsets; give instance_name in HELLO.",
            group=session.group,
        )
    return session.instance_name


def _check_alike(session: Session, model: MessageModel, subscriptions: dict[str, str], live: Membership) -> None:
    if model is live.message_model and subscriptions == live.subscriptions:
        return
    raise SubscriptionMismatchError(
        f"Group {live.group!r} reads {_spell(live.message_model, live.subscriptions)} and this member wants"
        f" {_spell(model, subscriptions)}; give all members of a group the same, or use another group.",
        group=live.group, theirs=_spell(live.message_model, live.subscriptions), yours=_spell(model, subscriptions),
    )


def _spell(model: MessageModel, subscriptions: dict[str, str]) -> str:
    topics = ", ".join(f"{topic} ({expression})" for topic, expression in sorted(subscriptions.items()))
    return f"{topics} {model.value}"


def _check_instance_name(session: Session, live: Membership) -> None:
    for client_id, member in live.members.items():
        if member.instance_name == session.instance_name and client_id != session.client_id:
            raise RequestRefusedError(
                f"An instance named {session.instance_name!r} of broadcasting group {live.group!r} is live already; give each one"
                " a name of its own with instance_name=, so that it finds its offsets again.",
                code=Code.INSTANCE_NAME_TAKEN, group=live.group, instance_name=session.instance_name,
            )
