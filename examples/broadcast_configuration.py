"""A broadcasting group: every instance gets every message, and finds its own place again by its name."""

import tempfile
import threading

import zrmq

received = threading.Semaphore(0)


def apply(message: zrmq.Message) -> None:
    print(f"{message.keys[0]} = {message.value()}")
    received.release()


with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    for box in ("box-1", "box-2"):
        fabric.consume(
            "boxes", "configuration", apply, message_model=zrmq.MessageModel.BROADCASTING, instance_name=box,
            consume_from=zrmq.ConsumeFrom.EARLIEST,
        )
    with fabric.producer() as producer:
        producer.send("configuration", value={"every_s": 10}, keys=["sampling"])
    print(sum(received.acquire(timeout=10) for _ in range(2)), "of 2 boxes have it")
