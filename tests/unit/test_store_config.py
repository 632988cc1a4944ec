"""The store's options: their bounds, where they come from, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from zrmq.config import BrokerConfig, load, options
from zrmq.errors import ConfigError
from zrmq.protocol.limits import BATCH_BYTES_MAX
from zrmq.store.config import StoreConfig


def test_the_defaults_fit_each_other() -> None:
    config = StoreConfig()
    assert config.segment_bytes > 2 * BATCH_BYTES_MAX
    assert config.free_warn_bytes > config.free_delete_bytes > config.free_refuse_bytes > config.segment_bytes
    assert config.retention_ms == 72 * 3_600_000


def test_every_option_has_a_unit_or_a_count_and_a_description() -> None:
    for option in options(StoreConfig):
        assert option.description.endswith(".")
        assert option.unit or option.path[-1].endswith("_max"), option.key


def test_they_come_from_the_section_store(tmp_path: Path) -> None:
    file = tmp_path / "zrmq.toml"
    file.write_text('[store]\nsegment_bytes = "16MiB"\nretention_ms = "24h"\n')
    config = load(BrokerConfig[StoreConfig], file=file, environ={"ZRMQ_STORE_STORE_BYTES_MAX": "1GiB"})
    assert config.store == StoreConfig(segment_bytes=16 << 20, retention_ms=86_400_000, store_bytes_max=1 << 30)


def test_a_segment_given_by_a_user_holds_every_batch() -> None:
    with pytest.raises(ConfigError, match="segment"):
        load(BrokerConfig[StoreConfig], flags={"store_segment_bytes": "4MiB"})


@pytest.mark.parametrize("wrong", [
    {"segment_bytes": 100}, {"store_bytes_max": 5}, {"store_bytes_max": 3 * (64 << 20) - 1},
    {"free_delete_bytes": (320 << 20) - 1},
])
def test_contradictions_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        StoreConfig(**wrong)
    assert caught.value.facts["key"] == "store." + next(iter(wrong))


@pytest.mark.parametrize("free_delete_bytes", [0, 320 << 20])
def test_a_full_disk_is_never_waited_for_in_vain(free_delete_bytes: int) -> None:
    """Either nothing is deleted for it, or something is before the next segment does not fit."""
    assert StoreConfig(free_delete_bytes=free_delete_bytes).free_delete_bytes == free_delete_bytes
