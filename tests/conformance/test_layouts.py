"""Every layout computes what one process computes: losses, gradients, norm, clipping, weights.

The truth is a plain loop in float64 over autograd, torch's own clipping and its AdamW.
"""

import pytest

from coterie.data import IGNORE, IMAGE, TEXT, Batch
from tests.conformance.case import CLIP, EMPTY, STEPS, config_of, dense_layers, sampler_of
from tests.conformance.crew import QUANTITIES, Crew, too_large
from tests.conformance.layouts import jobs
from tests.conformance.worker import Job

JOBS = jobs()
NUMBERS = sorted({(job.batch, job.accumulation, job.layers) for job in JOBS})


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_layout_equals_one_plain_process(job: Job, crew: Crew) -> None:
    outcome = crew.run(job)
    print(f"{job.name} largest={max(outcome.errors.values()):.2e}")
    print(f"seconds={outcome.seconds:.2f} cpu={outcome.cpu:.2f}", end=" ")
    print(f"memory={outcome.memory >> 20} files={outcome.files}")
    assert outcome.errors.keys() == QUANTITIES - (set() if job.evaluates else {"held out"})
    assert too_large(outcome.errors) == {}
    assert outcome.covered_wrongly == []


@pytest.mark.parametrize("numbers", NUMBERS, ids=lambda numbers: "-".join(map(str, numbers)))
def test_the_case_is_hard_enough(numbers: tuple[int, int, int], crew: Crew) -> None:
    """Clipping bites, rows are dropped, an expert is empty, ranks differ in padding and targets."""
    batch, accumulation, layers = numbers
    job = Job(1, batch=batch, accumulation=accumulation, layers=layers)
    for step, result in enumerate(crew.truth(job)):
        assert result["numbers"]["norm"] > 2 * CLIP
        assert result["load"].keys() == set(range(layers)) - set(dense_layers(layers))
        empty = [load[EMPTY] == 0 and max(load) > 0 for load in result["load"].values()]
        assert all(empty) if step == 0 else any(empty)  # trained weights may choose it
        assert all(dropped > 0 for dropped in result["dropped"].values())
        assert all(0 < result["numbers"][name] < 10 for name in ("balance", "z"))
    sampler = sampler_of(config_of(crew.data, batch=batch, accumulation=accumulation))
    for step in range(STEPS):
        halves = [sampler.batch(step, 0, accumulation, rank, 2) for rank in range(2)]
        assert all(is_hard(half) for half in halves)
    halves = [sampler.batch(0, 0, accumulation, rank, 2) for rank in range(2)]
    assert len({int(half.padding_BS.sum()) for half in halves}) == 2
    assert len({int((half.targets_BS != IGNORE).sum()) for half in halves}) == 2


def is_hard(batch: Batch) -> bool:
    """Padding, text and images, rows of several documents."""
    kinds = set(batch.modality_BS[~batch.padding_BS].tolist())
    last_B = batch.segment_BS.masked_fill(batch.padding_BS, 0).amax(1)
    return bool(batch.padding_BS.any()) and kinds == {TEXT, IMAGE} and bool((last_B > 0).all())
