"""Whole clusters through faults, one seed each; `tox -e sim -- --seed N --runs 10000` runs any number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from random import Random
from typing import Any

import msgspec
import pytest

from zrmq.testing.simulation import __main__ as command
from zrmq.testing.simulation.plan import DAMAGE, DISK_FAULTS, FAULTS, Plan, draw_plan, with_work
from zrmq.testing.simulation.run import run_seed
from zrmq.testing.simulation.trace import BrokenPromise, SimulationError
from zrmq.testing.simulation.work import KINDS, RetentionPlan, WorkPlan
from zrmq.testing.simulation.world import World

SEEDS = 150
FORMER_FAILURES = {
    1242: "a client that reconnects in a storm holds pulls without bound",
    100001: "a group begins at a time that is yet to come",
    100302: "a broker that was the first to hear of a group is started again",
    100470: "a broker is taken out of the route in error, while a listener works on messages of its queues",
    100738: "two brokers hear of a group in the same millisecond",
    100491: "a slow broker's queues are claimed and lost as fast as the network goes, with a held pull each time",
    101722: "a lease that was given to somebody else is taken for valid because a new session is open",
    3041: "an instance starts while only brokers are there that do not know it",
}
DISK_FAILURES: dict[int, tuple[str, dict[str, float]]] = {  # with the faults that were drawn for them
    210014: ("a start of the broker is damaged, and its number given again", {"bit_rot": 500.0, "broker_kill": 2_000.0}),
    210148: ("the end of a queue is damaged, and its offsets given again", {
        "bit_rot": 500.0, "bad_block": 1_000.0, "lost_views": 2_000.0, "broker_power_cut": 3_000.0, "recovery_power_cut": 3_000.0,
        "broker_restart": 4_000.0,
    }),
}
READER_FAILURES = {  # with readers that name their queues themselves, whether the seed has them or not
    1300011: "a queue is assigned again before it was let go",
    1300068: "a group stands nowhere, and a broker that acknowledges before it flushes is started again",
    1300314: "a broker goes away after a seek back and before the commit",
    8102644: "a broker loses the place where a reader that has got nothing yet began",
}
RENEWAL_FAILURES = {  # with topics that are made anew every 1.5 s, and without the faults that go apart from that
    1119: "a reader names other queues just when it is told where a topic begins that was made anew",
}
DRAWN_FAILURES = {  # as they were drawn before `calls`
    96101064: "the disk of a broker loses the commit of a reader, which goes on at what is the latest by then",
    94100925: "the first start of a broker is damaged, its views are lost, and its clock has been set back since",
    80007552: "a broker that shuts down refuses a lease that is in doubt, and who holds it does not want it afterwards",
    20003394: "two instances join, one hears that the other did and takes that for its answer, and the power goes",
    20101942: "a late message prolongs the session of an instance that has left, and the next one of its name gives up",
    4228: "a broker appears while the only other one still refuses an instance whose former life was killed",
    51000100: "one-way messages for a topic that takes none wait until their time is over",
    60006378: "the power takes one of several new segments before they are flushed, and again while the views are made anew",
    60100155: "a full disk refuses a batch, and its broker stores it after all and is gone before it answers",
}
WORK_FAILURES: dict[int, tuple[str, WorkPlan]] = {  # with the work that was given to them
    1204074: ("a topic is made again while a broadcasting consumer is busy with the former one", WorkPlan(
        remake_topics_every_ms=1_000.0,
    )),
    1204194: ("a consumer without leases goes on in a topic where it was in the former one of that name", WorkPlan(
        remake_topics_every_ms=700.0,
    )),
    1204011: ("a topic is flushed otherwise by the time a consumer asks what its broker may have lost", WorkPlan(
        change_flush_every_ms=300.0,
    )),
}
ASKED_TOO_MUCH_NOW = {  # by the checks, of what is drawn now
    100105837: "a topic is deleted, and made again when the time of a message that is bound to its queue is over",
    100000498: "a member stands still that knows what is committed, and the one that has its queue seeks back",
}
ASKED_TOO_MUCH = {  # by the checks, of what was drawn before `calls`
    95109304: "a write goes to the wrong place, and the last of its bytes is the one that was there",
    70000280: "the broker that was told first of a group, and alone, loses that to its disk",
    70002340: "a topic grows just after all NameServers were started again, which keep clients waiting that had a route",
    70002579: "what was acknowledged from the page cache is told late, when the power has gone and its offset was given again",
    70003532: "a lease is lost to the disk, and beside the one who has it another member commits",
    70104441: "a message is lost to the disk, and its commit was written, but not seen before the power went",
    80000503: "a reader goes back to what was flushed when its broker was killed: it cannot know that the power stayed",
    20105343: "a reader is closed while a broker is away, which is back before the others have answered the last commit",
    60105319: "a member polls that was iterating, and by that lets a queue go which another one is to have",
    60002750: "topics are made read-only when all else is well",
    60100227: "a producer is started when nothing more is sent, and has not prepared its topics yet",
    20104067: "a subscription is damaged, and a commit behind it that was written, but not seen before the power went",
    20000686: "a group is told to a broker whose clock stepped back, with messages that were stored there just before",
}
SEQUELS_OF_DAMAGE = {  # the same, with a damaged disk
    1115025: "where a queue goes on is damaged twice, and a batch behind that was written, but not seen before the power went",
}
CHUNK = 10  # so that workers of pytest-xdist can share them


def draw_former(seed: int) -> Plan:
    """As it was drawn before programs had threads that send and wait."""
    plan = draw_plan(seed)
    return msgspec.structs.replace(plan, work=msgspec.structs.replace(plan.work, calls=None))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(1, SEEDS, CHUNK))
def test_every_promise_is_kept(first: int) -> None:
    for seed in range(first, first + CHUNK):
        run_seed(seed)  # raises with the seed and the last events


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", FORMER_FAILURES, ids=FORMER_FAILURES.get)
def test_a_failure_stays_mended(seed: int) -> None:
    run_seed(seed, plan=draw_plan(seed, has_work=False, has_disk_faults=False))  # as it was then: neither was there yet


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", DISK_FAILURES, ids={seed: name for seed, (name, _) in DISK_FAILURES.items()}.get)
def test_a_failure_of_the_disk_stays_mended(seed: int) -> None:
    run_seed(seed, plan=msgspec.structs.replace(draw_plan(seed, has_work=False), faults=DISK_FAILURES[seed][1]))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", READER_FAILURES, ids=READER_FAILURES.get)
def test_a_failure_of_a_reader_stays_mended(seed: int) -> None:
    plan = draw_former(seed)
    readers = plan.work.readers or KINDS["readers"](Random(f"plan {seed} work readers forced"))
    work = msgspec.structs.replace(plan.work, readers=readers, remake_topics_every_ms=0.0)
    run_seed(seed, plan=msgspec.structs.replace(plan, work=work))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", RENEWAL_FAILURES, ids=RENEWAL_FAILURES.get)
def test_a_failure_of_a_reader_of_renewed_topics_stays_mended(seed: int) -> None:
    plan = draw_former(seed)
    faults = {kind: mean_ms for kind, mean_ms in plan.faults.items() if kind not in {*DAMAGE, "lost_views", "full_disk"}}
    work = msgspec.structs.replace(plan.work, remake_topics_every_ms=1_500.0)
    run_seed(seed, plan=msgspec.structs.replace(plan, faults=faults, work=work))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", DRAWN_FAILURES | ASKED_TOO_MUCH, ids=(DRAWN_FAILURES | ASKED_TOO_MUCH).get)
def test_a_failure_as_drawn_stays_mended(seed: int) -> None:
    run_seed(seed, plan=draw_former(seed))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", ASKED_TOO_MUCH_NOW, ids=ASKED_TOO_MUCH_NOW.get)
def test_no_more_is_asked_for_than_is_kept(seed: int) -> None:
    run_seed(seed)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", WORK_FAILURES, ids={seed: name for seed, (name, _) in WORK_FAILURES.items()}.get)
def test_a_failure_of_work_stays_mended(seed: int) -> None:
    plan = draw_plan(seed, has_work=False, has_disk_faults=False)
    run_seed(seed, plan=with_work(plan, WORK_FAILURES[seed][1]))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", SEQUELS_OF_DAMAGE, ids=SEQUELS_OF_DAMAGE.get)
def test_no_more_is_asked_for_than_damage_leaves(seed: int) -> None:
    plan = draw_plan(seed, has_work=False)
    run_seed(seed, plan=msgspec.structs.replace(plan, faults=plan.faults | {"misdirected_write": 500.0}))


@pytest.mark.timeout(120)
def test_a_seed_gives_one_run_whatever_python_hashes() -> None:
    program = "from zrmq.testing.simulation.run import run_seed; print([run_seed(seed).digest for seed in range(20, 26)])"
    digests = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1] == f"{[run_seed(seed).digest for seed in range(20, 26)]}\n"
    assert len(set(json.loads(digests[0].replace("'", '"')))) == 6


def test_plans_differ_and_cover_what_can_go_wrong() -> None:
    plans = [draw_plan(seed) for seed in range(1, 101)]
    assert draw_plan(7) == draw_plan(7)
    kinds = Counter(kind for plan in plans for kind in plan.faults)
    assert kinds.keys() == FAULTS.keys()
    assert min(kinds.values()) >= 10
    assert sum(not plan.faults for plan in plans) >= 5, "some runs have no faults at all"
    assert {group.message_model for plan in plans for group in plan.groups} == {"clustering", "broadcasting"}


def test_some_runs_have_work_beside_sending_and_reading() -> None:
    plans = [draw_plan(seed) for seed in range(1, SEEDS + 1)]
    assert sum(plan.work == WorkPlan() for plan in plans) >= 20, "many have none"
    for kind in WorkPlan.__struct_fields__:
        assert sum(getattr(plan.work, kind) != getattr(WorkPlan(), kind) for plan in plans) >= 10, kind
    assert not any(draw_plan(seed, has_work=False).work != WorkPlan() for seed in range(1, 101))
    assert any(plan.work.readers and plan.work.remake_topics_every_ms for plan in plans), "also together"


def test_nothing_is_deleted_of_a_damaged_log() -> None:
    plans = [draw_plan(seed) for seed in range(1, 1_001)]
    damaged = [plan for plan in plans if DAMAGE & plan.faults.keys()]
    assert any(plan.work != WorkPlan() for plan in damaged), "all other work is done"
    assert all(plan.work.retention == RetentionPlan() for plan in damaged)
    assert not any(plan.work.remake_topics_every_ms for plan in damaged)
    kept = [plan for plan in plans if plan.work.retention != RetentionPlan()]
    assert {kind for plan in kept for kind in plan.faults} == FAULTS.keys() - DAMAGE
    result = run_seed(400288)  # its administrator would have topics expire
    assert result.counts["changed_topic"] and "log_begins" not in result.counts


def test_a_run_in_fair_weather_loses_no_send() -> None:
    plan = next(plan for seed in range(1, 100) if not (plan := draw_plan(seed, has_work=False)).faults)
    result = run_seed(plan.seed, plan=plan)
    assert result.counts["acknowledged"] > 50
    assert result.counts["handed_out"] > 10
    assert "send_failed" not in result.counts
    assert result.healed_ms < 10_000


def test_runs_do_what_they_claim() -> None:
    counts: Counter[str] = Counter()
    for seed in range(1, 13):
        counts.update(run_seed(seed, plan=draw_plan(seed, has_work=False)).counts)
    disks = dict.fromkeys(DISK_FAULTS, 1_000.0)
    counts.update(run_seed(1, plan=msgspec.structs.replace(draw_plan(1, has_work=False), faults=disks)).counts)
    late = {"late_delivery": 300.0}
    counts.update(run_seed(1, plan=msgspec.structs.replace(draw_plan(1, has_work=False), faults=late)).counts)
    for what in (
        "overtaken", "acknowledged", "handed_out", "paused", "cut", "lost power", "killed", "crashed", "left", "queue_given_back",
        "power_will_go", "lost_views", "damaged", "damage_found",
    ):
        assert counts[what], f"no {what} in so many runs"


def test_work_is_done() -> None:
    counts: Counter[str] = Counter()
    for seed in [seed for seed in range(1, 100) if draw_plan(seed).work != WorkPlan()][:12]:
        counts.update(run_seed(seed).counts)
    for what in (
        "log_begins", "offset_moved", "sought", "queues_paused", "changed_topic", "deleted_topic", "made_topic_anew", "assigns",
        "begins",
    ):
        assert counts[what], f"no {what} in a dozen runs"


# --- failures -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world that breaks a promise after a second."""

    def break_promise(self: World, posting: Any, outcome: Any) -> None:
        if self.network.now_ms > 1_000.0:
            raise BrokenPromise("test", f"{posting} is not to my taste.")

    monkeypatch.setattr(World, "answered", break_promise)


