"""The plan's peak is what real processes hold at most."""

import pytest

from tests.parallel.planner.measure import CASES, compared

TESTED = ("one process", "ep 2", "tp 2", "cp 2", "pp 2", "dp_shard 2", "ep 2, recompute full")


@pytest.mark.parametrize("name", TESTED)
def test_peak_of_live_tensors(name: str) -> None:
    assert name in CASES
    for predicted, seen in compared(name):
        assert abs(predicted / seen - 1) < 0.10, f"{predicted} predicted, {seen} measured"
