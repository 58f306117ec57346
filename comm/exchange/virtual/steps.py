"""Steps that wait for flags and raise flags, and how they are run in one process."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

Flag = tuple[str | int, ...]
"""A counter: its kind, the rank that has it, and where it stands there."""


class Step(NamedTuple):
    """What a worker does at a time."""

    waits: tuple[tuple[Flag, int], ...]
    """Flags, and the full count of each."""
    run: Callable[[], None]
    raises: tuple[tuple[Flag, int], ...]
    """Flags that are raised afterwards, and by how much."""


Workers = dict[str, list[Step]]
"""The steps of each worker, in order, by a name that says its rank."""


def execute(workers: Workers, pick: Callable[[list[str]], str]) -> None:
    """Run all steps; of the workers that need not wait, ``pick`` names the next.

    Raises RuntimeError, with what each worker waits for, when none can go on.
    """
    flags: Counter[Flag] = Counter()
    at = dict.fromkeys(workers, 0)
    while left := {
        name: steps[at[name]] for name, steps in workers.items() if at[name] < len(steps)
    }:
        free = [name for name, step in left.items() if ready(step, flags)]
        if not free:
            waits = "; ".join(f"{name} for {step.waits}" for name, step in left.items())
            raise RuntimeError(f"no worker can go on: {waits}")
        name = pick(free)
        left[name].run()
        flags.update(dict(left[name].raises))
        at[name] += 1


def ready(step: Step, flags: Counter[Flag]) -> bool:
    """Whether all that ``step`` waits for is there."""
    return all(flags[flag] >= count for flag, count in step.waits)
