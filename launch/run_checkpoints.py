"""Which checkpoint of a run to take."""

from pathlib import Path

from coterie.core.errors import UserError
from coterie.parallel.checkpoint_format import latest, list_checkpoints, step_of
from coterie.parallel.config import StageConfig

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in a run's folder."""


def choose_checkpoint(run_dir: Path, step: int | None) -> Path | None:
    """The checkpoint of ``step`` in ``run_dir``, or the newest (None when there is none).

    Raises:
        UserError: there is no checkpoint of ``step``; those there are are named.
    """
    folder = run_dir / CHECKPOINTS
    if step is None:
        return latest(folder)
    found = list_checkpoints(folder)
    for path in found:
        if step_of(path) == step:
            return path
    steps = ", ".join(str(step_of(path)) for path in found) or "none"
    raise UserError(f"{folder} has no checkpoint of step {step}; there are: {steps}")


def stage_checkpoint(stage: StageConfig) -> Path:
    """Where the weights are that ``stage`` starts from.

    Raises:
        UserError: the run has no such checkpoint.
    """
    run = Path(stage.weights)
    checkpoint = choose_checkpoint(run, stage.step)
    if checkpoint is None:
        raise UserError(f"{run / CHECKPOINTS} holds no checkpoint yet, so no stage can start there")
    return checkpoint
