"""The doors for consumers: one calls a listener for each message, the other is asked for messages.

    consumer = zrmq.PushConsumer("alarms")

    @consumer.subscribe("meters", "kitchen || hall")
    def on_reading(message: zrmq.Message) -> None:  # returning finishes the message, raising makes it come again
        print(message.body)

    consumer.run()

    with zrmq.PullConsumer("reports") as consumer:
        consumer.subscribe("meters")
        for message in consumer:
            print(message.body)

Both deliver at least once, and each queue in its order. What is finished is committed within `commit_interval_ms`, when a queue
goes to another member, and at the end; what is not finished comes again, here or at another member of the group.
"""

from __future__ import annotations

from zrmq.client.listening import Listener
from zrmq.consumer.pull import PullConsumer
from zrmq.consumer.push import PushConsumer

__all__ = ["Listener", "PullConsumer", "PushConsumer"]
