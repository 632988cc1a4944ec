"""The checkers bite: each way of breaking a promise is noticed within a few seeds, by a checker that is there for it."""

from __future__ import annotations

import msgspec
import pytest

from tests.simulation.variants import VARIANTS, Variant
from tests.tidy.test_promises import kinds
from zrmq.testing.simulation.plan import draw_plan
from zrmq.testing.simulation.run import run_seed
from zrmq.testing.simulation.trace import SimulationError

SEEDS = 60  # within which each is found; most take fewer than ten


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name.replace(" ", "_"))
def test_a_broken_promise_is_noticed(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    variant.break_it(monkeypatch)
    for seed in range(1, SEEDS + 1):
        plan = draw_plan(seed, has_work=False, has_disk_faults=False)  # a focus has what it takes
        try:
            run_seed(seed, plan=msgspec.structs.replace(plan, **variant.focus))
        except SimulationError as error:
            assert error.kind in variant.kinds, error
            return
    pytest.fail(f"Nobody noticed in {SEEDS} runs that zrmq was told to {variant.name}: a checker has lost its teeth.")


def test_every_checker_has_been_seen_to_bite() -> None:
    bitten: set[str] = set().union(*[variant.kinds for variant in VARIANTS])
    assert kinds() - bitten == set()


def test_every_variant_is_one_of_a_kind() -> None:
    assert len({variant.name for variant in VARIANTS}) == len({variant.break_it for variant in VARIANTS}) == len(VARIANTS)
