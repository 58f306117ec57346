"""``coterie dynamics evaluate`` and ``adapt``: one process, whatever layout saved the run."""

from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.core.errors import UserError
from coterie.data.environments import Environments, generate
from coterie.launch.dynamics_config import DynamicsRunConfig
from coterie.launch.dynamics_training import DynamicsRun, by_family
from coterie.launch.run_checkpoints import choose_checkpoint
from coterie.moe.routers.kmeans import KMeansRouter, routing_accuracy

Result = dict[str, Any]
"""``round``, ``environments`` (a list of rows), means by family, ``routing_accuracy``."""


def evaluate(config: DynamicsRunConfig, run_dir: Path, round_: int | None) -> Result:
    """The environments trained on, by their held-out trajectories.

    Raises:
        UserError: there is no such checkpoint.
    """
    run = _restored(config, run_dir, round_)
    loss_E = run.trainer.evaluate(run.test)
    return _result(run, run.test, run.trainer.environments.expert_E, {"relative_mse": loss_E})


def adapt(config: DynamicsRunConfig, run_dir: Path, round_: int | None, steps: int) -> Result:
    """Environments of ``generate(…, "adapt")``: contexts fitted to their training trajectories,
    measured on their test trajectories; ``unadapted``: with the contexts they start from.

    Raises:
        UserError: there is no such checkpoint, or the gate has no centroids to start at.
    """
    run = _restored(config, run_dir, round_)
    router = run.trainer.model.router
    if config.train.adaptation_start == "centroid" and not (
        isinstance(router, KMeansRouter) and router.fitted
    ):
        raise UserError(
            f"{run_dir}: contexts cannot start at centroids: the gate is no K-means gate that has "
            "ever converged; use --start zero"
        )
    seen, unseen = generate(config.data, "adapt"), generate(config.data, "adapt", test=True)
    before, after = (run.trainer.adapt(seen, number) for number in (0, steps))
    losses = {
        "unadapted": run.trainer.evaluate(unseen, before.context_E),
        "relative_mse": run.trainer.evaluate(unseen, after.context_E),
    }
    return _result(run, unseen, after.expert_E, losses)


def table(result: Result) -> str:
    """For the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = [name for name in ("unadapted", "relative_mse") if name in result["mean"]]
    shown = Table("environment", "family", "expert", box=box.SIMPLE)
    for name in columns:
        shown.add_column("relative MSE" if name == "relative_mse" else name, justify="right")
    for number, row in enumerate(result["environments"]):
        losses = (f"{row[name]:.3e}" for name in columns)
        shown.add_row(str(number), row["family"], str(row["expert"]), *losses)
    shown.add_section()
    for family in result["mean"][columns[0]]:
        means = (f"{result['mean'][name][family]:.3e}" for name in columns)
        shown.add_row("mean", "all" if family == "mean" else family, "", *means)
    text = StringIO()
    console = Console(file=text, width=100)
    console.print(shown)
    if result["routing_accuracy"] is not None:
        console.print(
            f"round {result['round']}: {result['routing_accuracy']:.0%} of the environments are "
            "with their family's expert",
            highlight=False,
        )
    return text.getvalue()


def _restored(config: DynamicsRunConfig, run_dir: Path, round_: int | None) -> DynamicsRun:
    checkpoint = choose_checkpoint(run_dir, round_)
    if checkpoint is None:
        raise UserError(f"{run_dir}: no checkpoint was saved yet")
    run = DynamicsRun.build(config)
    run.restore(checkpoint)
    return run


def _result(
    run: DynamicsRun, data: Environments, expert_E: Tensor, losses: dict[str, Tensor]
) -> Result:
    rows = [
        {
            "family": data.names[int(family)],
            "expert": int(expert),
            **{name: float(loss_E[number]) for name, loss_E in losses.items()},
        }
        for number, (family, expert) in enumerate(zip(data.family_E, expert_E, strict=True))
    ]
    several = len(data.names) > 1
    return {
        "round": run.trainer.round,
        "environments": rows,
        "mean": {name: by_family(loss_E, data) for name, loss_E in losses.items()},
        "routing_accuracy": routing_accuracy(expert_E, data.family_E) if several else None,
    }