@pytest.mark.usefixtures("broken_world")
def test_a_failure_says_how_to_repeat_it() -> None:
    with pytest.raises(SimulationError) as raised:
        run_seed(3, events_kept=5)
    error = raised.value
    assert (error.seed, error.kind) == (3, "test")
    assert "not to my taste" in error.reason
    assert "--seed 3" in str(error)
    assert "Plan(seed=3" in str(error)
    assert len(error.story.splitlines()) == 3 + 5, "the last events, as many as asked for"


@pytest.mark.usefixtures("broken_world")
def test_a_failure_repeats_exactly() -> None:
    stories = []
    for _ in range(2):
        with pytest.raises(SimulationError) as raised:
            run_seed(3)
        stories.append(str(raised.value))
    assert stories[0] == stories[1]


@pytest.mark.usefixtures("broken_world")
def test_the_command_fails_with_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seed", "3", "--runs", "2", "--events", "5"]) == 1
    told = capsys.readouterr().out
    assert "seed 3: [test]" in told
    assert "2 runs, 2 failed" in told


@pytest.mark.usefixtures("broken_world")
def test_the_command_fails_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seed", "3", "--json"]) == 1
    failure, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (failure["seed"], failure["kind"], summary["failed"]) == (3, "test", [3])


def test_ctrl_c_ends_the_command_with_what_was_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seed: int, *, events_kept: int) -> Any:
        if seed == 7:
            raise KeyboardInterrupt
        return run_seed(seed, events_kept=events_kept)

    monkeypatch.setattr(command, "run_seed", interrupted)
    assert command.main(["--seed", "5", "--runs", "9"]) == 130
    assert "2 runs, 0 failed" in capsys.readouterr().out


def test_the_command_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--seed", "5", "--runs", "2", "--json"]) == 0
    *runs, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [run["seed"] for run in runs] == [5, 6]
    assert runs[0]["digest"] != runs[1]["digest"]
    assert (summary["runs"], summary["failed"]) == (2, [])
    assert command.main(["--seed", "5"]) == 0
    assert "1 runs, 0 failed" in capsys.readouterr().out
