"""Time and accuracy of the ODE solvers, forward and backward, on predator–prey trajectories.

    python benchmarks/ode.py [--rounds N] [--json PATH]

coterie's fixed-step methods beside torchdiffeq's (``pip install torchdiffeq``). "tsit5, 2": two
steps from each of the 20 times to the next; "dopri5, 1e-06": that relative tolerance. The
contenders take turns (A B C A B C …); medians. The timed field is the true equations plus a small
neural one of the size that the dynamics models have. The error, on the true equations alone, is
relative to SciPy's DOP853 at 1e-12. "By batch": how much one trajectory changes when it is solved
without the others.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from benchmarks.rows import machine
from coterie.models.ode import Field, Method, solve

TIMES = torch.linspace(0, 9.5, 20, dtype=torch.float64)
Solver = Callable[[Field, Tensor, Tensor], Tensor]


def contenders() -> dict[str, Solver]:
    """By name: (field, y, times) → trajectories (…, times, state)."""

    def ours(method: Method, steps: int) -> Solver:
        return lambda field, y, t: solve(field, y, t, method, steps)

    solvers: dict[str, Solver] = {
        f"{method}, {steps}": ours(method, steps)
        for method, steps in (("rk4", 1), ("rk4", 2), ("tsit5", 1), ("tsit5", 2))
    }
    try:
        from torchdiffeq import odeint
    except ImportError:
        print("torchdiffeq is not installed: its rows are left out", file=sys.stderr)
        return solvers

    def theirs(**options: Any) -> Solver:
        return lambda field, y, t: odeint(field, y, t, **options).movedim(0, -2)

    for steps in (1, 2):
        size = {"step_size": 0.5 / steps}
        solvers[f"torchdiffeq rk4, {steps}"] = theirs(method="rk4", options=size)
    for rtol in (1e-4, 1e-6):
        name = f"torchdiffeq dopri5, {rtol:g}"
        solvers[name] = theirs(method="dopri5", rtol=rtol, atol=rtol / 10)
    return solvers


def predator_prey(_: Any, y: Tensor) -> Tensor:
    """The equations whose solution is known to SciPy."""
    prey, predator = y.unbind(-1)
    return torch.stack([0.5 * prey * (1 - predator), 0.5 * predator * (prey - 1)], -1)


def error(solver: Solver, y: Tensor) -> float:
    """The largest relative error on the true equations."""

    def right_side(_: float, flat: Any) -> Any:
        return predator_prey(None, torch.from_numpy(flat).view(-1, 2)).flatten().numpy()

    start = y.flatten().numpy()
    times = TIMES.numpy()
    truth = solve_ivp(right_side, (0, times[-1]), start, "DOP853", times, rtol=1e-12, atol=1e-12).y
    ours = solver(predator_prey, y, TIMES).movedim(-2, -1).reshape(len(start), -1).numpy()
    return float(np.abs(ours - truth).max() / np.abs(truth).max())


def by_batch(solver: Solver, y: Tensor) -> float:
    """The largest difference of the first trajectory, alone and among all."""
    together, alone = (solver(predator_prey, start, TIMES)[0] for start in (y, y[:1]))
    return float((together - alone).abs().max())


def measure(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a forward and backward pass through a neural field, and the errors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
    y = 1 + 2 * torch.rand(20, 2)
    solvers = contenders()
    times: dict[str, list[float]] = {name: [] for name in solvers}
    calls = dict.fromkeys(solvers, 0)
    for index in range(rounds + 1):
        for name, solver in solvers.items():
            calls[name] = 0

            def field(_: Any, y: Tensor, name: str = name) -> Tensor:
                calls[name] += 1
                return predator_prey(None, y) + 0.01 * net(y)

            start = time.perf_counter()
            solver(field, y, TIMES.float()).square().mean().backward()
            if index:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return [
        {
            "solver": name,
            "milliseconds": statistics.median(times[name]),
            "evaluations": calls[name],
            "error": error(solver, y.double()),
            "by_batch": by_batch(solver, y.double()),
        }
        for name, solver in solvers.items()
    ]


def main() -> int:
    """Measure, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=11, help="timed turns of each contender")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(arguments.rounds)
    table = Table("solver", "ms", "× tsit5, 1", "evaluations", "error", "by batch")
    base = next(r["milliseconds"] for r in records if r["solver"] == "tsit5, 1")
    for r in records:
        ratio = f"{r['milliseconds'] / base:.2f}"
        figures = (f"{r['milliseconds']:.1f}", ratio, str(r["evaluations"]))
        table.add_row(r["solver"], *figures, *(f"{r[key]:.1e}" for key in ("error", "by_batch")))
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "results": records}, indent=2)
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
