"""The data and the workers are those of the conformance tests."""

from tests.conformance.conftest import data, own_core, truths

__all__ = ["data", "own_core", "truths"]
