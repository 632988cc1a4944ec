"""A few thousand bent inputs to everything, those that found something once, and that what is broken on purpose is found."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.corpus.samples import EVENTS
from tests.fuzz import cores, decoders, files
from tests.fuzz.ports import run_ports
from tests.fuzz.probe import BASE_BYTES_MAX, GROWTH_BYTES_MAX, KEPT, Probe, Target, run_targets
from zrmq.protocol import batch
from zrmq.protocol.events import AnyEvent, Event, encode_event
from zrmq.store import segment

DECODER_INPUTS = 6_000
CORE_INPUTS = 2_000
FOLDER_INPUTS = 150
LOSSY_INPUTS = 150
PORT_INPUTS = 3_000

Patch = pytest.MonkeyPatch


def findings(targets: list[Target], count: int) -> list[Any]:
    """What so many inputs find."""
    return list(run_targets(targets, 1, count)[0].findings.values())


def test_decoders_give_a_value_or_a_typed_error(tmp_path: Path) -> None:
    assert findings(decoders.targets(tmp_path), DECODER_INPUTS) == []


def test_servers_answer_whatever_comes() -> None:
    assert findings(cores.targets(), CORE_INPUTS) == []


def test_a_store_opens_or_refuses_a_bent_folder() -> None:
    assert findings(files.targets(), FOLDER_INPUTS) == []


@pytest.mark.timeout(180)
def test_live_ports_disturb_nobody(tmp_path: Path) -> None:
    report = run_ports(tmp_path, 1, PORT_INPUTS)
    assert report["faults"] == []
    assert report["messages"] > 0
    assert report["answered_otherwise"] > PORT_INPUTS // 2
    assert report["answers"].keys() >= {"Sent", "Pulled", "Leased", "Committed", "FENCED", "Registered", "Route", "Welcome"}


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.bin")), ids=lambda path: path.stem)
def test_what_found_something_once_does_so_no_more(path: Path, tmp_path: Path) -> None:
    known = {target.name: target for target in (*decoders.targets(tmp_path), *cores.targets(), *files.targets())}
    with Probe() as probe:
        probe.feed(known[path.stem.rpartition("-")[0]], path.read_bytes())
    assert list(probe.findings.values()) == []


def test_the_same_seed_makes_the_same_inputs(tmp_path: Path) -> None:
    def inputs() -> list[bytes]:
        seen: list[bytes] = []
        run_targets([target._replace(take=seen.append) for target in decoders.targets(tmp_path)], 7, 500)
        return seen

    assert inputs() == inputs()


# --- broken on purpose ----------------------------------------------------------------------------------------------------


def trust_the_size(patch: Patch) -> None:
    """A header is unpacked before anybody looks whether it is there."""
    patch.setattr(decoders, "open_batch", batch.peek_batch)


def trust_a_count(patch: Patch) -> None:
    """Room is made for as many records as the header says, which nobody has compared with a limit."""
    decode = decoders.decode_messages

    def greedy(header: batch.BatchHeader, whole: bytes, **place: str) -> object:
        room = [None] * header.record_count
        return decode(header, whole, **place), len(room)

    patch.setattr(decoders, "decode_messages", greedy)


def look_up_the_kind(patch: Patch) -> None:
    """A table has the events of this version, and no other."""
    decode = decoders.decode_event
    known = {encode_event(event)[1]: type(event) for event in EVENTS}

    def hasty(payload: bytes) -> AnyEvent:
        if len(payload) > 1 and payload[0] & 0xF0 == 0x90:  # an array, whose first part is the tag
            assert issubclass(known[payload[1]], Event)
        return decode(payload)

    patch.setattr(decoders, "decode_event", hasty)


def skip_the_rest_of_a_damaged_segment(self: segment.EntryReader, position: int) -> segment.Found:
    return segment.Found(position, self._end, None, b"", 0, False)


def test_a_store_that_serves_less_than_is_whole_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(segment.EntryReader, "gap", skip_the_rest_of_a_damaged_segment)
    found = findings(files.targets(), LOSSY_INPUTS)
    assert any(finding.what.startswith("LostMessageError") for finding in found)


def test_memory_is_noticed_where_it_is_not_traced() -> None:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + GROWTH_BYTES_MAX  # more than other tests have taken
    frugal = Target("greedy", lambda data: None, [b"x"], lambda rng, seeds: b"x", traced_every=1_000)
    with Probe() as probe:
        probe.run(frugal, Random(1), 1)
        probe.run(frugal._replace(take=lambda data: len(b"x" * size)), Random(1), 1)
    assert [finding.what.split(" ", 1)[1] for finding in probe.findings.values()] == ["bytes of memory"]


@pytest.mark.parametrize("times, found", [(1, 0), (2, 1)])
def test_memory_that_only_the_process_took_is_no_finding(times: int, found: int) -> None:
    sizes = [2 * BASE_BYTES_MAX] * times
    greedy = Target("greedy", lambda data: bytes(sizes.pop()) if sizes else b"", [b"x"], lambda rng, seeds: b"x")
    with Probe() as probe:
        probe.feed(greedy, b"x")
    assert len(probe.findings) == found


@pytest.mark.parametrize(
    "break_it, target, what",
    [(trust_the_size, "batch", struct.error), (trust_a_count, "pulled", MemoryError), (look_up_the_kind, "event", KeyError)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_fuzzer_finds_what_is_broken(
    break_it: Callable[[Patch], None], target: str, what: type[Exception], monkeypatch: Patch, tmp_path: Path
) -> None:
    break_it(monkeypatch)
    broken = [each for each in decoders.targets(tmp_path) if each.name == target]
    found = findings(broken, DECODER_INPUTS // 13)  # no more than its share among all
    assert any(finding.what.startswith(what.__name__) for finding in found)
