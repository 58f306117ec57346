"""The comparison notices each error that is planted, by the check that should."""

from dataclasses import replace

import pytest

from tests.conformance.crew import QUANTITIES, TOLERANCE, Crew
from tests.conformance.mutations import MUTATIONS


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_noticed(name: str, crew: Crew) -> None:
    mutation = MUTATIONS[name]
    errors = crew.run(replace(mutation.job, mutation=name)).errors
    assert not errors[mutation.check] <= 1e4 * TOLERANCE


def test_every_check_has_its_mutation() -> None:
    assert {mutation.check for mutation in MUTATIONS.values()} == QUANTITIES
