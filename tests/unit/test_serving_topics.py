"""Topics: created by use or by hand, grown, deleted, described."""

from __future__ import annotations

import pytest

from tests.unit.broker_desk import BrokerDesk, DeskClient
from zrmq.errors import Code
from zrmq.message import FlushMode
from zrmq.protocol.events import TopicConfig
from zrmq.protocol.requests import DeleteTopic, DescribeTopics, Done, Failed, PutTopic, Topics


@pytest.fixture
def desk() -> BrokerDesk:
    return BrokerDesk()


@pytest.fixture
def admin(desk: BrokerDesk) -> DeskClient:
    return desk.client("admin")


def test_a_created_topic_has_its_queues_and_survives_a_power_cut(desk: BrokerDesk, admin: DeskClient) -> None:
    created = admin.ask(PutTopic, TopicConfig("meters", queue_count=3, flush_mode=FlushMode.ASYNC))
    assert [queue.queue_id for queue in created.topics[0].queues] == [0, 1, 2]
    desk.crash()
    found = desk.client("admin", epoch=2).ask(DescribeTopics, ["meters"])
    assert found.topics[0].config == TopicConfig("meters", queue_count=3, flush_mode=FlushMode.ASYNC)


def test_creation_is_answered_after_its_flush_and_told_to_the_nameservers(desk: BrokerDesk, admin: DeskClient) -> None:
    version = desk.core.topics.version
    number = admin.post(PutTopic, TopicConfig("meters"))
    desk.turn(flush=False)
    assert admin.reply(number) is None
    desk.turn()
    assert isinstance(admin.reply(number), Topics)
    assert (desk.core.topics.version, desk.topics_changed) == (version + 1, 1)
    assert [route.topic for route in desk.core.topics.routes()] == ["meters"]


def test_creation_by_use_takes_the_brokers_queue_count_and_leaves_what_exists() -> None:
    desk = BrokerDesk(default_queue_count=7)
    admin = desk.client("admin")
    created = admin.ask(PutTopic, TopicConfig("meters"), True, True)
    assert created.topics[0].config.queue_count == 7
    again = admin.ask(PutTopic, TopicConfig("meters", queue_count=9), True, True)
    assert again.topics[0].config.queue_count == 7


def test_creation_by_use_can_be_off_and_says_what_to_do() -> None:
    admin = BrokerDesk(auto_create_topics=False).client("admin")
    refused = admin.ask(PutTopic, TopicConfig("meters"), True, True)
    assert refused.code == Code.TOPIC_NOT_FOUND and "zrmq topic create meters" in refused.message
    assert isinstance(admin.ask(PutTopic, TopicConfig("meters")), Topics)


def test_queues_are_added_and_never_taken_away(desk: BrokerDesk, admin: DeskClient) -> None:
    admin.ask(PutTopic, TopicConfig("meters", queue_count=2))
    admin.send("meters", 1, [b"x"])
    assert len(admin.ask(PutTopic, TopicConfig("meters", queue_count=4)).topics[0].queues) == 4
    assert admin.ask(PutTopic, TopicConfig("meters", queue_count=3)).code == Code.BAD_REQUEST
    assert admin.pull("meters", 1, 0)[1] == [b"x"]


def test_a_deleted_topic_is_gone_and_comes_back_empty(desk: BrokerDesk, admin: DeskClient) -> None:
    admin.ask(PutTopic, TopicConfig("meters"))
    admin.send("meters", 0, [b"old"])
    assert isinstance(admin.ask(DeleteTopic, "meters"), Done)
    assert admin.send("meters", 0, [b"x"]).code == Code.TOPIC_NOT_FOUND
    admin.ask(PutTopic, TopicConfig("meters"))
    assert admin.pull("meters", 0, 0)[1] == []
    desk.crash()
    assert desk.client("admin", epoch=2).pull("meters", 0, 0)[1] == []


def test_a_deletion_means_one_topic_and_not_the_next_of_its_name(desk: BrokerDesk, admin: DeskClient) -> None:
    """It is sent again when its answer is lost, and a producer may have made the topic anew in between."""
    former = admin.ask(PutTopic, TopicConfig("meters")).topics[0].topic_id
    assert isinstance(admin.ask(DeleteTopic, "meters", former), Done)
    assert admin.ask(DeleteTopic, "meters", former).code == Code.TOPIC_NOT_FOUND
    present = admin.ask(PutTopic, TopicConfig("meters")).topics[0].topic_id
    admin.send("meters", 0, [b"acknowledged"])
    refused = admin.ask(DeleteTopic, "meters", former)
    assert refused.code == Code.TOPIC_NOT_FOUND and "another one has its name" in refused.message
    assert admin.pull("meters", 0, 0)[1] == [b"acknowledged"]
    assert isinstance(admin.ask(DeleteTopic, "meters", present), Done)


def test_that_the_topic_meant_is_gone_is_said_when_a_power_cut_cannot_undo_it(desk: BrokerDesk, admin: DeskClient) -> None:
    former = admin.ask(PutTopic, TopicConfig("meters")).topics[0].topic_id
    admin.post(DeleteTopic, "meters", former)
    admin.post(PutTopic, TopicConfig("meters"))
    number = admin.post(DeleteTopic, "meters", former)
    desk.turn(flush=False)
    assert admin.reply(number) is None
    desk.turn()
    assert admin.reply(number).code == Code.TOPIC_NOT_FOUND


@pytest.mark.parametrize(
    "config",
    [
        TopicConfig("a/b"),
        TopicConfig(""),
        TopicConfig("x" * 128),
        TopicConfig("t", queue_count=0),
        TopicConfig("t", queue_count=1025),
        TopicConfig("t", permission=8),
        TopicConfig("t", retention_ms=-1),
        TopicConfig("t", retention_bytes=0),
    ],
)
def test_what_cannot_be_a_topic_is_refused_with_a_sentence(admin: DeskClient, config: TopicConfig) -> None:
    reply = admin.ask(PutTopic, config)
    assert isinstance(reply, Failed) and reply.code in (Code.BAD_REQUEST, Code.ILLEGAL_TOPIC) and reply.message.endswith(".")


def test_describing_an_unknown_topic_says_so_and_describing_all_needs_none(admin: DeskClient) -> None:
    assert admin.ask(DescribeTopics, ["nowhere"]).code == Code.TOPIC_NOT_FOUND
    assert admin.ask(DescribeTopics, []).topics == []
