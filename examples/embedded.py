"""A NameServer and a broker inside this program: messages that survive it, with nothing to start."""

import tempfile

import zrmq

with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    with fabric.producer() as producer:
        receipt = producer.send("meters", b"21.5", tag="kitchen", keys=["dev-7"])
        print(f"stored as {receipt.message_id}, {receipt.durability.value}")
    for message in fabric.pull_consumer("reports", "meters", consume_from=zrmq.ConsumeFrom.EARLIEST):
        print(f"read {message.body.decode()} from the {message.tag}")
        break
