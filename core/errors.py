"""Mistakes of the user: one sentence each, exit code 2. All else is ours: exit code 1."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What was wrong, where (file, key, rank, layer), and what is accepted, in one sentence.

    The command line prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A run ended for a reason that its sentence explains (a loss that is not finite, say): shown
    without a traceback, but no mistake of the user's, so exit code 1."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The tail of an error sentence: ``; did you mean 'x'?`` for the closest choice, or nothing."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
