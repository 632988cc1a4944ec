"""Order where it matters: messages of one message group, here a device, are stored and read in the order they were sent."""

import tempfile

import zrmq

last: dict[str, int] = {}

with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    with fabric.producer() as producer:
        for step in range(1, 101):
            for device in ("pump", "valve", "fan"):
                producer.send_async("states", str(step), keys=[device], message_group=device)
    consumer = fabric.pull_consumer("twin", "states", consume_from=zrmq.ConsumeFrom.EARLIEST)
    while sum(last.values()) < 300:
        for message in consumer.poll(timeout_ms=5000):
            device, step = message.keys[0], int(message.body)
            assert step == last.get(device, 0) + 1, f"{device} went from {last.get(device)} to {step}"
            last[device] = step
    print("in order:", ", ".join(f"{device} {step}" for device, step in sorted(last.items())))
