"""The comparison notices each error that is planted, by the check that should."""

from dataclasses import replace

import pytest

from tests.conformance.crew import QUANTITIES, TOLERANCE, Crew
from tests.conformance.mutations import MUTATIONS
from tests.conformance.table import PAGE, page

BY_WORLD = sorted(MUTATIONS, key=lambda name: MUTATIONS[name].job.world)


@pytest.mark.parametrize("name", BY_WORLD)
def test_each_mutation_is_noticed(name: str, crew: Crew) -> None:
    mutation = MUTATIONS[name]
    errors = crew.run(replace(mutation.job, mutation=name)).errors
    print(f"{mutation.check} is off by {errors[mutation.check]:.1e}")
    assert not errors[mutation.check] <= 1e4 * TOLERANCE


def test_every_check_has_its_mutation() -> None:
    assert {mutation.check for mutation in MUTATIONS.values()} == QUANTITIES


def test_the_page_lists_every_mutation() -> None:
    """Else: python -m tests.conformance.table"""
    assert PAGE.read_text() == page()
