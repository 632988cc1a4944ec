"""kill -9 of a broker under load: what was acknowledged is there, once, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.kill_broker import run


@pytest.mark.timeout(120)
def test_nothing_acknowledged_is_lost_doubled_or_out_of_order(tmp_path: Path) -> None:
    verdict = run(tmp_path, times=5, seed=7)
    assert verdict.problems == []
    assert verdict.kills == 5
    assert verdict.read_back >= verdict.acknowledged > 0
