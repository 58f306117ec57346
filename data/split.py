"""Which things are held out of training: decided by their names alone, alike on every machine."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from coterie.core.random import key


def held_out(names: Sequence[str], fraction: float) -> npt.NDArray[np.bool_]:
    """For each name, whether it is held out: the ``fraction`` with the smallest keyed hashes.

    At least one is held out, and at least one is not, when there are two names or more and
    ``fraction`` > 0. No seed enters: runs that differ by seed are judged on the same things.
    """
    count = round(len(names) * fraction)
    if fraction > 0 and len(names) >= 2:
        count = min(max(count, 1), len(names) - 1)
    ranked = sorted(range(len(names)), key=lambda i: (key("held-out", names[i]), i))
    chosen = np.zeros(len(names), dtype=np.bool_)
    chosen[ranked[:count]] = True
    return chosen
