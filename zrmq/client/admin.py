"""Looking after a cluster from a program: topics, groups and brokers, over all live master brokers at once.

    with zrmq.connect().admin() as admin:
        admin.create_topic("meters", queue_count=8)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Self, TypeVar, get_args

import msgspec

from zrmq.client.instance import ClientInstance
from zrmq.client.link import Identity
from zrmq.client.runtime import ClientThread
from zrmq.client.waiting import no_broker
from zrmq.config import describe, find_nameservers
from zrmq.errors import (
    Code,
    ConsumerGroupNotFoundError,
    InvalidArgumentError,
    InvalidFrameError,
    RequestRefusedError,
    TopicNotFoundError,
    ZrmqError,
)
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.limits import TIMEOUT_MS_MAX, check_group, check_number, check_text, check_topic
from zrmq.protocol.requests import (
    AnyReply,
    BrokerInfo,
    BrokerState,
    DeleteTopic,
    DescribeBroker,
    DescribeGroups,
    DescribeTopics,
    GroupInfo,
    Groups,
    PutTopic,
    Request,
    TopicInfo,
    Topics,
)
from zrmq.transport.threads import Latch

if TYPE_CHECKING:
    from types import TracebackType

    from zrmq.transport.options import Context

TIMEOUT_MS = 5_000

Answers = dict[str, AnyReply | ZrmqError]  # by broker name
Fields = tuple[object, ...]  # of a request, behind its number and timeout
OnFailure = Callable[[str, ZrmqError], None]
T = TypeVar("T")
Finish = Callable[[T | ZrmqError], None]


class Admin:
    """A client for people and programs that look after a cluster. Calls block; any thread may make them.

    What lists things asks every live master. A broker that does not answer fails the call; with `on_failure(broker_name, error)`
    that is called for it instead, and the others' answers are returned, unless there are none. What changes things always fails
    when one broker does, after all have been asked; doing it again is safe.

    Every call may raise `UnreachableError`, `RequestTimeoutError` (after `timeout_ms`), `ClosedError`.
    """

    def __init__(
        self,
        nameservers: str | Sequence[str] | None = None,
        *,
        timeout_ms: int = TIMEOUT_MS,
        on_failure: OnFailure | None = None,
        context: Context | None = None,
    ) -> None:
        """`nameservers` as everywhere: the argument, else `ZRMQ_NAMESERVERS`, else this machine's. Connects in the background.

        Raises `ConfigError` or `InvalidArgumentError` for addresses that cannot be any, and for a time that cannot be waited;
        `ResourceLimitError`; `ClosedError` for a context that has ended.
        """
        addresses = find_nameservers(nameservers)
        self._timeout_ms = check_number("timeout_ms", timeout_ms, 1, TIMEOUT_MS_MAX)
        self._on_failure = on_failure
        self._thread = ClientThread("zrmq-admin", context=context)
        rng = Random()
        identity = Identity(f"admin-{rng.getrandbits(64):016x}", "admin")
        try:
            self._instance = self._thread.call(partial(_begin, self._thread, addresses, identity, rng))
        except BaseException:  # Ctrl-C too
            self._thread.close()
            raise

    def close(self) -> None:
        """End the sessions and the thread. Closing twice does nothing."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- brokers ------------------------------------------------------------------------------------------------------

    def cluster(self) -> list[BrokerInfo]:
        """The live master brokers, sorted by name. Those silent for 3 s are `suspect`; none when none is registered."""
        self._wait(self._begin_route)
        route = self._instance.route
        return [] if route is None else [route.brokers[name] for name in sorted(route.brokers)]

    def broker_state(self, broker_name: str) -> dict[str, Any]:
        """What a broker counts and holds: names to numbers or text. Raises `RequestRefusedError` (NOT_FOUND) for no such name."""
        check_text(broker_name, "broker's name", Code.BAD_REQUEST)
        answer = self._ask(DescribeBroker, only=[broker_name])[broker_name]
        return _expect(BrokerState, answer).facts

    # --- topics -------------------------------------------------------------------------------------------------------

    def topics(self) -> dict[str, dict[str, TopicInfo]]:
        """All topics: by topic, then by broker name."""
        return self._describe_topics([])

    def topic(self, name: str) -> dict[str, TopicInfo]:
        """One topic, by broker name. Raises `TopicNotFoundError`."""
        check_topic(name)
        found = self._describe_topics([name]).get(name)
        if not found:
            raise TopicNotFoundError(f"Topic {name!r} does not exist; 'zrmq topic list' shows those that do.", topic=name)
        return found

    def create_topic(self, name: str, **settings: Any) -> None:
        """Create the topic at every live master; return when the route shows it. `settings`: `queue_count`, `permission` (the sum
        of 4, read, and 2, write), `flush_mode`, `retention_ms` and `retention_bytes` (None: as the broker is told).

        Waits for the first broker, as one that has just been started is not registered yet. Brokers that have the topic are left
        as they are. Raises `RequestRefusedError` where one has it with another of the settings given, `InvalidArgumentError` for
        settings that cannot be.
        """
        config = _configure(TopicConfig(name), settings)
        self._wait(self._begin_brokers)
        present = self._describe_topics([name]).get(name, {})
        for broker_name, info in present.items():
            _check_alike(broker_name, info.config, {setting: getattr(config, setting) for setting in settings})
        route = self._instance.route
        missing = sorted(route.brokers.keys() - present.keys()) if route is not None else []
        if missing:
            self._change(self._ask(PutTopic, config, True, only=missing))
        self._wait(partial(self._begin_route, topic=name))

    def update_topic(self, name: str, **changes: Any) -> None:
        """Change these settings of the topic at every live master that has it. Raises as `topic` and `create_topic`; what one
        broker refuses is raised when all have been asked.

        Each broker is sent the whole configuration, as it was read with these changes, and is sent it again when its answer is
        lost. So of two admins who change one topic at the same time, either may undo what the other has changed, and make a topic
        again that the other has deleted: look at `topic` afterwards.
        """
        wanted = {broker_name: (_configure(info.config, changes),) for broker_name, info in self.topic(name).items()}
        self._change(self._ask_each(PutTopic, wanted))

    def delete_topic(self, name: str) -> None:
        """Delete the topic with its messages and offsets at every live master. Raises `TopicNotFoundError` when none has it.

        A broker that is away, and that the NameServer has forgotten, is not asked and cannot be named here: it keeps the topic
        and brings it back when it starts. `cluster` shows those that are asked.

        Deletes what has the name at the time of the call. A topic that somebody makes under it meanwhile, as producers in use do,
        stays: it may have messages that were acknowledged.
        """
        check_topic(name)
        described = self._ask(DescribeTopics, [name])
        known = {broker: answer for broker, answer in described.items() if not _is_code(answer, Code.TOPIC_NOT_FOUND)}
        if not known:
            raise TopicNotFoundError(f"Topic {name!r} does not exist; 'zrmq topic list' shows those that do.", topic=name)
        meant = {
            broker: (name, info.topic_id)
            for broker, answer in known.items() if not isinstance(answer, ZrmqError) for info in _expect(Topics, answer).topics
        }
        answers = known | (self._ask_each(DeleteTopic, meant) if meant else {})
        # One that is not found any more is gone, be it by the request that is repeated when its answer is lost.
        self._change({broker: answer for broker, answer in answers.items() if not _is_code(answer, Code.TOPIC_NOT_FOUND)})

    # --- consumer groups ----------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, dict[str, GroupInfo]]:
        """All consumer groups: by group, then by broker name."""
        return self._describe_groups([])

    def group(self, name: str) -> dict[str, GroupInfo]:
        """One consumer group, by broker name. Raises `ConsumerGroupNotFoundError`."""
        check_group(name)
        found = self._describe_groups([name]).get(name)
        if not found:
            raise ConsumerGroupNotFoundError(f"Group {name!r} does not exist; 'zrmq group list' shows those that do.", group=name)
        return found

    # --- asking -------------------------------------------------------------------------------------------------------

    def _describe_topics(self, names: list[str]) -> dict[str, dict[str, TopicInfo]]:
        found: dict[str, dict[str, TopicInfo]] = {}
        for broker_name, reply in self._list(self._ask(DescribeTopics, names), Code.TOPIC_NOT_FOUND).items():
            for info in _expect(Topics, reply).topics:
                found.setdefault(info.config.topic, {})[broker_name] = info
        return found

    def _describe_groups(self, names: list[str]) -> dict[str, dict[str, GroupInfo]]:
        found: dict[str, dict[str, GroupInfo]] = {}
        for broker_name, reply in self._list(self._ask(DescribeGroups, names), Code.CONSUMER_GROUP_NOT_FOUND).items():
            for info in _expect(Groups, reply).groups:
                found.setdefault(info.group, {})[broker_name] = info
        return found

    def _ask(self, kind: type[Request], *fields: object, only: Sequence[str] | None = None) -> Answers:
        """One request to each live master, or to `only` these, at once; what each of them said."""
        return self._wait(partial(self._begin_asking, kind, lambda broker_name: fields, only))

    def _ask_each(self, kind: type[Request], fields: Mapping[str, Fields]) -> Answers:
        """Requests of one kind to these brokers, at once, with each one's own fields."""
        return self._wait(partial(self._begin_asking, kind, fields.__getitem__, list(fields)))

    def _list(self, answers: Answers, absent: Code) -> Answers:
        """The good answers; a broker that does not have the thing says `absent`, which is an answer too."""
        replies: Answers = {name: answer for name, answer in answers.items() if not isinstance(answer, ZrmqError)}
        failures = {name: answer for name, answer in answers.items() if isinstance(answer, ZrmqError) and answer.code != absent}
        for name, error in failures.items():
            if self._on_failure is None or len(failures) == len(answers):
                raise error
            self._on_failure(name, error)
        return replies

    def _change(self, answers: Answers) -> None:
        for broker_name, answer in answers.items():
            if isinstance(answer, ZrmqError):
                answer.facts["broker_name"] = broker_name
                raise answer

    def _wait(self, begin: Callable[[Finish[T]], None]) -> T:
        """Run `begin(finish)` on the thread and wait until `finish` is called; raise the error it may be called with."""
        finished = Latch()
        results: list[T | ZrmqError] = []

        def finish(result: T | ZrmqError) -> None:
            results.append(result)
            finished.set()

        self._thread.call(lambda: begin(finish))
        finished.wait()
        if isinstance(results[0], ZrmqError):
            raise results[0]
        return results[0]

    # --- on the thread ------------------------------------------------------------------------------------------------

    def _begin_route(self, finish: Callable[[ZrmqError | None], None], topic: str | None = None) -> None:
        self._instance.await_route(finish, self._timeout_ms, topic)

    def _begin_brokers(self, finish: Callable[[ZrmqError | None], None]) -> None:
        self._instance.await_broker(finish, self._timeout_ms)

    def _begin_asking(
        self, kind: type[Request], fields_of: Callable[[str], Fields], only: Sequence[str] | None, finish: Finish[Answers]
    ) -> None:
        def ask(error: ZrmqError | None) -> None:
            if error is not None:
                finish(error)
                return
            _Round(self._instance, only, finish).ask(kind, fields_of, self._timeout_ms)

        self._begin_route(ask)


