"""Work of the store that may take long: begun and finished on the loop's thread, run wherever there is one to spare."""

from __future__ import annotations


class Job:
    """One piece of work. `run` once, on any thread; then `finish`, on the loop's.

    A subclass does its work in `work` and draws the conclusions in `finish`, which looks at `error` first.
    """

    error: Exception | None = None
    has_run = False

    def run(self) -> None:
        """The slow part. Never raises an `Exception`: what went wrong waits in `error` for the loop's thread to deal with."""
        try:
            self.work()
        except Exception as error:  # noqa: BLE001 (it is not lost: `finish` decides what it means)
            self.error = error
        self.has_run = True

    def work(self) -> None:
        """What `run` does."""
        raise NotImplementedError

    def finish(self) -> None:
        """The quick part: what has been done becomes known, or what went wrong."""
        raise NotImplementedError
