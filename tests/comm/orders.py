"""In which orders steps may run: what comes before what, and every state that can be reached."""

from typing import NamedTuple

import numpy as np

from coterie.comm.exchange.virtual.steps import Flag, Step, Workers, execute


class Order(NamedTuple):
    """Which steps of which workers must be done before which."""

    steps: list[Step]
    """In an order that is allowed."""
    names: list[tuple[str, int]]
    """Of each step, its worker and its place there."""
    raisers: list[list[int]]
    """Of each step, those that raise the flags it waits for."""

    @classmethod
    def of(cls, workers: Workers) -> "Order":
        """Runs nothing."""
        names: list[tuple[str, int]] = []

        def pick(free: list[str]) -> str:
            names.append((free[0], sum(name == free[0] for name, _ in names)))
            return free[0]

        idle = {
            name: [step._replace(run=lambda: None) for step in own] for name, own in workers.items()
        }
        execute(idle, pick)
        steps = [workers[name][at] for name, at in names]
        by_flag: dict[Flag, list[int]] = {}
        for number, step in enumerate(steps):
            for flag, _ in step.raises:
                by_flag.setdefault(flag, []).append(number)
        raisers = [[r for flag, _ in step.waits for r in by_flag.get(flag, [])] for step in steps]
        return cls(steps, names, raisers)

    def past(self, number: int) -> set[int]:
        """The steps that are done before a step in every order."""
        found: set[int] = set()
        todo = [number]
        while todo:
            at = todo.pop()
            name, place = self.names[at]
            before = set(self.raisers[at])
            if place:
                before.add(self.names.index((name, place - 1)))
            todo += before - found
            found |= before
        return found


def explore(workers: Workers) -> tuple[int, list[dict[str, int]]]:
    """How many states can be reached, and those in which steps are left and nobody can go on.

    A state is how many steps each worker has done; that says which flags are up. States are
    explored by the number of steps done in all, each once.
    """
    names, all_steps = list(workers), list(workers.values())
    length_W = np.array([len(steps) for steps in all_steps])
    stride_W = np.cumprod([1, *(length_W[:-1] + 1)])
    assert float(stride_W[-1]) * float(length_W[-1] + 1) < 2**62, "a state is one int64"
    heights = _heights(workers)
    level_NW = np.zeros((1, len(names)), dtype=np.int64)
    seen, stuck = 0, []
    while len(level_NW):
        seen += len(level_NW)
        stuck_N = (level_NW < length_W).any(1)
        next_N = [np.empty(0, np.int64)]
        for worker, steps in enumerate(all_steps):
            for at, step in enumerate(steps):
                free_N = level_NW[:, worker] == at
                for flag, count in step.waits:
                    by_worker = heights.get(flag, {}).items()
                    free_N &= sum(up[level_NW[:, by]] for by, up in by_worker) >= count
                next_N.append(level_NW[free_N] @ stride_W + stride_W[worker])
                stuck_N &= ~free_N
        stuck += [dict(zip(names, state.tolist(), strict=True)) for state in level_NW[stuck_N]]
        level_NW = np.unique(np.concatenate(next_N))[:, None] // stride_W % (length_W + 1)
    return seen, stuck


def _heights(workers: Workers) -> dict[Flag, dict[int, np.ndarray]]:
    """By flag and worker: how much of it there is after each number of that worker's steps."""
    found: dict[Flag, dict[int, np.ndarray]] = {}
    for worker, steps in enumerate(workers.values()):
        for at, step in enumerate(steps):
            for flag, by in step.raises:
                up = found.setdefault(flag, {}).setdefault(worker, np.zeros(len(steps) + 1))
                up[at + 1 :] += by
    return found
