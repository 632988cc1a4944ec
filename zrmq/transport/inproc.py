"""Who listens on which inproc address of a context: what monitor events tell of tcp and ipc, and libzmq does not of inproc.

A server's end notes here that it is up and down; a client's end watches, and connects when there is somebody. Both directions
of news are calls on the watching loop's thread, in the order in which things happened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakKeyDictionary

from zrmq.errors import ClosedError
from zrmq.transport.options import Context

OnNews = Callable[[bool], None]  # True: somebody listens


class Watch:
    """One client's interest in an address. `post` hands a call to the client's loop, from any thread."""

    def __init__(self, address: str, post: Callable[[Callable[[], None]], None], on_news: OnNews) -> None:
        self.address = address
        self._post = post
        self._on_news = on_news

    def tell(self, is_up: bool) -> None:
        """Pass the news on; a loop that has ended needs none."""
        with suppress(ClosedError):
            self._post(lambda: self._on_news(is_up))


class Directory:
    """The inproc addresses of one context. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Condition()  # held while news are handed over, so that each watch gets them in order
        self._up: dict[str, int] = {}
        self._count = 0
        self._watches: dict[str, list[Watch]] = {}

    def note_up(self, address: str) -> None:
        """Somebody listens there now."""
        with self._lock:
            self._count += 1
            self._up[address] = self._count
            self._lock.notify_all()
            for watch in self._watches.get(address, ()):
                watch.tell(True)

    def note_down(self, address: str) -> None:
        """Nobody listens there any more."""
        with self._lock:
            self._up.pop(address, None)
            for watch in self._watches.get(address, ()):
                watch.tell(False)

    def add_watch(self, watch: Watch) -> None:
        """Tell of the address from now on, beginning with whether somebody is there."""
        with self._lock:
            self._watches.setdefault(watch.address, []).append(watch)
            if watch.address in self._up:
                watch.tell(True)

    def remove_watch(self, watch: Watch) -> None:
        """Tell no more; what was handed over already still comes."""
        with self._lock:
            watches = self._watches.get(watch.address, [])
            if watch in watches:
                watches.remove(watch)
            if not watches:
                self._watches.pop(watch.address, None)

    def listener_number(self, address: str) -> int:
        """A number for who listens there, another one after each restart; 0: nobody."""
        return self._up.get(address, 0)

    def wait_up(self, address: str, timeout_ms: float) -> None:
        """Block until somebody listens there, or the time is over."""
        with self._lock:
            self._lock.wait_for(lambda: address in self._up, timeout_ms / 1000.0)


_directories: WeakKeyDictionary[Context, Directory] = WeakKeyDictionary()
_lock = threading.Lock()


def directory_of(context: Context) -> Directory:
    """The directory of a context."""
    with _lock:
        directory = _directories.get(context)
        if directory is None:
            directory = _directories[context] = Directory()
        return directory
