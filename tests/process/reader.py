"""A consumer as a process of its own: prints each message it got, until it is told to end.

    python tests/process/reader.py NAMESERVERS GROUP TOPIC
"""

from __future__ import annotations

import sys

import zrmq


def main(nameservers: str, group: str, topic: str) -> None:
    """Read until SIGTERM."""
    consumer = zrmq.PushConsumer(group, nameservers=nameservers, consume_from=zrmq.ConsumeFrom.EARLIEST)
    consumer.subscribe(topic, "*", lambda message: print(message.body.decode(), flush=True))
    consumer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
