"""Two brokers behind one NameServer: a topic has queues at both, and a producer goes on when one of them stops."""

import tempfile

import zrmq

with tempfile.TemporaryDirectory() as folder, zrmq.NameServer(nameserver_port=0) as nameserver:
    ports = {"nameservers": nameserver.address, "broker_port": 0, "ingest_port": 0}
    north = zrmq.Broker(f"{folder}/north", broker_name="north", **ports)
    south = zrmq.Broker(f"{folder}/south", broker_name="south", **ports)
    with north, south, zrmq.connect(nameserver.address) as fabric:
        admin = fabric.admin()
        while len(admin.cluster()) < 2:
            pass  # both register within moments; a topic is made at the brokers that are known
        producer = fabric.producer(send_timeout_ms=10_000)
        before = {producer.send("meters", b"21.5").broker_name for _ in range(16)}
        south.stop()
        after = {producer.send("meters", b"21.5").broker_name for _ in range(16)}
    print("before:", *sorted(before), "after:", *sorted(after))
