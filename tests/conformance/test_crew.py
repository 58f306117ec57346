"""What the crew says when a job fails or hangs, and that it goes on with the next."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coterie.core.box import Box
from tests.conformance.crew import LIMIT, Crew, covered_wrongly, joined, too_large
from tests.conformance.layouts import job_of
from tests.conformance.worker import Report, errors_here
from tests.distributed import RankFailure

JOB = replace(job_of(2, ep=2), steps=1)


def test_a_hang_names_the_layout_and_shows_all_ranks(data: Path, truths: Path) -> None:
    job = replace(JOB, mutation="rank 1 hangs")
    with Crew(data, truths, limit=6) as crew:
        with pytest.raises(RankFailure) as failure:
            crew.run(job)
        story = str(failure.value)
        assert f"under test: {job.name}" in story
        assert "rank 0" in story and "_sum_in_buckets" in story  # where the other one waits
        assert "rank 1" in story and "in wait_for_ever" in story
        crew.limit = LIMIT
        assert too_large(crew.run(JOB).errors) == {}


def test_a_failure_names_the_layout_and_comes_at_once(crew: Crew) -> None:
    job = replace(JOB, mutation="rank 1 raises")
    with pytest.raises(RankFailure, match="the sentence of rank 1") as failure:
        crew.run(job)
    assert f"under test: {job.name}" in str(failure.value)


def report(errors: dict[str, float], owned: dict[str, Box]) -> Report:
    return Report(errors, {"a": (4,), "b": (2,)}, owned, 1.0, 1.0, 0, 0)


def test_the_worst_rank_counts_and_nan_is_worse() -> None:
    reports = [report({"loss": error}, {}) for error in (0.0, 1e-3, 1e-12)]
    assert too_large(joined(reports).errors) == {"loss": 1e-3}
    reports.append(report({"loss": float("nan"), "norm": 0.0}, {}))
    assert too_large(joined(reports).errors).keys() == {"loss"}


def test_nan_is_an_error_of_a_rank() -> None:
    step = {"numbers": {"loss": 1.0}, "entropy": {}, "load": 0, "dropped": 0, "tokens": 0}
    parts: dict[str, dict[str, torch.Tensor]] = {"gradients": {}, "clipped": {}, "weights": {}}
    wrong = {**step, **parts, "numbers": {"loss": float("nan")}}
    assert too_large(errors_here([{**step, **parts}, wrong], [step, step])).keys() == {"loss"}


def test_owners_must_cover_each_element_once() -> None:
    halves = [Box((4,), (0,), (2,)), Box((4,), (2,), (2,))]
    whole = Box((2,), (0,), (2,))
    right = [report({}, {"a": halves[0], "b": whole}), report({}, {"a": halves[1]})]
    assert covered_wrongly(right) == []
    twice = [report({}, {"a": halves[0], "b": whole}), report({}, {"a": halves[0]})]
    assert covered_wrongly(twice) == ["a"]
    assert covered_wrongly(right[1:]) == ["a", "b"]
