"""Log lines of the product as events of the run; a line that only a fault of zrmq itself writes ends the run."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from zrmq.testing.simulation.trace import BrokenPromise

if TYPE_CHECKING:
    from zrmq.testing.simulation.world import World


@contextmanager
def captured_logs(world: World) -> Iterator[None]:
    """Within it, every log line becomes an event of `world`."""
    before = structlog.get_config() if structlog.is_configured() else None

    def take(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        name, who = event.pop("event"), f"log {event.pop('logger', '')}"
        if method == "exception":
            raise BrokenPromise("fault", f"zrmq logged an exception of its own: {name} {dict(event)}")
        world.note(who, name, " ".join(f"{key}={value}" for key, value in event.items()))
        raise structlog.DropEvent

    structlog.configure(processors=[take], wrapper_class=structlog.BoundLogger, logger_factory=lambda *_: None)
    try:
        yield
    finally:
        if before is None:
            structlog.reset_defaults()
        else:
            structlog.configure(**before)
