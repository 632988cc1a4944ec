"""broker.toml: written once, by whoever comes first, and believed from then on."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from zrmq.errors import FolderUnusableError
from zrmq.files import read_file, replace_file
from zrmq.store.identity import claim
from zrmq.testing.files import FaultyFiles, PowerCut

FOLDER = Path("/data")
FILE = FOLDER / "broker.toml"


def disk(seed: int = 0) -> FaultyFiles:
    files = FaultyFiles(seed)
    files.mkdir(FOLDER)
    return files


@pytest.mark.parametrize("name", ["broker-a", 'with "quotes" and \\', "ünïcode 🚀", "tab\tand newline\n"])
def test_the_first_one_has_it(name: str) -> None:
    files = disk()
    claim(files, FOLDER, name, "cluster", "id-1")
    claim(files, FOLDER, name, "cluster", "id-1")
    said = tomllib.loads(read_file(files, FILE).decode())
    assert said == {"format_version": 1, "broker_name": name, "cluster": "cluster", "store_id": "id-1"}
    assert claim(files, FOLDER, name, "cluster", "id-2") == "id-1"
    with pytest.raises(FolderUnusableError, match=r"Give this broker a folder of its own") as caught:
        claim(files, FOLDER, "somebody else", "cluster", "id-1")
    assert caught.value.facts == {"folder": "/data", "broker_name": name, "cluster": "cluster"}
    with pytest.raises(FolderUnusableError):
        claim(files, FOLDER, name, "another cluster", "id-1")


def test_it_is_there_whole_or_not_at_all() -> None:
    for seed in range(60):
        files = disk(seed)
        files.cut_power_after(seed % 6)
        with suppress(PowerCut):
            claim(files, FOLDER, "broker-a", "cluster", "id-1")
        files.crash()
        claim(files, FOLDER, "broker-a", "cluster", "id-1")
        with pytest.raises(FolderUnusableError, match="holds the data of"):
            claim(files, FOLDER, "broker-b", "cluster", "id-1")


def test_a_newer_format_is_refused() -> None:
    files = disk()
    replace_file(files, FILE, b"format_version = 2\n")
    with pytest.raises(FolderUnusableError, match="reads up to 1. Upgrade"):
        claim(files, FOLDER, "broker-a", "cluster", "id-1")


@pytest.mark.parametrize("content", [
    b"", b"broker_name = 'broker-a'\n", b"format_version = 'x'\n", b"\xff\xfe", b"= = =", b"broker_name = 'a",
    b"format_version = 1" + b"0" * 5_000, b"broker_name = " + b"[" * 5_000,
], ids=["empty", "no format", "no number", "not UTF-8", "not TOML", "cut off", "a number of 5,000 digits", "5,000 brackets"])
def test_a_spoiled_file_is_not_overwritten(content: bytes) -> None:
    files = disk()
    replace_file(files, FILE, content)
    with pytest.raises(FolderUnusableError, match="bring it back, or delete it if you know"):
        claim(files, FOLDER, "broker-a", "cluster", "id-1")
    assert read_file(files, FILE) == content


def test_a_file_without_a_name_is_nobodys() -> None:
    files = disk()
    replace_file(files, FILE, b"format_version = 1\n")
    with pytest.raises(FolderUnusableError, match="broker None"):
        claim(files, FOLDER, "broker-a", "cluster", "id-1")
