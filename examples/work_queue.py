"""A work queue: each job goes to one of three workers of a consumer group, and a job that fails comes again."""

import tempfile
import threading

import zrmq

done = threading.Semaphore(0)


def work(message: zrmq.Message) -> None:
    if message.body == b"job 5" and message.delivery_attempt == 1:
        raise RuntimeError("the first attempt at job 5 fails")  # it comes again after a pause
    done.release()


with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    for _ in range(3):
        fabric.consume("workers", "jobs", work, consume_from=zrmq.ConsumeFrom.EARLIEST)
    with fabric.producer() as producer:
        producer.send_batch("jobs", [f"job {number}" for number in range(12)])
    print(sum(done.acquire(timeout=20) for _ in range(12)), "of 12 jobs are done")
