"""Requests, replies and notices: the header frame of every message on the wire.

A message is `[header][payload...]`. The header is one MessagePack array: `[tag, number, ...fields]`. Requests carry the time
the client still waits (`timeout_ms`, 0: as long as the server likes), so that a server never works for nobody. A reply has its
request's number. Notices come from a server unasked, with number 0. Fields are only ever appended; unknown trailing fields are
ignored. Only `Send` has a request payload (one batch), only `Pulled` a reply payload (whole batches, a few to a frame).

Who answers what:  N NameServer, B broker, * both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Annotated, Any

import msgspec

from zrmq.errors import Code, InvalidFrameError, ZrmqError
from zrmq.message import ConsumeFrom, FlushMode, MessageModel
from zrmq.protocol import limits
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.limits import (
    CREDENTIALS_BYTES_MAX,
    FRAME_COUNT_MAX,
    HEADER_BYTES_MAX,
    RECEIVED_BYTES_MAX,
    REPLY_HEADER_BYTES_MAX,
    ROOMLESS_BYTES_MAX,
    UNREAD_BYTES_MAX,
    Name,
    Natural,
    QueueId,
)

OFFSET_EARLIEST = -2
OFFSET_LATEST = -1
ROUTE_OF_OTHERS = 1  # as version in QueryRoute: the client has a route of other topics, and need not have this one at once


class Request(msgspec.Struct, array_like=True, frozen=True):
    """Base of all requests; `number` is unique within a connection and never 0, except in one-way sends."""

    number: Natural
    timeout_ms: Natural


class Reply(msgspec.Struct, array_like=True, frozen=True):
    """Base of all replies and notices."""

    number: int


# --- values inside --------------------------------------------------------------------------------------------------


class Limits(msgspec.Struct, array_like=True, frozen=True):
    """What the server accepts; told in WELCOME so that clients refuse early, with a good sentence."""

    body_bytes_max: int
    batch_bytes_max: int
    batch_records_max: int
    inflight_batches_max: int
    pull_bytes_max: int


LIMITS = Limits(
    limits.BODY_BYTES_MAX, limits.BATCH_BYTES_MAX, limits.BATCH_RECORDS_MAX, limits.INFLIGHT_BATCHES_MAX, limits.PULL_BYTES_MAX
)


MASTER_ID = 0  # of the one that takes requests, of all that share a broker name


class BrokerInfo(msgspec.Struct, array_like=True, frozen=True):
    """One broker as it registers itself."""

    cluster: Name
    broker_name: Name
    broker_id: Natural  # `MASTER_ID`, or of a replica
    role: Name  # MASTER, SLAVE, LEARNER
    epoch: Natural  # counts the starts of this broker; a registration with a smaller one is stale
    address: Name  # of the ROUTER, as clients reach it
    ingest_address: Name  # of the PULL for one-way sends; empty: none
    suspect: bool = False  # set by the NameServer: silent for more than 3 s
    store_id: Name = ""  # of its data folder: another broker of that name, with other data, is told from this one by it


class TopicRoute(msgspec.Struct, array_like=True, frozen=True):
    """The queues of one topic at one broker name."""

    topic: Name
    broker_name: Name
    queue_count: QueueId
    permission: QueueId


class QueueState(msgspec.Struct, array_like=True, frozen=True):
    """What one queue holds."""

    queue_id: int
    min_offset: int
    max_offset: int  # what the next message gets; consumers may see less until it is flushed


class TopicInfo(msgspec.Struct, array_like=True, frozen=True):
    """One topic at one broker."""

    config: TopicConfig
    topic_id: int
    queues: list[QueueState]


class Subscription(msgspec.Struct, array_like=True, frozen=True):
    """What a group wants of one topic."""

    topic: Name
    expression: str = "*"  # canonical: see protocol/tags.py


class QueueOffset(msgspec.Struct, array_like=True, frozen=True):
    """A queue of this broker and an offset in it; `lease_epoch` 0 where no lease is held (broadcasting, plain readers).

    `topic_id`: which topic of that name is meant, 0 if any; see `Pull`.
    """

    topic: Name
    queue_id: QueueId
    offset: Natural
    lease_epoch: Natural = 0
    topic_id: Natural = 0


class MemberInfo(msgspec.Struct, array_like=True, frozen=True):
    """A live member of a group; `idle_ms` since its last sign of life."""

    client_id: str
    instance_name: str
    idle_ms: int


class LeaseInfo(msgspec.Struct, array_like=True, frozen=True):
    """Who may read a queue for the group."""

    topic: str
    queue_id: int
    client_id: str
    lease_epoch: int


class GroupInfo(msgspec.Struct, array_like=True, frozen=True):
    """One consumer group at one broker."""

    group: str
    message_model: MessageModel | None  # None: no member is here
    subscriptions: list[Subscription]
    members: list[MemberInfo]
    leases: list[LeaseInfo]
    offsets: list[tuple[str, str, int, int, int]]  # instance name, topic, queue id, committed offset, max offset


# --- requests: * ----------------------------------------------------------------------------------------------------


class Hello(Request, tag=1, frozen=True):
    """* Open a session on this connection. Answered by `Welcome`.

    A newer `session_epoch` of the same client id takes the session over: the old connection gets NO_SESSION from then on.
    An older one is refused. Everything else sent without a session is answered NO_SESSION.
    """

    protocol_version: Natural  # PROTOCOL_VERSION
    client_id: Name
    session_epoch: Natural
    role: Name  # producer, consumer, admin, broker
    group: Name = ""
    instance_name: Name = ""
    language: Name = "python"
    credentials: Annotated[bytes, msgspec.Meta(max_length=CREDENTIALS_BYTES_MAX)] | None = None


class Heartbeat(Request, tag=2, frozen=True):
    """* I live. Answered by `Alive`. Any request counts as a sign of life too."""


class Bye(Request, tag=3, frozen=True):
    """* Close the session at once, with its leases and memberships. Answered by `Done`."""


# --- requests: NameServer -------------------------------------------------------------------------------------------


class RegisterBroker(Request, tag=10, frozen=True):
    """N A broker's registration and, once a second, its heartbeat. Answered by `Registered`.

    `topics` is None in a heartbeat: the NameServer keeps the table it has if `topics_version` equals that table's, else it
    asks for it by `Registered.wants_topics`.
    """

    broker: BrokerInfo
    topics_version: int
    topics: list[TopicRoute] | None = None


class UnregisterBroker(Request, tag=11, frozen=True):
    """N The broker leaves now. Answered by `Done`.

    `store_id` is that of its registration; empty: not said. Where the place is another's, nothing happens: it is not that one
    which leaves, whatever its epoch, as epochs of different folders say nothing of each other.
    """

    broker_name: Name
    broker_id: Natural
    epoch: Natural
    store_id: Name = ""


class QueryRoute(Request, tag=12, frozen=True):
    """N Routes of `topics` (`["*"]`: all) and all live brokers. Answered by `Route`.

    With the `version` of an earlier answer it is a watch: the answer waits until something in it changes, or for `timeout_ms`
    less a margin, and then repeats the same version. A version is a digest of the answer's content, so it means the same at
    every NameServer. During start-up grace an unknown topic is answered NOT_READY, and a version that this NameServer has not
    come to itself waits: the client goes on with the route it has. `ROUTE_OF_OTHERS` waits for the grace only.
    """

    topics: list[Name]
    version: int = 0


# --- requests: broker, topics ---------------------------------------------------------------------------------------


class PutTopic(Request, tag=20, frozen=True):
    """B Create the topic or change its configuration. Answered by `Topics` with the one as it is now.

    `create_only`: an existing topic is left as it is (what producers and consumers send before first use: refused with
    TOPIC_NOT_FOUND where the broker's auto-create is off and `auto_create` is set). Queues cannot be taken away.

    Nothing tells a repetition from a new request, so it may undo what another admin has changed in between.
    """

    config: TopicConfig
    create_only: bool = False
    auto_create: bool = False


class DeleteTopic(Request, tag=21, frozen=True):
    """B Delete the topic with its messages and offsets. Answered by `Done`.

    `topic_id`: which topic of that name is meant, as `TopicInfo` tells it. TOPIC_NOT_FOUND when that one is gone, though another
    may have the name by now. 0: whichever has it; the repetition of a request that was done then deletes the next one.
    """

    topic: Name
    topic_id: Natural = 0


class DescribeTopics(Request, tag=22, frozen=True):
    """B Answered by `Topics`: those named, or all. TOPIC_NOT_FOUND when one named does not exist."""

    topics: list[Name] = []


class DescribeBroker(Request, tag=23, frozen=True):
    """B Answered by `BrokerState`."""


# --- requests: broker, messages -------------------------------------------------------------------------------------


class Send(Request, tag=30, frozen=True):
    """B Store one batch (the payload). Answered by `Sent`, once it is as safe as the topic's flush mode says.

    `follows`: last sequence of the batch this producer sent to this queue just before and has no answer for yet, 0 for none.
    If the broker has not stored that one, this is refused OUT_OF_ORDER and the client sends both again. A batch whose
    (producer id, first sequence) the queue has is not stored again: `Sent.duplicate`.
    On the ingest port (number 0) nothing is answered.
    """

    topic: Name
    queue_id: QueueId
    follows: Natural = 0


class Pull(Request, tag=31, frozen=True):
    """B Batches of one queue from `offset` on. Answered by `Pulled`.

    Waits up to `wait_ms` while there is nothing visible. `tag_mask` (0: all) skips batches without a wanted tag. With a
    `group` the lease epoch is checked first (FENCED); without one anybody may read. An offset below the queue's first is
    answered with status MOVED and where to go on; beyond its end too. A session waits with one pull per queue: a newer one ends
    the wait of the older.

    `topic_id` (0: any) says of which topic of that name the offset is: when it was deleted and made again, TOPIC_NOT_FOUND. Who
    reads without a lease gets it with the offset to begin at.

    One that `stays` goes on waiting behind an answer that brought everything there was, for what is left of `wait_ms`, until its
    answers have come to half of `bytes_max`.
    """

    topic: Name
    queue_id: QueueId
    offset: Natural
    bytes_max: Natural
    wait_ms: Natural
    tag_mask: Annotated[int, msgspec.Meta(ge=0)] = 0
    group: Name = ""
    lease_epoch: Natural = 0
    topic_id: Natural = 0
    stays: bool = False


class QueryOffsets(Request, tag=32, frozen=True):
    """B For each queue id of the topic (empty: all) the first offset stored at or after `timestamp_ms`, or OFFSET_EARLIEST /
    OFFSET_LATEST for the first and the next. Answered by `Offsets`."""

    topic: Name
    queue_ids: list[QueueId] = []
    timestamp_ms: Annotated[int, msgspec.Meta(ge=OFFSET_EARLIEST, le=(1 << 63) - 1)] = OFFSET_LATEST


# --- requests: broker, consumer groups ------------------------------------------------------------------------------


class JoinGroup(Request, tag=40, frozen=True):
    """B Become a member of the session's group, or renew it. Answered by `Joined`; `GroupChanged` notices follow.

    All live members must give the same model and subscriptions, else SUBSCRIPTION_MISMATCH. Broadcasting members need
    instance names, distinct ones (INSTANCE_NAME_TAKEN). On the first subscription of a group, or of a broadcasting instance,
    the broker fixes each existing queue's start by `consume_from`. `since_ms` has for each subscription, in the same order, when
    it was made elsewhere, which is what LATEST means then; 0, or nothing, for those never made. A topic may not exist.
    """

    message_model: MessageModel
    subscriptions: list[Subscription]
    consume_from: ConsumeFrom = ConsumeFrom.LATEST
    consume_timestamp_ms: Natural = 0
    since_ms: list[Natural] = []


class LeaveGroup(Request, tag=41, frozen=True):
    """B End the membership and release its leases. Answered by `Done`."""


# Refusals that say that a queue is not the asking member's. They are sent when what they say is flushed. Any other leaves it
# open: the broker may have granted the same request when it was sent before, and that answer be lost; or it does not know itself
# what its next start will find in its log.
NOT_HELD = frozenset({Code.LEASE_HELD, Code.FENCED, Code.TOPIC_NOT_FOUND, Code.BAD_REQUEST})


class AcquireLease(Request, tag=42, frozen=True):
    """B The right to read a queue for the session's group. Answered by `Leased`, at once for the holder itself.

    Waits up to `timeout_ms` less a margin while another member holds it, then LEASE_HELD. First come, first served.
    """

    topic: Name
    queue_id: QueueId


class ReleaseLease(Request, tag=43, frozen=True):
    """B Give a queue back, committing `offset` on the way unless it is negative. Answered by `Done`, FENCED if not the holder."""

    topic: Name
    queue_id: QueueId
    lease_epoch: Natural
    offset: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)] = -1


class CommitOffsets(Request, tag=44, frozen=True):
    """B Commit offsets for the session's group (and instance when broadcasting). Answered by `Committed`.

    An offset smaller than the committed one is ignored unless `reset`. Clustering: those without a valid lease epoch come
    back in `Committed.fenced` and the rest is committed; epoch 0 commits only while no lease is held by anybody. Broadcasting:
    FORBIDDEN for a session that gave no instance name.
    """

    offsets: list[QueueOffset]
    reset: bool = False


class QueryCommitted(Request, tag=45, frozen=True):
    """B Committed offset of each queue of the topic for the session's group (and instance). Answered by `Offsets`: where a
    group that has none would begin; OFFSET_LATEST (-1) when it never subscribed."""

    topic: Name


class DescribeGroups(Request, tag=46, frozen=True):
    """B Answered by `Groups`: those named, or all. CONSUMER_GROUP_NOT_FOUND when one named does not exist."""

    groups: list[Name] = []


class QuerySubscriptions(Request, tag=47, frozen=True):
    """B Since when the session's group (and instance when broadcasting) has been subscribed to these topics here. Answered by
    `SubscribedSince`."""

    message_model: MessageModel
    topics: list[Name]


# --- replies --------------------------------------------------------------------------------------------------------


class Failed(Reply, tag=100, frozen=True):
    """* The request was refused. `message` says what to do; `facts` are what it speaks of."""

    code: int
    message: str
    facts: dict[str, Any] = {}


class Done(Reply, tag=101, frozen=True):
    """* It is done; nothing more to say."""


class Welcome(Reply, tag=102, frozen=True):
    """* The session is open. Silence of `session_timeout_ms` ends it; send a heartbeat every `heartbeat_ms`."""

    protocol_version: int
    server_id: str  # new at each start of the server
    server_name: str
    server_time_ms: int
    session_timeout_ms: int
    heartbeat_ms: int
    limits: Limits


class Alive(Reply, tag=103, frozen=True):
    """* Answer to a heartbeat. `group_version`: of the session's group, so that a lost notice is noticed."""

    server_time_ms: int
    group_version: int = 0


class Registered(Reply, tag=110, frozen=True):
    """N `wants_topics`: register again, with the topics."""

    wants_topics: bool


class Route(Reply, tag=112, frozen=True):
    """N Brokers and queues, sorted; a topic without routes does not exist as far as this NameServer knows."""

    version: int
    brokers: list[BrokerInfo]
    topics: list[TopicRoute]


class Topics(Reply, tag=120, frozen=True):
    """B Topics as they are now."""

    topics: list[TopicInfo]


class BrokerState(Reply, tag=123, frozen=True):
    """B Facts of the broker for people and metrics: names to numbers or text."""

    facts: dict[str, Any]


class Sent(Reply, tag=130, frozen=True):
    """B The batch is stored from `base_offset` on, as safe as `durability` says."""

    base_offset: int
    store_timestamp_ms: int
    durability: FlushMode
    duplicate: bool = False


class PullStatus(IntEnum):
    """What a pull came to."""

    FOUND = 0  # batches are in the payload
    NOTHING = 1  # nothing new within wait_ms; `next_offset` may have moved past unwanted batches
    MOVED = 2  # the offset is outside the queue; go on at `next_offset`
    CORRUPT = 3  # the batch at the offset is damaged on disk; go on at `next_offset` behind it


class Pulled(Reply, tag=131, frozen=True):
    """B `next_offset` is what to pull next, in every case. The first batch may begin before the offset asked for.

    What is before `flushed_offset` survives a power cut. Whoever has read beyond it asks where to go on when the broker has been
    started again: the offsets may have been lost, and given again.
    """

    status: PullStatus
    next_offset: int
    min_offset: int
    max_offset: int  # visible end of the queue
    flushed_offset: int = 0
    more: bool = False  # the pull stays, and waits at `next_offset`: another answer with the same number follows


class Offsets(Reply, tag=132, frozen=True):
    """B (queue id, offset) pairs, and which topic of that name they belong to. To QueryOffsets also, in the same order, up to
    where each queue survives a power cut."""

    offsets: list[tuple[int, int]]
    topic_id: int = 0
    flushed_offsets: list[int] = []


class Joined(Reply, tag=140, frozen=True):
    """B The group's live members at this broker. `since_ms`: when it (broadcasting: the instance) first subscribed, per
    subscription in the order asked."""

    group_version: int
    members: list[str]  # client ids, sorted
    since_ms: list[int]


class Leased(Reply, tag=142, frozen=True):
    """B The lease is yours. Begin at `offset`, the committed one or the group's start."""

    lease_epoch: int
    offset: int


class Committed(Reply, tag=144, frozen=True):
    """B Done, but for the offsets at these indexes, whose lease is not yours."""

    fenced: list[int]


class Groups(Reply, tag=146, frozen=True):
    """B Groups as they are now."""

    groups: list[GroupInfo]


class SubscribedSince(Reply, tag=147, frozen=True):
    """B When each subscription was first made, in the order asked; 0: never."""

    since_ms: list[int]


class GroupChanged(Reply, tag=150, frozen=True):
    """B Notice (number 0): members came or went."""

    group: str
    group_version: int
    members: list[str]


AnyRequest = (
    Hello | Heartbeat | Bye | RegisterBroker | UnregisterBroker | QueryRoute | PutTopic | DeleteTopic | DescribeTopics
    | DescribeBroker | Send | Pull | QueryOffsets | JoinGroup | LeaveGroup | AcquireLease | ReleaseLease | CommitOffsets
    | QueryCommitted | DescribeGroups | QuerySubscriptions
)
AnyReply = (
    Failed | Done | Welcome | Alive | Registered | Route | Topics | BrokerState | Sent | Pulled | Offsets | Joined | Leased
    | Committed | Groups | SubscribedSince | GroupChanged
)

_encoder = msgspec.msgpack.Encoder(enc_hook=str.__str__)  # what is a str by inheritance goes as one
_request_decoder = msgspec.msgpack.Decoder(AnyRequest)
_reply_decoder = msgspec.msgpack.Decoder(AnyReply)


def encode(header: Request | Reply) -> bytes:
    """The header frame."""
    return _encoder.encode(header)


def encode_fitting(reply: Reply, peer: bytes, has_room: Callable[[bytes], bool]) -> bytes:
    """The header frame of a reply, or of the refusal that takes the place of a large one.

    PAYLOAD_TOO_LARGE where no client would read it; TOO_MANY_REQUESTS where this peer does not read what it has (`has_room`).
    """
    header = _encoder.encode(reply)
    if len(header) <= ROOMLESS_BYTES_MAX:
        return header
    if len(header) > REPLY_HEADER_BYTES_MAX:
        return _encoder.encode(Failed(
            reply.number, Code.PAYLOAD_TOO_LARGE,
            f"The answer has {len(header)} bytes; the limit is {REPLY_HEADER_BYTES_MAX}. Ask for fewer topics or groups at once.",
            {"size_bytes": len(header), "limit_bytes": REPLY_HEADER_BYTES_MAX},
        ))
    if not has_room(peer):
        return _encoder.encode(Failed(
            reply.number, Code.TOO_MANY_REQUESTS,
            f"{UNREAD_BYTES_MAX} bytes of answers wait for this client already; read them, then ask again.",
            {"limit_bytes": UNREAD_BYTES_MAX},
        ))
    return header


def failed(number: int, error: ZrmqError) -> Failed:
    """The reply that refuses request `number` with `error`."""
    return Failed(number, int(error.code), error.message, error.plain_facts())


def check_whole(frames: Sequence[bytes]) -> None:
    """Raise `InvalidFrameError` (PAYLOAD_TOO_LARGE) for more frames than a message may have, which one that was cut off has."""
    if len(frames) > FRAME_COUNT_MAX:
        raise InvalidFrameError(
            f"A message has more than {FRAME_COUNT_MAX} frames or {RECEIVED_BYTES_MAX} bytes; send less at once.",
            code=Code.PAYLOAD_TOO_LARGE,
        )


def decode_request(frame: bytes) -> AnyRequest:
    """Raises `InvalidFrameError` for anything that is not a request; never anything else."""
    return _decode(_request_decoder, frame, HEADER_BYTES_MAX)  # type: ignore[no-any-return]


def decode_reply(frame: bytes) -> AnyReply:
    """Raises `InvalidFrameError` for anything that is not a reply or notice; never anything else."""
    return _decode(_reply_decoder, frame, REPLY_HEADER_BYTES_MAX)  # type: ignore[no-any-return]


def _decode(decoder: Any, frame: bytes, bytes_max: int) -> Any:
    if len(frame) > bytes_max:
        raise InvalidFrameError(
            f"A header has {len(frame)} bytes; the limit is {bytes_max}. Ask for less at once.", code=Code.PAYLOAD_TOO_LARGE
        )
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise InvalidFrameError(f"A header cannot be read: {error}.") from error


_ARRAY_START = re.compile(rb"[\x92-\x9f]|\xdc..|\xdd....", re.DOTALL)
_INT_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}  # unsigned, then signed


def peek_number(frame: bytes) -> int:
    """The number of a request that could not be decoded, so that the refusal finds its asker; 0 when there is none.

    Reads the second element of the array and nothing else: what follows is what could not be decoded, and may be anything.
    """
    start = _ARRAY_START.match(frame)
    _, at = _peek_int(frame, start.end() if start else len(frame))
    number, _ = _peek_int(frame, at)
    return number if 0 < number < 1 << 63 else 0


def _peek_int(frame: bytes, at: int) -> tuple[int, int]:
    """The integer at `at` and where the next value begins; 0 and the end of the frame when there is none."""
    if at >= len(frame):
        return 0, len(frame)
    kind = frame[at]
    if kind < 0x80:
        return kind, at + 1
    end = at + 1 + _INT_BYTES.get(kind, len(frame))
    return (int.from_bytes(frame[at + 1 : end], "big", signed=kind >= 0xD0), end) if end <= len(frame) else (0, len(frame))
