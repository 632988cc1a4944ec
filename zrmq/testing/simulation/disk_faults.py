"""What goes wrong with the disks of brokers, beyond writes that are torn, slow or refused: see `zrmq.testing.files`.

With dice of its own, so that the other faults of a seed fall as they do without these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

from zrmq.files import Files
from zrmq.testing.simulation.log_watch import Entry
from zrmq.testing.simulation.network import Machine
from zrmq.testing.simulation.servers import VirtualBroker
from zrmq.testing.simulation.world import World

DOWN_MS = (50.0, 6_000.0)  # how long a broker stays down
AGAIN_MS = (1.0, 1_000.0)  # from a start that failed to the next
STARTS_MAX = 4  # in a row that the power may end
START_CHANGES_MAX = 20  # changes of the disk until it does: most of them made while the store opens

ForAWhile = Callable[[tuple[float, float], Callable[[], None]], None]


class DiskFaults:
    """Breaks the disks of a world by the dice of its seed. `for_a_while` repairs what was broken after a time."""

    def __init__(self, world: World, for_a_while: ForAWhile) -> None:
        self.is_stopped = False  # nothing goes wrong any more
        self.kinds: dict[str, Callable[[], None]] = {
            "recovery_power_cut": self._cut_power_of_recovery,
            "lost_views": self._lose_views,
            "bit_rot": self._rot,
            "bad_block": self._spoil_block,
            "misdirected_write": self._misdirect,
        }
        self._world = world
        self._for_a_while = for_a_while
        self._rng = Random(f"{world.plan.seed} disk faults")

    def _broker(self) -> VirtualBroker | None:
        up = [broker for broker in self._world.brokers.values() if broker.machine is not None and not broker.machine.is_paused]
        return self._rng.choice(up) if up else None

    # --- a crash in the middle of recovery ----------------------------------------------------------------------------

    def _cut_power_of_recovery(self) -> None:
        """The broker ends, and the power goes while it starts again, several times in a row."""
        broker = self._broker()
        if broker is not None:
            self._rng.choice((broker.lose_power, broker.kill))()
            self._for_a_while(DOWN_MS, partial(self._start_in_vain, broker, self._rng.randint(1, STARTS_MAX)))

    def _start_in_vain(self, broker: VirtualBroker, times: int) -> None:
        if broker.machine is not None:
            return
        if self.is_stopped or not times:
            broker.start()
            return
        self._world.note(broker.name, "power_will_go", "while it starts")
        broker.files.cut_power_after(self._rng.randrange(START_CHANGES_MAX))
        broker.start()
        if broker.machine is None:
            self._for_a_while(AGAIN_MS, partial(self._start_in_vain, broker, times - 1))
        else:
            self._for_a_while(AGAIN_MS, partial(self._cut_power, broker, broker.machine, times - 1))

    def _cut_power(self, broker: VirtualBroker, machine: Machine, times: int) -> None:
        """It has come through its start, but the power goes now."""
        if broker.machine is machine:
            broker.lose_power()
        self._start_in_vain(broker, times)

    # --- damage of the log --------------------------------------------------------------------------------------------

    def _rot(self) -> None:
        broker = self._broker()
        if broker is not None and broker.check is not None:
            self._hurt(broker, broker.damage.rot(broker.check.watch, broker.check.flushed_position))

    def _spoil_block(self) -> None:
        broker = self._broker()
        if broker is not None and broker.check is not None:
            self._hurt(broker, broker.damage.spoil_block(broker.check.watch, broker.check.flushed_position))

    def _misdirect(self) -> None:
        broker = self._broker()
        if broker is not None and broker.check is not None:
            self._hurt(broker, broker.damage.misdirect(broker.check.watch, broker.check.flushed_position))

    def _hurt(self, broker: VirtualBroker, entries: list[Entry]) -> None:
        if not entries:
            return
        kinds = Counter(type(entry.event or entry.batch).__name__ for entry in entries)  # the end of a segment has neither
        what = " ".join(f"{kind}={count}" for kind, count in sorted(kinds.items()))
        self._world.note(broker.name, "damaged", f"{entries[0].position}..{entries[-1].end} {what}")
        broker.is_disk_suspect = True
        broker.hurt(entries)

    # --- files that can be made again ---------------------------------------------------------------------------------

    def _lose_views(self) -> None:
        """The broker ends, and some of what it can make again from the log is gone when it comes back."""
        broker = self._broker()
        if broker is not None:
            self._rng.choice((broker.lose_power, broker.kill, broker.stop))()
            self._for_a_while(DOWN_MS, partial(self._start_without_views, broker))

    def _start_without_views(self, broker: VirtualBroker) -> None:
        if broker.machine is not None:
            return
        lost = [path for path in self._chosen_views(broker) if _remove(broker.files, path)]
        self._world.note(broker.name, "lost_views", " ".join(str(path) for path in lost))
        broker.is_disk_suspect = True
        broker.start()

    def _chosen_views(self, broker: VirtualBroker) -> list[Path]:
        views, queues = broker.folder / "views.db", list(_queue_files(broker.files, broker.folder / "consumequeue"))
        some = [path for path in queues if self._rng.random() < 0.5]
        return self._rng.choice(([views], [views, *queues], [views, *some], queues, some))


def _queue_files(files: Files, folder: Path) -> Iterator[Path]:
    """The files of all queues: `folder/TOPIC/QUEUE/FILE`."""
    level = [folder]
    for _ in range(3):
        level = [path / name for path in level for name in _names(files, path)]
    yield from level


def _names(files: Files, folder: Path) -> list[str]:
    try:
        return files.listdir(folder)
    except OSError:
        return []


def _remove(files: Files, path: Path) -> bool:
    """Whether it was there. Gone from the disk, too."""
    if path.name not in _names(files, path.parent):
        return False
    files.unlink(path)
    files.fsync_dir(path.parent)
    return True
