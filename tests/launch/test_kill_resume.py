"""kill -9 at random moments, then resume: the same run, bit for bit (the small form)."""

from pathlib import Path

import pytest

from tests.launch.kill_resume import kill_and_compare


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    kills = kill_and_compare(tmp_path, kills=3, steps=24, seed=7)
    assert any(kill.saving for kill in kills)
