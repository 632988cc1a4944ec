"""What `zrmq tail` does, from a script: read a topic without a group, from a time on, leaving no trace at the broker."""

import tempfile

import zrmq

with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    with fabric.producer() as producer:
        receipts = [producer.send("events", f"event {number}") for number in range(5)]
    reader = fabric.pull_consumer(None, "events", consume_from=receipts[0].store_timestamp_ms)
    lines: list[str] = []
    while len(lines) < 5:
        lines += [f"{message.queue_offset} {message.body.decode()}" for message in reader.poll(timeout_ms=5000)]
    print(*lines, sep="\n")