class _Round:
    """Requests of one kind to several brokers; `finish` gets all answers when the last is there. Loop thread only."""

    def __init__(
        self, instance: ClientInstance, only: Sequence[str] | None, finish: Finish[Answers]
    ) -> None:
        assert instance.route is not None
        self._instance = instance
        self._names = sorted(instance.route.brokers) if only is None else list(only)
        self._answers: Answers = {}
        self._finish = finish

    def ask(self, kind: type[Request], fields_of: Callable[[str], Fields], timeout_ms: int) -> None:
        """Ask all of them."""
        if not self._names:
            self._finish(no_broker(self._instance))
        for name in self._names:
            link = self._instance.link(name)
            if link is None:
                self._take(name, _unknown(name), [])
            else:
                link.request(kind, *fields_of(name), timeout_ms=timeout_ms, on_reply=partial(self._take, name))

    def _take(self, name: str, answer: AnyReply | ZrmqError, frames: list[bytes]) -> None:
        self._answers[name] = answer
        if len(self._answers) == len(self._names):
            self._finish(dict(sorted(self._answers.items())))


def _unknown(broker_name: str) -> RequestRefusedError:
    return RequestRefusedError(
        f"No live broker is named {broker_name!r}; 'zrmq cluster' shows those that are.",
        code=Code.NOT_FOUND, broker_name=broker_name,
    )


