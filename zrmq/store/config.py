"""What an operator decides about the store: the `[store]` section of the configuration."""

from __future__ import annotations

from typing import Annotated

import msgspec

from zrmq.config import meta
from zrmq.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HOUR_MS = 3_600_000


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the store. Raises `ConfigError` when made of values that contradict each other."""

    segment_bytes: Annotated[
        int, meta("Length of a segment of the log; retention deletes whole ones.", ge=8 * MIB, le=4 * GIB)
    ] = 64 * MIB
    retention_ms: Annotated[
        int, meta("Age at which messages are deleted, where their topic has no bound of its own.", ge=1)
    ] = 72 * HOUR_MS
    store_bytes_max: Annotated[
        int, meta("Size of the log beyond which its oldest segment is deleted, expired or not; 0 sets no bound.", ge=0)
    ] = 0
    free_warn_bytes: Annotated[
        int, meta("Free disk space below which a warning is logged.", ge=0)
    ] = GIB
    free_delete_bytes: Annotated[
        int, meta("Free disk space below which the oldest segment is deleted, expired or not; 0: never.", ge=0)
    ] = 512 * MIB
    free_refuse_bytes: Annotated[
        int, meta("Free disk space below which messages are refused; reads and commits go on.", ge=0)
    ] = 256 * MIB
    checkpoint_bytes: Annotated[
        int, meta("Log written between two saves of the views; a restart replays as much.", ge=MIB)
    ] = 64 * MIB
    checkpoint_ms: Annotated[
        int, meta("Longest time between a change and a save of the views.", ge=100)
    ] = 30_000
    spare_segments_max: Annotated[
        int, meta("Emptied segments kept to be written again.", ge=1, le=16)
    ] = 2
    scrub_ms: Annotated[
        int, meta("Time between two checks of a segment's checksums.", ge=1_000)
    ] = 7 * 24 * HOUR_MS

    def __post_init__(self) -> None:
        if self.segment_bytes < 4 * KIB:
            raise ConfigError(f"segment_bytes is {self.segment_bytes}; a segment has at least 4 KiB.", key="store.segment_bytes")
        if 0 < self.store_bytes_max < 3 * self.segment_bytes:
            raise ConfigError(
                f"store_bytes_max is {self.store_bytes_max}, less than three segments of {self.segment_bytes} bytes; raise it,"
                " or lower segment_bytes.",
                key="store.store_bytes_max",
            )
        if 0 < self.free_delete_bytes < self.free_refuse_bytes + self.segment_bytes:
            raise ConfigError(
                f"free_delete_bytes is {self.free_delete_bytes}, less than free_refuse_bytes and segment_bytes together"
                f" ({self.free_refuse_bytes + self.segment_bytes}): a disk could be too full for the next segment, and not full"
                " enough for the oldest to go; raise it, or lower the others. With 0 none goes for the disk's sake.",
                key="store.free_delete_bytes",
            )
