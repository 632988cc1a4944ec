"""A sensor sends readings without waiting; a dashboard shows those of two rooms as they come."""

import tempfile
import threading

import zrmq

seen = threading.Semaphore(0)


def show(message: zrmq.Message) -> None:
    print(f"{message.tag:8} {message.body.decode()} C")
    seen.release()


with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    fabric.consume("dashboard", "temperatures", show, "kitchen || hall", consume_from=zrmq.ConsumeFrom.EARLIEST)
    with fabric.producer() as sensor:
        for room, degrees in [("kitchen", 21.5), ("cellar", 12.0), ("hall", 19.0), ("kitchen", 21.7)]:
            sensor.send_async("temperatures", str(degrees), tag=room)
    for _ in range(3):  # the cellar is not on this dashboard
        seen.acquire(timeout=10)
