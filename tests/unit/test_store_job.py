"""A job keeps what went wrong for the loop's thread, and tells that it has run."""

from __future__ import annotations

import pytest

from zrmq.store.job import Job


class Failing(Job):
    def work(self) -> None:
        raise OSError("disk")

    def finish(self) -> None:
        raise AssertionError("nobody asked for it")


class Cut(Failing):
    def work(self) -> None:
        raise KeyboardInterrupt


class Fine(Failing):
    def work(self) -> None:
        assert not self.has_run


def test_an_error_waits() -> None:
    job = Failing()
    assert (job.error, job.has_run) == (None, False)
    job.run()
    assert str(job.error) == "disk"
    assert job.has_run


def test_success() -> None:
    job = Fine()
    job.run()
    assert (job.error, job.has_run) == (None, True)


def test_what_is_no_exception_is_not_kept() -> None:
    job = Cut()
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert not job.has_run


def test_the_base_does_nothing() -> None:
    job = Job()
    job.run()
    assert isinstance(job.error, NotImplementedError)
    with pytest.raises(NotImplementedError):
        job.finish()
