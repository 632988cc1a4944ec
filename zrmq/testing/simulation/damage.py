"""What the disk has done to one broker's log, so that the checks demand what must be there in spite of it, and nothing else.

An entry that was hurt is known as it was written, for whoever hurts it has read it before. What has become of it is looked up on
the disk: it is whole, or only its header is (then it is known where it is, and of which queue), or it is lost. A lost entry is
still in tables that were saved while it was whole, or in the memory of a broker that has not been started since.

Only what something behind it says was flushed is hurt. For the rest zrmq promises nothing: a flushed entry that does not check
out, with nothing behind it that tells of the flush, looks like one that a power cut tore.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from random import Random
from typing import NamedTuple

from zrmq.protocol.events import TopicPut
from zrmq.testing.files import FaultyFiles
from zrmq.testing.simulation.log_watch import BLOCK_BYTES, SEGMENT_HEADER_BYTES, Entry, LogWatch, read_blocks

MISDIRECT_TRIES = 10  # to find two places that fit


class Life(NamedTuple):
    """One life of a broker, as far as damage matters to it."""

    position: int  # where its log went on
    missing: frozenset[int]  # entries that its tables do not have


class LogDamage:
    """The damage of one broker's log, over all of its lives."""

    def __init__(self, files: FaultyFiles, folder: Path, rng: Random) -> None:
        self.hurt: dict[int, Entry] = {}  # by position, as they were written
        self._lives: list[Life] = []
        self._files = files
        self._folder = folder
        self._rng = rng

    # --- doing it -----------------------------------------------------------------------------------------------------

    def rot(self, watch: LogWatch, flushed_position: int) -> list[Entry]:
        """Flip a bit of an entry, or of a segment's header. Returns what is hurt by it."""
        may_be_hurt, _ = self._choice(watch, flushed_position)
        if not may_be_hurt:
            return []
        entry = self._rng.choice(may_be_hurt)
        start, path = self._segment_at(entry.position)
        if self._rng.random() < 0.05:
            self._files.rot(path, self._rng.randrange(SEGMENT_HEADER_BYTES))
            return []
        self._files.rot(path, self._rng.randrange(entry.position, entry.end) - start)
        return self._note([entry])

    def spoil_block(self, watch: LogWatch, flushed_position: int) -> list[Entry]:
        """A block cannot be read any more. Returns what is hurt by it."""
        may_be_hurt, said_position = self._choice(watch, flushed_position)
        if not may_be_hurt:
            return []
        at = self._rng.choice(may_be_hurt).position
        start, path = self._segment_at(at)
        begin = at - (at - start) % BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, start + self._files.size(path))
        inside = [entry for entry in watch.log if entry.position < end and entry.end > begin]
        if inside[-1].end > said_position or any(_is_spared(entry) for entry in inside):
            return []
        self._files.bad_ranges.setdefault(path, []).append((begin - start, end - start))
        return self._note(inside)

    def misdirect(self, watch: LogWatch, flushed_position: int) -> list[Entry]:
        """A write has landed where other entries were, in its own segment or in another one. Returns what is hurt by it.

        There the log has entries that check out but for their position, and where they should be it has what was there before:
        nothing yet, or what the file held when it was another segment.
        """
        may_be_hurt, _ = self._choice(watch, flushed_position)
        positions = {entry.position for entry in may_be_hurt}
        for _ in range(MISDIRECT_TRIES if may_be_hurt else 0):
            written = _stretch(may_be_hurt, self._rng.choice(may_be_hurt).position, self._rng.choice((1, 1, 1, 500)))
            place, size = self._rng.choice(may_be_hurt).position, written[-1].end - written[0].position
            overwritten = _stretch(watch.log, place, size)
            is_apart = written[-1].end <= place or overwritten[-1].end <= written[0].position
            if is_apart and overwritten[-1].end - place >= size and all(each.position in positions for each in overwritten):
                self._move(written[0].position, size, place)
                return self._note(sorted([*written, *overwritten]))
        return []

    def _move(self, position: int, size: int, place: int) -> None:
        start, path = self._segment_at(position)
        to_start, to_path = self._segment_at(place)
        data = read_blocks(self._files.open(path), size, position - start)
        other = self._folder / self._rng.choice([name for name in self._files.listdir(self._folder) if name.endswith(".log")])
        before = bytes(size)
        if other != path and self._rng.random() < 0.5:
            before = read_blocks(self._files.open(other), size, position - start)
            if before == data:  # a fault before this one has brought it there
                before = bytes(size)
        self._files.replace(to_path, place - to_start, data)
        self._files.replace(path, position - start, before.ljust(size, b"\0"))

    def _choice(self, watch: LogWatch, flushed_position: int) -> tuple[list[Entry], int]:
        """The entries that may be hurt: whole ones that an entry behind them, whole and flushed itself, says were flushed."""
        whole = [entry for entry in watch.log if entry.end <= flushed_position and entry.position not in self.hurt]
        said_position = max((entry.flushed_position for entry in whole), default=0)
        return [entry for entry in whole if entry.end <= said_position and not _is_spared(entry)], said_position

    def _note(self, entries: list[Entry]) -> list[Entry]:
        self.hurt.update((entry.position, entry) for entry in entries)
        return entries

    def _segment_at(self, position: int) -> tuple[int, Path]:
        starts = [int(name[:20]) for name in self._files.listdir(self._folder) if name.endswith(".log")]
        start = max(start for start in starts if start <= position)
        return start, self._folder / f"{start:020d}.log"

    # --- what follows -------------------------------------------------------------------------------------------------

    def missing_before(self, saved_position: int) -> frozenset[int]:
        """Entries that views do not have which were saved at this position: they were lost to the life that saved them."""
        for life in reversed(self._lives):
            if life.position < saved_position:
                return frozenset(position for position in life.missing if position < saved_position)
        return frozenset()

    def begin_life(self, position: int, watch: LogWatch) -> None:
        """A broker has come up; its log goes on at `position`."""
        self._lives.append(Life(position, frozenset(watch.missing)))


def _stretch(entries: list[Entry], position: int, size: int) -> list[Entry]:
    """The entry at `position` and those that follow it without a gap, as long as they begin within so many bytes."""
    found: list[Entry] = []
    for entry in entries[bisect_left(entries, position, key=lambda entry: entry.position) :]:
        if entry.position >= position + size or entry.position != (found[-1].end if found else position):
            break
        found.append(entry)
    return found


def _is_spared(entry: Entry) -> bool:
    """Nobody creates a topic anew that was lost."""
    return isinstance(entry.event, TopicPut)
