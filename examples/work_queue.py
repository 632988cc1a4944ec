"""A work queue: each job goes to one of three workers of a consumer group, and a job that fails comes again."""

import tempfile
import threading
from functools import partial

import zrmq

done = threading.Semaphore(0)
workers: set[str] = set()


def work(name: str, message: zrmq.Message) -> None:
    if message.body == b"job 5" and message.delivery_attempt == 1:
        raise RuntimeError("the first attempt at job 5 fails")  # it comes again after a pause
    workers.add(name)
    done.release()


with tempfile.TemporaryDirectory() as folder, zrmq.embedded(folder) as fabric:
    with fabric.producer() as producer:
        for number in range(12):
            producer.send("jobs", f"job {number}")  # one by one: a batch would go to one queue, so to one worker
    for name in ("Ann", "Ben", "Cat"):
        fabric.consume("workers", "jobs", partial(work, name), consume_from=zrmq.ConsumeFrom.EARLIEST)
    print(sum(done.acquire(timeout=20) for _ in range(12)), "of 12 jobs are done by", *sorted(workers))