def _expect(kind: type[T], answer: AnyReply | ZrmqError) -> T:
    if isinstance(answer, ZrmqError):
        raise answer
    if not isinstance(answer, kind):
        raise InvalidFrameError(f"A broker answered with {type(answer).__name__}; is it a zrmq broker of this version?")
    return answer


def _is_code(answer: AnyReply | ZrmqError, code: Code) -> bool:
    return isinstance(answer, ZrmqError) and answer.code == code


def _begin(thread: ClientThread, nameservers: Sequence[str], identity: Identity, rng: Random) -> ClientInstance:
    """What runs on the thread, made there."""
    instance = ClientInstance(thread.loop, nameservers, identity, rng)
    thread.at_close(instance.close)
    return instance


def _configure(config: TopicConfig, settings: dict[str, Any]) -> TopicConfig:
    """The configuration with these settings. Raises `InvalidArgumentError` for a name or a setting that cannot be."""
    check_topic(config.topic)
    names = [field.name for field in msgspec.structs.fields(TopicConfig)]
    unknown = settings.keys() - set(names[1:])
    if unknown:
        raise InvalidArgumentError(
            f"A topic has no setting {min(unknown)!r}; it has {', '.join(names[1:])}.", setting=min(unknown)
        )
    for name, value in settings.items():
        if isinstance(value, str):
            check_text(value, name, Code.BAD_REQUEST)
    try:
        return msgspec.convert(msgspec.structs.astuple(msgspec.structs.replace(config, **settings)), TopicConfig)
    except msgspec.ValidationError as error:
        name = names[int(str(error).rpartition("$[")[2].rstrip("]`"))]  # msgspec ends with where: at `$[3]`
        raise InvalidArgumentError(
            f"{name} cannot be {settings[name]!r}; give {_expected(name)}.", topic=config.topic, setting=name
        ) from error


def _expected(setting: str) -> str:
    """What a setting of a topic may be, in words."""
    [annotation] = [field.type for field in msgspec.structs.fields(TopicConfig) if field.name == setting]
    return describe(annotation) + (", or None" if type(None) in get_args(annotation) else "")


def _check_alike(broker_name: str, config: TopicConfig, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if getattr(config, name) != value:
            raise RequestRefusedError(
                f"Topic {config.topic!r} exists at {broker_name} with {name} {getattr(config, name)}; change it with"
                f" 'zrmq topic update {config.topic}', or create one of another name.",
                code=Code.BAD_REQUEST, topic=config.topic, broker_name=broker_name, setting=name,
            )
